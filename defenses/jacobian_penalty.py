"""min_w E[ ||f(x) - onehot(y)||^2 + lam * ||J(x)||_F^2 ], J = d logits / d z

Jacobian regularization (Hoffman et al. 2019, arXiv 1908.02729; double backpropagation: Drucker and LeCun 1992): a net
whose logits move little when the image, or the first pre-activation z, is nudged in any direction.

The control of closed-form noise injection: with lam = sigma^2 this is the squared-error term of `noisy` with its
Jacobian covariance, noise of fixed sigma, and no probability term. The paper has cross-entropy (fit=ce), lam / 2 and
unit-norm probes at the image. Here random signs estimate the norm without bias, or all K rows give it exactly. Where
BatchNorm trains, J holds the batch's statistics constant, in a second pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from annotated_types import Ge
from torch import nn

from bench.core.defense import Batch, Defense, Losses
from bench.noise.logit_moments import jacobian_moments, sign_rows, unit_rows


@dataclass
class JacobianPenalty(Defense):
    """Error and squared Jacobian. Costs 3 (probes + 1) forward passes F an image, 3 more where BatchNorm trains."""

    uses_threat: ClassVar[bool] = False
    cost: ClassVar[str] = "3 (probes + 1) F = 6F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {"lam": 0.1}

    lam: Annotated[float, Ge(0)] = 0.36
    """Weight of the penalty: the variance of the equivalent noise, in squared units of z (`noisy`: .6^2)."""
    site: Literal["first", "input"] = "first"
    """What J differentiates by: the pre-activation of the first convolution or linear layer, or the image."""
    probes: Annotated[int, Ge(0)] = 1
    """Random sign vectors that estimate ||J||_F^2; 0 takes all K rows."""
    fit: Literal["squared", "ce"] = "squared"
    """What the penalty is added to: squared error of the logits from one-hot labels, or cross-entropy."""

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean fit, and lam times the mean (estimated) squared norm of the Jacobian."""
        moments = jacobian_moments(net, batch.x, [lambda z: z.new_ones(())], [self.site])
        logits = moments.mean
        if self.probes:
            norm = moments.quadratic(sign_rows(logits, self.probes)).mean(0)
        else:
            norm = moments.quadratic(unit_rows(logits)).sum(0)
        if self.fit == "ce":
            fit = F.cross_entropy(logits, batch.y)
        else:
            fit = (logits - F.one_hot(batch.y, logits.shape[1])).square().sum(1).mean()
        return {"fit": fit, "jacobian": self.lam * norm.mean()}
