"""min_w E[ CE(f(x), y) + lam * ||p(x') - p(x)||_2^2 ], p = softmax f

Guided adversarial training (Sriramanan et al. 2020, NeurIPS, arXiv 2011.14969): the squared distance of the
probabilities guides one attack step and is minimized with the clean loss. x' = Pi(x + d + eps sign(grad)) maximizes
CE(f(x + d), y) + lam ||p(x + d) - p(x)||^2 from Bernoulli noise d of eps / 2.

From the released code for CIFAR-10: lam is 10, and 40 once 86 of 100 epochs are over; every second attack maximizes
cross-entropy alone; the attack is in eval mode, the two passes of the loss are in train mode, so the statistics move
twice a step, at the adversarial images first; the gradient flows through both. Its MNIST code (eps .3) is preset=mnist:
noise of eps, each attack guided, lam 15, and 45 from epoch 26 of 50. Ours: the clean probabilities of the attack are in
eval mode too, and taken only where they guide it (the code has them in train mode, and moves the statistics a third
time); attacks alternate through all of training, not anew in each epoch. The recipe is that code's, but that the rate
drops at half and three quarters of training, not after 71 and 86 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Le
from torch import Tensor

from defenses._guided import GuidedTraining


@dataclass
class GAT(GuidedTraining):
    """Clean loss and guided smoothness. Costs 8 forward passes F an image, 9 where the distance guides the step."""

    revision: ClassVar[int] = 1
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mnist": {"start": 1.0, "alternate": False, "lam": 15.0, "late_factor": 3.0, "late_from": 0.52},
    }
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "step",
        "epochs": 100,
        "batch_size": 64,
    }

    lam: Annotated[float, Ge(0)] = 10.0
    """Weight of the squared distance."""
    late_factor: Annotated[float, Ge(0)] = 4.0
    """What multiplies the weight late in training."""
    late_from: Annotated[float, Ge(0), Le(1)] = 0.86
    """Fraction of training after which it does; 1 = never."""

    def distance(self, clean: Tensor, moved: Tensor) -> Tensor:
        """The squared distance of the probabilities, summed over the images."""
        return (moved.softmax(1) - clean.softmax(1)).square().sum()

    def weight(self, progress: float) -> float:
        return self.lam * (self.late_factor if progress >= self.late_from else 1.0)
