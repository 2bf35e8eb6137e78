"""The base class of every defense: an inner maximization, a loss on its result, and a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.method import Method, described

Losses = dict[str, Tensor]


def total_loss(terms: Losses) -> Tensor:
    """The sum of the terms, which a step minimizes.

    Raises TypeError for what a `loss` must not return: anything but a dict of scalar tensors that depend on weights.
    """
    if not isinstance(terms, dict) or not terms:
        found = "an empty dict" if isinstance(terms, dict) else described(terms)
        raise TypeError(f'loss must return a dict of named scalars such as {{"ce": loss}}, found {found}')
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.dim():
            raise TypeError(f"term '{name}' of the loss must be a scalar tensor, found {described(value)}")
    summed = torch.stack(list(terms.values())).sum()
    if torch.is_grad_enabled() and not summed.requires_grad:
        raise TypeError("no term of the loss depends on the weights: they were computed under no_grad or detached")
    return summed


@dataclass(frozen=True)
class Batch:
    """One minibatch of training.

    - `x`: images, shape b c h w, values in [0,1].
    - `y`: labels, shape b.
    - `index`: position of each image in the training set, shape b.
    - `epoch`: number of the epoch, from 0.
    - `progress`: fraction of the whole training that is over, in [0,1).
    - `smoothing`: share of each label that the recipe spreads evenly over all classes, in the cross-entropy that the
      weights minimize (attacks use the true label).
    """

    x: Tensor
    y: Tensor
    index: Tensor
    epoch: int
    progress: float
    smoothing: float = 0.0


class Updater(Protocol):
    """What a training step may do to the weights."""

    def descend(self, terms: Losses) -> None:
        """Minimize the sum of the terms by one optimizer step: loss scaling, clipping and the learning-rate schedule
        are applied here.

        Weight averages read the weights when the step of the defense ends, or when the next `descend` within it begins:
        a defense that perturbs weights must have restored them by then.
        """


@dataclass
class Defense(Method):
    """Base of a training method. A subclass is one file in `defenses/`; its fields are its hyperparameters, with the
    paper's values as defaults. Only `loss` is required. `self.threat` is the threat model of the training.

    Hooks, in the order in which a training calls them:

    - `wrap(net)`: adds layers or parameters to the network.
    - `check(net, x, classes)`: rejects a network that the method cannot train.
    - `param_groups(net)`: optimizer groups with their own learning rate or weight decay.
    - `step(net, updater, batch)`: one training step; by default `inner`, `loss`, and one update.
    - `inner(net, batch)`: the inner maximization, for most methods the adversarial images.
    - `loss(net, batch, adv)`: named scalar terms whose sum is minimized.
    - `ascent_loss(net, batch, adv)`: what adversarial weight perturbation maximizes.
    - `metrics(net)`: scalars for the training log at the end of an epoch.
    - `deploy(net)`: the classifier that is evaluated and attacked.
    - `state_dict()`, `load_state_dict(state)`: state beside the weights, for checkpoints.

    Class constants, besides those of `Method` (literals as they are):

    - `norms`: norms that the method supports; a subclass without it supports all.
    - `predictor`: kind of the deployed model, "deterministic", "randomised" or "smoothed".
    - `adaptive_attacks`: file names of the attacks adapted to the method, separated by commas, of which an evaluation
      needs one; or a sentence that explains why standard attacks are adaptive.
    - `supports_recipe`: parts of the recipe that the method implements: "label_smoothing" (its loss uses
      `batch.smoothing`), "bf16" and "fp16" (its forward passes may run in that precision). The planner rejects others.
    - `presets`: named sets of settings, selected by preset=NAME.
    - `recipe`: optimizer and schedule of the paper.
    """

    predictor: ClassVar[str] = "deterministic"
    adaptive_attacks: ClassVar[str] = ""
    supports_recipe: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    recipe: ClassVar[dict[str, Any]] = {}

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps made by one `step`; the learning-rate schedule counts them."""
        return 1

    @property
    def restored_older_weights(self) -> bool:
        """True if the last step restored an earlier checkpoint and trained nothing; weight averages restart from it."""
        return False

    def wrap(self, net: nn.Module) -> nn.Module:
        """Add layers or parameters before training. Must keep `net.head` and select layers by type, never by name."""
        return net

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        """Raise ValueError in one line (found, expected) for a network that the method cannot train.

        Called before training. `net` is wrapped, untrained, in eval mode, and discarded afterwards; `x` is one blank
        image (1 c h w).
        """

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups; `lr_scale` multiplies the recipe's learning rate, `weight_decay` replaces the recipe's."""
        return [{"params": list(net.parameters())}]

    def inner(self, net: nn.Module, batch: Batch) -> Any:
        """The inner maximization; its result is passed to `loss` as `adv`. Default: the clean images."""
        return batch.x

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Named scalar terms whose sum is minimized; each is logged."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def ascent_loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """What adversarial weight perturbation maximizes over the weights. Default: the loss."""
        return self.loss(net, batch, adv)

    def step(self, net: nn.Module, updater: Updater, batch: Batch) -> Losses:
        """One training step. Returns the terms of the loss as device tensors."""
        terms = self.loss(net, batch, self.inner(net, batch))
        updater.descend(terms)
        return terms

    def deploy(self, net: nn.Module) -> Classifier:
        """The classifier that is evaluated and attacked."""
        return Classifier(net)

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        """Scalars to log at the end of each epoch beside the terms (a learned sigma, for example)."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """State of the method that a checkpoint must hold beside weights and optimizer."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state to restore, got {sorted(state)}")
