"""The base of every defense: the min-max game made visible. Only `loss` is required of a new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.threat import Threat

Losses = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One minibatch: images `x` (b c h w, [0,1]), labels `y`, their training-set `index`, epoch number, `progress` in
    [0,1) through the whole training, and `smoothing`: share of each label that the recipe spreads evenly over all
    classes, in the cross-entropy that the weights minimise (attacks keep the true label)."""

    x: Tensor
    y: Tensor
    index: Tensor
    epoch: int
    progress: float
    smoothing: float = 0.0


class Updater(Protocol):
    """What a training step may do to the weights."""

    def descend(self, terms: Losses) -> None:
        """Minimise the sum of the terms by one optimiser step (scaling, clipping, schedule tick included).

        Averages take the weights when the step of the defense ends, or when the next `descend` in it begins: a defense
        that perturbs weights takes that back before either.
        """


@dataclass
class Defense:
    """Base of a training method. A subclass is one file in `defenses/`; its fields are its hyper-parameters at the
    paper's values.

    Class constants, literals so that the planner can read them without importing torch: `uses_threat` (does training
    depend on norm and eps), `predictor` ("deterministic", "randomised" or "smoothed"), `cost` (cost of a step in
    forward passes F per image), `adaptive_attacks` (the attacks adapted to it by file name, separated by commas, one of
    which a row needs, or a sentence that says why a standard attack is adaptive already), `revision` (raise it when
    results may change), `settings_added_later` (settings younger than the first records: left out of a job while at
    their default, so that old results keep their keys; a new default for one needs a new revision), `supports_recipe`
    (recipe settings that the method must take part in: "label_smoothing", if its loss passes `batch.smoothing` on, and
    "bf16", "fp16", if its passes may run so; others are refused when planning), `presets` (named sets of settings,
    chosen by preset=NAME), `recipe` (the paper's optimiser and schedule), `test_settings` (cheap settings for the
    contract tests).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "arbitrary_types_allowed": True}
    uses_threat: ClassVar[bool] = True
    predictor: ClassVar[str] = "deterministic"
    cost: ClassVar[str] = ""
    adaptive_attacks: ClassVar[str] = ""
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = ()
    supports_recipe: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    recipe: ClassVar[dict[str, Any]] = {}
    test_settings: ClassVar[dict[str, Any]] = {}

    threat: Threat

    @property
    def updates_per_batch(self) -> int:
        """Optimiser steps that one `step` makes; the learning-rate schedule counts them."""
        return 1

    @property
    def restored_older_weights(self) -> bool:
        """Has the step that just ended put older weights back and trained none? Averages then begin anew at them."""
        return False

    def wrap(self, net: nn.Module) -> nn.Module:
        """Add layers or parameters before training. Keeps `net.head`; chooses layers by type, never by name."""
        return net

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        """Refuse a net that cannot be trained so, before anything is. Raises ValueError in one line: found, expected.

        `net` is wrapped, untrained, in eval mode and thrown away; `x` is one blank image (1 c h w).
        """

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """Optimiser groups; `lr_scale` multiplies the recipe's learning rate, `weight_decay` replaces its own."""
        return [{"params": list(net.parameters())}]

    def inner(self, net: nn.Module, batch: Batch) -> Any:
        """The inner maximisation: mostly adversarial images, opaque to the engine, handed to `loss`."""
        return batch.x

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Named scalar terms whose SUM is minimised; each is logged."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def ascent_loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """What adversarial weight perturbation climbs in weight space."""
        return self.loss(net, batch, adv)

    def step(self, net: nn.Module, updater: Updater, batch: Batch) -> Losses:
        """One training step; returns the terms (device tensors, not read here)."""
        terms = self.loss(net, batch, self.inner(net, batch))
        updater.descend(terms)
        return terms

    def deploy(self, net: nn.Module) -> Classifier:
        """What is attacked and served."""
        return Classifier(net)

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        """Scalars to log at the end of each epoch beside the terms (a learned sigma, say)."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive a kill beside weights and optimiser."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")
