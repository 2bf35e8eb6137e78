"""x_{t+1} = Pi(x_t + a * dir(1/S sum_s grad_x L(f(x_t; n_s), y))), S grown until accuracy stops falling

Expectation over transformation (Athalye et al. 2018, arXiv 1707.07397) around a gradient attack: every step sees S
fresh draws of a randomized model. A base with a setting `eot` averages the gradients themselves (pgd: of its loss);
any other one attacks the log of the mean probability over S draws, the prediction of a model that averages
probabilities.

S takes the values of `draws` until a larger one no longer lowers the accuracy by more than `tolerance`. For each image
we keep the candidate that is misclassified in most of `judge` further draws, so that a single misclassified draw is no
success. The deployed rule is scored on separate draws (bench.core.attack).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from pydantic import TypeAdapter
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import Classifier
from bench.core.rng import scope, seed
from bench.core.stochastic import wrong_draws
from bench.core.threat import Threat


class MeanOfDraws(nn.Module):
    """Log of the mean softmax over `draws` fresh draws of a stochastic model: logits of its mean prediction."""

    stochastic = False  # approximately: the remaining noise decreases with the number of draws

    def __init__(self, model: nn.Module, draws: int) -> None:
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, x: Tensor) -> Tensor:
        logs = torch.stack([self.model(x).log_softmax(1) for _ in range(self.draws)])
        return logs.logsumexp(0) - torch.log(logs.new_tensor(float(self.draws)))


@dataclass
class EOT(Attack):
    """A gradient attack on averages over draws. Columns `draws` (S of the image) and `hit` (share of wrong draws)."""

    needs_draws: ClassVar[bool] = True
    cost: ClassVar[str] = "5 base F to draws base F"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {"draws": [1, 2], "judge": 4, "base": {"name": "fgsm"}}

    base: dict[str, Any] = field(default_factory=lambda: {"name": "pgd", "set": {"steps": 20, "rel_step_size": 0.1}})
    """The attack around which to average: {name: ..., set: {...}}."""
    draws: list[Annotated[int, Gt(0)]] = field(default_factory=lambda: [1, 4, 16, 32])
    """Values of S, tried in this order."""
    tolerance: Annotated[float, Ge(0)] = 0.005
    """Stop once a larger S lowers the mean accuracy over draws by no more than this share."""
    judge: Annotated[int, Gt(0)] = 32
    """Fresh draws that select between the images of several S."""

    def __post_init__(self) -> None:
        if not self.draws or self.draws != sorted(set(self.draws)):
            raise ValueError(f"draws must rise, such as [1, 4, 16, 32]; got {self.draws}")
        self._bases = {s: _build(self.threat, self.base, s) for s in self.draws}

    def unsupported_reason(self, model: Classifier) -> str | None:
        return super().unsupported_reason(model) or next(iter(self._bases.values()))[0].unsupported_reason(model)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """The image misclassified in most fresh draws, of the candidates of all values of S."""
        state = ctx.saved or {
            "x_adv": x.clone(),
            "hit": torch.full((len(x),), -1.0, device=x.device),
            "draws": torch.zeros(len(x), dtype=torch.int64, device=x.device),
            "last": torch.tensor([float("inf"), 0.0]),
        }
        for place, s in enumerate(self.draws):
            if place < int(state["last"][1]):
                continue  # done before a restart
            base, averages = self._bases[s]
            with scope(seed(ctx.seed, "eot", s)):  # the same draws before and after a restart
                inner = Context(seed(ctx.seed, s), ctx.report)
                found, _ = base.perturb(model if averages else MeanOfDraws(model, s), x, y, inner)
                hit = wrong_draws(model, found, y, self.judge) / self.judge
            better = hit > state["hit"]
            state["x_adv"][better], state["hit"][better] = found[better].to(x), hit[better]
            state["draws"][better] = s
            accuracy, before = 1 - float(state["hit"].mean()), float(state["last"][0])
            state["last"] = torch.tensor([accuracy, place + 1.0])
            ctx.report(place + 1, len(self.draws), f"S={s}: correct in {accuracy:.1%} of draws")
            if before - accuracy <= self.tolerance:
                break
            ctx.save(state)
        return state["x_adv"], {"hit": state["hit"], "draws": state["draws"]}


def _build(threat: Threat, entry: dict[str, Any], draws: int) -> tuple[Attack, bool]:
    """The base attack of {name, set} for S draws, and whether it averages gradients itself. Raises ValueError."""
    name, settings = entry.get("name"), dict(entry.get("set", {}))
    module = f"attacks.{name}"
    if not isinstance(name, str) or not name.isidentifier() or importlib.util.find_spec(module) is None:
        raise ValueError(f"eot: base '{name}' is not a file of attacks/")
    kinds = vars(importlib.import_module(module)).values()
    found = [k for k in kinds if inspect.isclass(k) and issubclass(k, Attack) and k.__module__ == module]
    refused = len(found) != 1 or found[0] is EOT or found[0].kind != "bounded"
    if refused or found[0].needs_images or found[0].uses_noise_model:
        raise ValueError(f"eot: base '{name}' is not a gradient attack within a budget")
    averages = "eot" in found[0].__dataclass_fields__
    if averages:
        settings["eot"] = draws
    return TypeAdapter(found[0]).validate_python({"threat": threat, **settings}), averages
