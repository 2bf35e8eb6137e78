"""min_w E_B[ (sum_i CE(f(x_i), y_i) + lam * ||f(X') - f(X)||_*) / b ], ||A||_* = sum of singular values of A (b k)

Nuclear-norm adversarial training (Sriramanan et al. 2021, NeurIPS): the logits of a minibatch and of its adversarial
images differ by a matrix of small nuclear norm. X' = Pi(X + D + eps sign(grad)) maximizes the cross-entropy at X + D
and lam ||f(X + D) - f(X)||_* in one step from Bernoulli noise D of eps / 2.

From the released code for CIFAR-10: the norm is divided by the number of images b, as the cross-entropy is (so that lam
belongs to a batch of 64: the norm of b like rows grows as the root of b); lam rises from 0 to 4.5 at 90 % of training,
and stays; every second attack maximizes cross-entropy alone; the attack is in eval mode, the two passes of the loss are
in train mode, so the statistics move twice a step, at the adversarial images first; the gradient flows through both.
Ours: lam rises with every step, not with every epoch; the clean logits of the attack are in eval mode too, and taken
only where they guide it (the code has them in train mode, and moves the statistics a third time); attacks alternate
through all of training, not anew in each epoch. The recipe is that code's but for its schedule, a peak at 40 % and
drops near the end; its weight average is the recipe's `average`. The two-step and hybrid forms are not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from defenses._guided import GuidedTraining


@dataclass
class NuAT(GuidedTraining):
    """Cross-entropy and nuclear norm. Costs 8 forward passes F an image, 9 where the norm guides the step."""

    revision: ClassVar[int] = 1
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "one_cycle",
        "epochs": 100,
        "batch_size": 64,
    }

    lam: Annotated[float, Ge(0)] = 4.5
    """Weight of the nuclear norm at the end of its rise."""
    ramp: Annotated[float, Ge(0), Le(1)] = 0.9
    """Fraction of training in which the weight rises linearly from 0; 0 = constant."""

    def distance(self, clean: Tensor, moved: Tensor) -> Tensor:
        """The nuclear norm of the difference."""
        return torch.linalg.matrix_norm(moved - clean, ord="nuc")

    def weight(self, progress: float) -> float:
        return self.lam * (min(progress / self.ramp, 1.0) if self.ramp else 1.0)
