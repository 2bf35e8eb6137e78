"""x' = clip(x + eps * argmax_{||d|| <= 1} <grad_x CE(f(x), y), d>)

Fast gradient sign method (Goodfellow et al. 2015, arXiv 1412.6572): one step of full length from the clean image; the
sign of the gradient for Linf, the normalized gradient for L2.

A weak attack: low accuracy under PGD with high accuracy under FGSM indicates catastrophic overfitting, so its
column is a diagnosis and never a claim of robustness.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.pgd import ascend, attack_loss


@dataclass
class FGSM(Attack):
    """One gradient step of length eps. Costs 2 passes an image."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    cost: ClassVar[str] = "4F"
    revision: ClassVar[int] = 1

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """The single step of steepest ascent on cross-entropy."""
        objective = attack_loss("ce", y)
        return ascend(lambda z: objective(model(z)), x, self.threat, steps=1, rel_step_size=1.0, start="zero"), {}
