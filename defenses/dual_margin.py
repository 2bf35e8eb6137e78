"""min_w E[ softplus(D(g) - s(u)) ], s = z_y - log sum_{j != y} exp z_j, g = grad s(u), D = max_{||d|| <= eps} -<d, g>

Dual-norm margin training, ours (margins to first order: Elsayed et al. 2018, arXiv 1803.05598; input gradients of
smooth nets: Rodriguez-Munoz et al. 2024, arXiv 2409.20139)

softplus(-s) is the cross-entropy, so the loss is the cross-entropy of the logits with z_y less D: that at the worst
point of the ball, were s linear. By convexity it is at least CE + eps ||grad CE||_* (`input_gradient_penalty`), which
is small wherever the cross-entropy is flat, however near the border. Under Linf with `box`, D = sum_i |g_i| min(eps,
room of pixel i towards 0 or 1 against the sign of g_i); else eps times the dual norm (Linf -> L1, L2 -> L2, L1 ->
Linf). Both are exact for a linear net of two classes. u = clip(x + eta d, 0, 1), d random in the ball: no adversarial
example is made. Smoothed labels are those of the cross-entropy with z_y less D. Use a smooth activation
(activation=silu): with ReLU the gradient at u says little of its neighborhood. Where BatchNorm trains, g holds the
batch's statistics constant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from bench.core.defense import Batch, Losses
from defenses._input_gradients import InputGradientTraining, input_gradient


@dataclass
class DualMargin(InputGradientTraining):
    """The cross-entropy after the largest fall of the margin to first order. 6F an image, 9F where BatchNorm trains."""

    revision: ClassVar[int] = 1

    eta: Annotated[float, Ge(0)] = 1.0
    """Radius of the random point u around the image, in units of eps; 0 is the image itself."""
    box: bool = True
    """Under Linf, count only the fall that stays within [0,1]."""

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy at u = `adv` (b c h w), with D taken from the logit of the label."""
        logits, gradient = input_gradient(net, adv, lambda z: margin_slope(z, batch.y))
        onehot = F.one_hot(batch.y, logits.shape[1])
        left = logits - self.fall(gradient, adv)[:, None] * onehot
        return {"ce": F.cross_entropy(left, batch.y, label_smoothing=batch.smoothing)}

    def fall(self, gradient: Tensor, u: Tensor) -> Tensor:
        """D(g), shape b: the largest fall of a linear function of this `gradient` from the images `u` within the ball
        around them."""
        if not (self.box and self.threat.norm == "Linf"):
            return self.threat.radius * self.threat.dual_norm(gradient)
        room = torch.where(gradient > 0, u, 1 - u).clamp_max(self.threat.radius)
        return (gradient.abs() * room).flatten(1).sum(1)


def margin_slope(logits: Tensor, y: Tensor) -> Tensor:
    """d s / d z, b k: 1 for the label y, and minus the softmax over the other classes for these."""
    onehot = F.one_hot(y, logits.shape[1])
    others = logits.masked_fill(onehot.bool(), -torch.inf).softmax(1)
    return onehot - others
