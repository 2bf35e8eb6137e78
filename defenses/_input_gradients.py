"""What `dual_margin`, `input_gradient_penalty` and `robust_training` share: training on a gradient by the image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from bench.core.defense import Batch, Defense, Losses
from bench.core.threat import Threat
from bench.noise.logit_moments import jacobian_moments


@dataclass
class InputGradientTraining(Defense):
    """Base of the defenses whose loss holds an input gradient, at a random point near each image.

    6F an image: a forward pass, the gradient, and the backward pass through both; 9F where BatchNorm trains.
    """

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    cost: ClassVar[str] = "6F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")

    eta: Annotated[float, Ge(0)] = 1.0
    """Radius of the random point u around the image, in units of eps; 0 is the image itself."""

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """u = clip(x + eta d, 0, 1), d uniform in the cube of side 2 eps (Linf), else a random direction times
        U(0, eps)."""
        if not self.eta:
            return batch.x
        return (batch.x + self.eta * self.threat.sample(batch.x)).clamp(0, 1)


def input_gradient(net: nn.Module, x: Tensor, slope: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Logits z (b k), and the gradient by the images `x` (b c h w) of the function of z whose own is `slope(z)` (b k).

    Both with their graph, at least in float32. Where BatchNorm trains, the gradient holds the batch's statistics
    constant, in a second pass: through live ones the gradient of a sum over the batch mixes images.
    """
    moments = jacobian_moments(net, x, [lambda z: z.new_ones(())], ["input"])
    ((gradient, _),) = moments.pieces(slope(moments.mean)[None])  # the chain rule: one product with the Jacobian
    return moments.mean, gradient[0]


def penalized_cross_entropy(net: nn.Module, batch: Batch, x: Tensor, threat: Threat, strength: float = 1.0) -> Losses:
    """CE(f(x), y), and strength eps times the mean dual norm of its gradient by the images `x`, taken image by image.

    Only the first has smoothed labels: the adversary keeps the true one."""
    logits, gradient = input_gradient(net, x, lambda z: z.softmax(1) - F.one_hot(batch.y, z.shape[1]))
    ce = F.cross_entropy(logits, batch.y, label_smoothing=batch.smoothing)
    return {"ce": ce, "penalty": strength * threat.radius * threat.dual_norm(gradient).mean()}
