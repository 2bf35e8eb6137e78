"""min_w E[ alpha * CE(f(x), y) + (1 - alpha) * CE(f(x'), y) ], x' = x + eps * sign(grad_x CE(f(x), y))

Adversarial training on a mixture (Szegedy et al. 2014, arXiv 1312.6199; Goodfellow et al. 2015, arXiv 1412.6572): half
of the loss on clean images, half on adversarial ones, found by a single gradient step.

The defaults are Goodfellow's FGSM from the image itself; steps=10, rel_step_size=0.25, start=uniform make the inner
problem PGD (still no Madry training, which has no clean half). The single step overfits: at larger budgets a net learns
to mask its gradient (100 % against FGSM, 0 % against PGD). With the true label the step also leaks that label, hence
the other two choices (Kurakin et al. 2017, arXiv 1611.01236). Both halves share one BatchNorm batch if `joint`; the
first two papers are older than BatchNorm. Images are clipped to [0,1], which Goodfellow's formula leaves out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from bench.core.adversarial_training import AdversarialTraining
from bench.core.defense import Batch, Losses
from bench.core.pgd import Start, attack_loss


@dataclass
class ATMixture(AdversarialTraining):
    """Clean and adversarial images, half and half. Costs 2 steps + 6 forward passes F an image, 1 more to guess."""

    cost: ClassVar[str] = "(2 steps + 6) F = 8F"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {}

    alpha: Annotated[float, Ge(0), Le(1)] = 0.5
    """Weight of the clean images."""
    steps: Annotated[int, Gt(0)] = 1
    """Gradient steps of the inner maximization; 1 is FGSM."""
    rel_step_size: Annotated[float, Gt(0)] = 1.0
    """Step size in units of eps."""
    start: Start = "zero"
    """First iterate: the image itself, uniform in the ball, or 0.001 N(0,1) around the image."""
    joint: bool = True
    """Clean and adversarial images in one train-mode batch, with common BatchNorm statistics, or in two."""
    label: Literal["true", "pred", "least_likely"] = "true"
    """Leave the true label, leave the predicted one, or approach the one predicted least (the last two cost 1F)."""

    def objective(self, target: nn.Module, batch: Batch) -> Callable[[Tensor], Tensor]:
        """Cross-entropy to the chosen label; its negative for the least likely one, which the attack approaches."""
        if self.label == "true":
            return attack_loss("ce", batch.y)
        with torch.no_grad():
            logits: Tensor = target(batch.x)
        if self.label == "pred":
            return attack_loss("ce", logits.argmax(1))
        away = attack_loss("ce", logits.argmin(1))
        return lambda z: -away(z)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Weighted mean cross-entropy on the clean and on the adversarial images."""
        if self.joint:
            clean, moved = net(torch.cat([batch.x, adv])).chunk(2)
        else:
            clean, moved = net(batch.x), net(adv)
        ce, ce_adv = (F.cross_entropy(z, batch.y, label_smoothing=batch.smoothing) for z in (clean, moved))
        return {"ce": self.alpha * ce, "ce_adv": (1 - self.alpha) * ce_adv}
