"""What `gat` and `nuat` share: one attack step that a distance of the outputs guides, and that distance in the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from bench.core.classifier import BatchNormMode, frozen
from bench.core.defense import Batch, Defense, Losses
from bench.core.pgd import ascend


@dataclass
class GuidedTraining(Defense):
    """Base of the two guided trainings (Sriramanan et al. 2020, 2021). A subclass defines `distance` and `weight`."""

    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    cost: ClassVar[str] = "8F to 9F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")

    start: Annotated[float, Ge(0), Le(1)] = 0.5
    """Bernoulli start of the attack: each pixel moves by this much, up or down, in units of eps."""
    alternate: bool = True
    """The distance guides every second attack only, from the second one on; the others maximize cross-entropy."""
    attack_bn_mode: BatchNormMode = "eval"
    """BatchNorm during the attack: running statistics (eval), batch statistics (train), or these with no trace left."""

    def __post_init__(self) -> None:
        self._attacks = 0

    def distance(self, clean: Tensor, moved: Tensor) -> Tensor:
        """How far the logits `moved` are from `clean` (b k each): a scalar, b times what the loss has."""
        raise NotImplementedError(f"{type(self).__name__} must define distance")

    def weight(self, progress: float) -> float:
        """Weight of the distance at this fraction of training."""
        raise NotImplementedError(f"{type(self).__name__} must define weight")

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """Images one step of eps from the Bernoulli start, in ball and box."""
        x, weight = batch.x, self.weight(batch.progress)
        guided = not self.alternate or self._attacks % 2 == 1
        self._attacks += 1
        start = self.start * self.threat.radius * (2 * torch.empty_like(x).bernoulli_(0.5) - 1)
        with frozen(net, self.attack_bn_mode) as target:
            with torch.no_grad():
                clean = target(x) if guided else None

            def objective(images: Tensor) -> Tensor:
                logits = target(images)
                ce = F.cross_entropy(logits, batch.y, reduction="sum")
                return ce if clean is None else ce + weight * self.distance(clean, logits)

            return ascend(objective, x, self.threat, steps=1, rel_step_size=1.0, start=start)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the clean images, and the weighted distance of the logits at `adv`, by image."""
        moved, clean = net(adv), net(batch.x)
        ce = F.cross_entropy(clean, batch.y, label_smoothing=batch.smoothing)
        share = self.weight(batch.progress) / len(batch.x)
        return {"ce": ce, "distance": share * self.distance(clean, moved)}

    def state_dict(self) -> dict[str, Tensor]:
        """The number of attacks, which says whose turn it is."""
        return {"attacks": torch.tensor(self._attacks)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self._attacks = int(state["attacks"])
