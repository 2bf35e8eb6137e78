"""min_w max_{||v_l|| <= gamma ||w_l|| for each layer l} L_base(w + v)

Adversarial weight perturbation (Wu et al. 2020, arXiv 2004.05884) of a base defense: its loss is minimized at the
worst weights near the current ones, one normalized ascent step away.

Each step, in this order: x' of the base at the unperturbed weights, used for all that follows; v_l = gamma ||w_l||
g_l / ||g_l|| with g the gradient of the base's `ascent_loss` in train mode, its BatchNorm statistics put back; the
base's loss *and* the optimizer step at w + v, so that weight decay and momentum act there; v taken off again. Norms are
of whole tensors, and only weights of convolutions and linear layers move. No proxy network is made: its learning rate
cancels in the normalization. The statistics move once a step, at the perturbed weights, as in the released code.

gamma is 5e-3 for TRADES; for PGD-AT the paper has 1e-2 and no warm-up. The warm-up is a fraction of training: the
released code has 10 of 200 epochs. The released RAT-AWP is base {name: rat_release, set: {noise_std: 0}}.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from pydantic import TypeAdapter
from torch import Tensor, nn

from bench.core.classifier import Classifier, keep_buffers
from bench.core.defense import Batch, Defense, Losses, Updater
from bench.core.threat import Threat
from bench.core.weights import layer_weights, shifted, uphill


@dataclass
class AWP(Defense):
    """Worst-case weights around any base defense. Costs the base's passes and those of its ascent loss once more."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    cost: ClassVar[str] = "base + its loss = 33F (trades)"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: its weights are perturbed in training only"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")  # where the base does too
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "step",
        "epochs": 200,
        "batch_size": 128,
    }
    test_settings: ClassVar[dict[str, Any]] = {"base": {"name": "trades", "set": {"steps": 2, "rel_step_size": 0.5}}}

    base: dict[str, Any] = field(default_factory=lambda: {"name": "trades"})
    """The defense whose loss is taken at the perturbed weights: {name, set}, or its name alone."""
    gamma: Annotated[float, Ge(0)] = 5e-3
    """Size of each layer's perturbation relative to the layer's weights."""
    warmup: Annotated[float, Ge(0), Le(1)] = 0.05
    """Fraction of training at its start in which the weights are not perturbed."""

    def __post_init__(self) -> None:
        self._base = _build(self.threat, self.base)
        self._steps = self._active = 0

    def _current(self) -> Defense:
        """The base under the present budget, which the engine moves during a warm-up of eps."""
        self._base.threat = self.threat
        return self._base

    def wrap(self, net: nn.Module) -> nn.Module:
        return self._base.wrap(net)

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        self._base.check(net, x, classes)

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        return self._base.param_groups(net)

    def inner(self, net: nn.Module, batch: Batch) -> Any:
        """What the base's inner problem gives at the unperturbed weights."""
        return self._current().inner(net, batch)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """The base's terms at the current weights."""
        return self._current().loss(net, batch, adv)

    def perturbation(self, net: nn.Module, batch: Batch, adv: Any) -> list[tuple[Tensor, Tensor]]:
        """Pairs (w_l, v_l) with ||v_l|| = gamma ||w_l||, along the gradient of the base's ascent loss; the net is
        unchanged.

        Weights without a gradient are omitted.
        """
        weights = [w for w in layer_weights(net) if w.requires_grad]
        with keep_buffers(net):
            climbed = torch.stack(list(self._current().ascent_loss(net, batch, adv).values())).sum()
            grads = torch.autograd.grad(climbed, weights, allow_unused=True)
        return uphill(weights, grads, self.gamma)

    def step(self, net: nn.Module, updater: Updater, batch: Batch) -> Losses:
        """The base's step at perturbed weights, or its plain one during the warm-up."""
        adv = self.inner(net, batch)
        active = self.gamma > 0 and batch.progress >= self.warmup
        self._steps, self._active = self._steps + 1, self._active + active
        with shifted(self.perturbation(net, batch, adv) if active else []):
            terms = self.loss(net, batch, adv)
            updater.descend(terms)
        return terms

    def deploy(self, net: nn.Module) -> Classifier:
        return self._base.deploy(net)

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        """The base's metrics, the number of steps with perturbed weights, and their share."""
        own = {"awp_steps": self._active, "awp_share": self._active / max(self._steps, 1)}
        return {**self._base.metrics(net), **{name: torch.tensor(float(value)) for name, value in own.items()}}

    def state_dict(self) -> dict[str, Tensor]:
        base = {f"base.{name}": value for name, value in self._base.state_dict().items()}
        return {"steps": torch.tensor([self._steps, self._active]), **base}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._steps, self._active = state["steps"].tolist()
        own = {n.removeprefix("base."): value for n, value in state.items() if n.startswith("base.")}
        self._base.load_state_dict(own)


def _build(threat: Threat, entry: dict[str, Any]) -> Defense:
    """The base defense {name, set}; the planner adds its revision. Raises ValueError in one line."""
    name, settings = entry.get("name"), entry.get("set", {})
    if set(entry) - {"name", "set", "revision"} or not isinstance(name, str) or not isinstance(settings, dict):
        raise ValueError(f"awp: base must be {{name: ..., set: {{...}}}}, got {entry}")
    module = f"defenses.{name}"
    if not name.isidentifier() or importlib.util.find_spec(module) is None:
        raise ValueError(f"awp: base '{name}' is not a file of defenses/")
    kinds = vars(importlib.import_module(module)).values()
    found = [k for k in kinds if inspect.isclass(k) and issubclass(k, Defense) and k.__module__ == module]
    if len(found) != 1 or found[0].loss is Defense.loss or found[0].step is not Defense.step:
        raise ValueError(f"awp: base '{name}' must be one defense with a loss of its own and the ordinary step")
    if found[0].predictor != "deterministic":
        raise ValueError(f"awp: base '{name}' deploys a {found[0].predictor} model; expected a deterministic one")
    base: Defense = TypeAdapter(found[0]).validate_python({"threat": threat, **settings})
    return base
