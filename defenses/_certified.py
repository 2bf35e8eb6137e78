"""Training on a lower bound of every margin over the ball: what interval and linear bounds share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from bench.core.defense import Batch, Defense, Losses
from bench.noise.interval import Run, ball, margins, run
from bench.noise.logit_moments import fixed_batch_statistics


@dataclass
class CertifiedTraining(Defense):
    """Cross-entropy of the clean logits and of the worst ones that a bound leaves open, mixed by a schedule.

    A subclass says how the bound is computed. Where BatchNorm trains, bounds hold the batch's statistics constant.
    """

    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")

    kappa: Annotated[float, Ge(0), Le(1)] = 0.5
    """Weight of the clean cross-entropy after the ramp; it begins at 1."""
    ramp: Annotated[float, Gt(0), Le(1)] = 0.6
    """Share of training, from its start, over which eps rises from 0 and the weights change with it."""
    initial: Literal["small", "usual"] = "small"
    """Weights at the start: from N(0, 2 pi / n^2), n inputs a unit, or as the net has them."""

    def bounds(self, found: Run, y: Tensor, share: float) -> Tensor:
        """Lower bounds of z_y - z_j, shape b k, at this share of the ramp."""
        raise NotImplementedError(f"{type(self).__name__} must define bounds")

    def wrap(self, net: nn.Module) -> nn.Module:
        """Weights of convolutions and linear layers so small that a layer does not widen its box."""
        for layer in net.modules() if self.initial == "small" else ():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(layer.weight, std=math.sqrt(2 * math.pi) / layer.weight[0].numel())
        return net

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        with torch.no_grad():  # raises for a layer without bounds
            margins(run(net, ball(x, self.threat.radius)), x.new_zeros(1, dtype=torch.long), "crown")

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """The two weighted terms; on the ramp eps and the weight of the second rise together from 0."""
        share = min(batch.progress / self.ramp, 1.0)
        kappa = 1 - share * (1 - self.kappa)
        with fixed_batch_statistics(net, batch.x) as ordinary:
            logits = net(batch.x) if ordinary is None else ordinary
            found = run(net, ball(batch.x, share * self.threat.radius))
            worst = -self.bounds(found, batch.y, share)
        clean, bound = (F.cross_entropy(z, batch.y, label_smoothing=batch.smoothing) for z in (logits, worst))
        return {"clean": kappa * clean, "bound": (1 - kappa) * bound}
