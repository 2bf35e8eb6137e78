"""min_w E[ CE(f(u), y) + strength * eps * ||grad_u CE(f(u), y)||_* ]

Input gradient penalty (Rodriguez-Munoz et al. 2024, arXiv 2409.20139; double backpropagation: Drucker and LeCun 1992):
a net whose loss hardly rises within the ball, to first order; the norm is the dual one (Linf -> L1, L2 -> L2, L1 ->
Linf).

At u = x (`eta` 0, the default) this is the paper's objective under Linf, its free weight of ||.||_1 written as strength
* eps, and with strength 1 that of `robust_training` with variant=penalty. `eta` above 0 takes it at u = clip(x + eta d,
0, 1), d random in the ball. The paper's finding is about smooth activations (activation=silu): with ReLU the penalty
says little of the neighborhood. The penalty knows no box. The norm is taken image by image, and holds the batch's
statistics constant where BatchNorm trains, in a second pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from torch import nn

from bench.core.defense import Batch, Losses
from defenses._input_gradients import InputGradientTraining, penalized_cross_entropy


@dataclass
class InputGradientPenalty(InputGradientTraining):
    """Cross-entropy and the dual norm of its input gradient. Costs 6F an image, 9F where BatchNorm trains."""

    revision: ClassVar[int] = 1

    eta: Annotated[float, Ge(0)] = 0.0
    """Radius of the random point u around the image, in units of eps; 0 is the image itself."""
    strength: Annotated[float, Ge(0)] = 1.0
    """Weight of the penalty in units of eps: 1 is the first-order worst case in the ball."""

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy at u = `adv` (b c h w), and the weighted mean norm of its gradient there."""
        return penalized_cross_entropy(net, batch, adv, self.threat, self.strength)
