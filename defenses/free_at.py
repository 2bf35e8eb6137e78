"""min_w E[ max_{x' in B(x, eps)} CE(f(x'), y) ], weights and d both updated by each gradient of CE(f(x + d), y)

Free adversarial training (Shafahi et al. 2019, arXiv 1904.12843): every minibatch is replayed m times, and one backward
pass gives both the gradient that moves the weights and the one that moves the perturbation d <- Pi(d + eps sign g).

d persists from one minibatch to the next. Give the run 1/m of the usual epochs: one epoch here makes m updates a batch.
Projected onto the ball alone, d is clipped to [0,1] only where it meets an image, and the gradient is taken at the
clipped image; the released PyTorch code differentiates through the clip, so that d does not move where x + d leaves the
box. Attack and update share a pass, so BatchNorm is in train mode and d climbs the same soft labels, where the recipe
has them; fp16 is not supported, as the gradient of a step skipped for its overflow would reach d. The recipe is the
CIFAR-10 setting of that code, but for its cyclic schedule (schedule=cyclic).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from bench.core.defense import Batch, Defense, Losses, Updater


@dataclass
class FreeAT(Defense):
    """Replays with a perturbation that persists. Costs 3 forward passes F an image and replay."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    cost: ClassVar[str] = "3 replays F = 24F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16")
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.04,
        "weight_decay": 5e-4,
        "schedule": "one_cycle",
        "epochs": 10,
        "batch_size": 128,
    }
    test_settings: ClassVar[dict[str, Any]] = {"replays": 2}

    replays: Annotated[int, Gt(0)] = 8
    """Updates on each minibatch (m)."""
    rel_step_size: Annotated[float, Gt(0)] = 1.0
    """Step of the perturbation in units of eps."""

    def __post_init__(self) -> None:
        self._delta: Tensor | None = None

    @property
    def updates_per_batch(self) -> int:
        """One a replay, so that the schedule ends with the training."""
        return self.replays

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """The images under the present perturbation, in ball and box."""
        return self.threat.project_to_image(batch.x, batch.x + self._perturbation(batch.x))

    def _perturbation(self, x: Tensor) -> Tensor:
        """The first rows of what persists; zeros at first, or where the batch has outgrown it."""
        known = self._delta
        if known is None or known.shape[1:] != x.shape[1:] or len(known) < len(x):
            self._delta = known = torch.zeros_like(x)
        return known[: len(x)].to(x)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the adversarial images `adv`."""
        return {"ce": F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)}

    def step(self, net: nn.Module, updater: Updater, batch: Batch) -> Losses:
        """All replays of one minibatch; the terms are those of the last."""
        terms: Losses = {}
        for _ in range(self.replays):
            adv = self.inner(net, batch).requires_grad_()
            terms = self.loss(net, batch, adv)
            updater.descend(terms)  # its one backward pass reaches the images too
            if adv.grad is None:
                raise ValueError("the updater left no gradient at the images; free_at needs its backward pass")
            self._climb(adv.grad)
        return terms

    def _climb(self, grad: Tensor) -> None:
        assert self._delta is not None
        delta = self._delta.to(grad)
        step = self.rel_step_size * self.threat.radius * self.threat.steepest_direction(grad)
        moved = self.threat.project(delta[: len(grad)] + step)
        self._delta = torch.cat([moved, delta[len(grad) :]])

    def state_dict(self) -> dict[str, Tensor]:
        """The perturbation."""
        return {} if self._delta is None else {"delta": self._delta}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self._delta = state.get("delta")
