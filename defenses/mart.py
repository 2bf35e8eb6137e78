"""min_w E[ BCE(p(x'), y) + beta * KL(p(x) || p(x')) * (1 - p_y(x)) ], BCE = -log p'_y - log(1 - max_{j != y} p'_j)

MART, misclassification-aware adversarial training (Wang et al. 2020, ICLR): a boosted cross-entropy on adversarial
images found by ascent on cross-entropy, and a divergence that weighs more where the clean image is misclassified.

Gradient flows through the weight 1 - p_y and through both arguments of KL, as in the released code, whose constants
(1.0001, 1.0000001, 1e-12) keep the logarithms finite; in KL ours are exact, where it has log(p' + 1e-12). Its clean and
adversarial batches are separate for BatchNorm; the attack runs in eval mode from a tiny normal start. Defaults are its
ResNet-18 setting (beta 5; WideResNet: beta 6, lr .1, decay 7e-4, 90 epochs), with 10 steps of .007 at eps .031. The
recipe drops the rate at half and three quarters; the code at epochs 75, 90 and 100 of 120.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import nn

from bench.core.adversarial_training import AdversarialTraining
from bench.core.defense import Batch, Losses
from bench.core.pgd import Start, kl


@dataclass
class MART(AdversarialTraining):
    """Boosted cross-entropy and weighted divergence. Costs 2 steps + 6 forward passes F an image."""

    cost: ClassVar[str] = "(2 steps + 6) F = 26F"
    revision: ClassVar[int] = 1
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.01,
        "weight_decay": 3.5e-3,
        "schedule": "step",
        "epochs": 120,
        "batch_size": 128,
    }

    beta: Annotated[float, Ge(0)] = 5.0
    """Weight of the divergence."""
    rel_step_size: Annotated[float, Gt(0)] = 0.22580645161290322
    """Step size in units of eps: .007 / .031."""
    start: Start = "normal"
    """First iterate: 0.001 N(0,1) around the image, uniform in the ball, or the image itself."""

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean boosted cross-entropy at `adv`, and beta times the mean weighted divergence."""
        clean, moved = net(batch.x), net(adv)
        true = batch.y[:, None]
        runner_up = moved.softmax(1).scatter(1, true, -1.0).amax(1)
        ce = F.cross_entropy(moved, batch.y, label_smoothing=batch.smoothing)
        boosted = ce - (1.0001 - runner_up + 1e-12).log().mean()
        doubt = 1.0000001 - clean.softmax(1).gather(1, true).squeeze(1)
        return {"bce": boosted, "kl": self.beta * (kl(clean, moved) * doubt).mean()}
