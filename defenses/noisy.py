"""min_w E||f(x; z + s n) - onehot(y)||^2 - sum_j log Phi(d_j / sqrt q_j), n ~ N(0, I), in closed form

Noise-injection stochastic training (Arous et al. 2023, arXiv 2312.08877): Gaussian noise on the first layer's
pre-activation z in training only; its mean and variance are propagated analytically to the logits, and the loss has a
mean-squared-error term and a term on the probability that the true class wins. The noise-free network is deployed.

Known without the full text: the site, fixed or learnable s, moment propagation, a Laplace approximation at the ReLU,
the two ingredients of the loss, withdrawal of the noise. Reconstruction: everything else. The covariance S of the
logits is s^2 J J^T (`jacobian`: one random probe for its trace, one row for the strongest competitor), element-wise
(`diag`) or by backward recursion (`adjoint`); d_j = m_y - m_j, q_j = S_yy + S_jj - 2 S_yj; loss weights, one-hot
targets on the logits, the floor of q_j and every default but s = 0.6 are ours.

Under relu=laplace the mean is the noise-free network and does not depend on s, so only misclassified samples can keep
a learned s up. Under relu=adf the mean that is trained is the noisy network's, and withdrawing the noise can cost
most of the accuracy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from bench.core import covariance as cov
from bench.core.defense import Batch, Defense, Terms


class Noise(nn.Module):
    """The noise scale s = softplus(rho), kept with the network so that it trains and is stored with it."""

    rho: Tensor

    def __init__(self, sigma: float, learn: bool) -> None:
        super().__init__()
        rho = torch.tensor(sigma + math.log(-math.expm1(-sigma)))  # the inverse of softplus
        if learn:
            self.rho = nn.Parameter(rho)
        else:
            self.register_buffer("rho", rho)

    def sigma(self) -> Tensor:
        """s, a scalar in units of the quantity at the site."""
        return nn.functional.softplus(self.rho)


@dataclass
class Noisy(Defense):
    """Closed-form noise injection. Costs 3 (1 + probes + rows) forward passes F in the default structure."""

    uses_threat: ClassVar[bool] = False
    deploys: ClassVar[str] = "deterministic"
    passes: ClassVar[str] = "3 (1 + probes + rows) F"
    revision: ClassVar[int] = 1
    smoke: ClassVar[dict[str, Any]] = {"sigma": 0.3}

    sigma: Annotated[float, Gt(0)] = 0.6
    """Noise standard deviation, in units of the quantity at the site (pixels in [0,1] at the input)."""
    learn_sigma: bool = False
    """Train s = softplus(rho) too, at a tenth of the learning rate and without weight decay."""
    site: Literal["first", "input"] = "first"
    """Where the noise enters: pre-activation of the first convolution or linear layer, or the image."""
    structure: Literal["jacobian", "diag", "adjoint"] = "jacobian"
    """Covariance of the logits: s^2 J J^T, element-wise variances, or backward recursion over the gates."""
    rows: Annotated[int, Ge(0)] = 1
    """Strongest competitors in the probability term; 0 = all classes."""
    probes: Annotated[int, Ge(0)] = 1
    """Random probes for the trace in the squared error; 0 = exact. Where rows = 0 it is exact anyway."""
    relu: Literal["laplace", "adf"] = "laplace"
    """Moments behind a ReLU or max-pool: Laplace approximation (variance passes where the mean does) or exact ones."""
    target: Literal["logits", "softmax"] = "logits"
    """What the squared error compares with the one-hot label."""
    w_mse: Annotated[float, Ge(0)] = 1.0
    """Weight of the squared error."""
    w_prob: Annotated[float, Ge(0)] = 1.0
    """Weight of the probability term."""

    def __post_init__(self) -> None:
        if self.structure == "jacobian" and self.relu == "adf":
            raise ValueError("relu=adf needs propagated variances; use structure=diag or structure=adjoint")
        if self.w_mse == 0 and self.w_prob == 0:
            raise ValueError("w_mse and w_prob are both 0, so nothing is trained; set one above 0")
        self._signal: Tensor | None = None  # std of the noise-free quantity at the site in the last step

    def wrap(self, net: nn.Module) -> nn.Module:
        net.noise = Noise(self.sigma, self.learn_sigma)
        return net

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        if self.rows >= classes:
            raise ValueError(f"rows={self.rows}, but {classes} classes leave {classes - 1} competitors; use 0 for all")
        self.moments(net, x)  # names a layer without a rule

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        own = list(_noise(net).parameters())
        rest = [p for p in net.parameters() if not any(p is q for q in own)]
        return [{"params": rest}, *([{"params": own, "lr_scale": 0.1, "weight_decay": 0.0}] if own else [])]

    def moments(self, net: nn.Module, x: Tensor) -> cov.LogitMoments:
        """Moments of the logits `b k` for images `x` under the present noise; an attack may climb them too."""
        noise = _noise(net)
        return cov.logit_moments(net, x, lambda z: noise.sigma().square(), self.site, self.structure, self.relu)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Terms:
        moments = self.moments(net, batch.x)
        classes = moments.mean.shape[1]
        if self.rows >= classes:
            raise ValueError(f"rows={self.rows}, but {classes} classes leave {classes - 1} competitors; use 0 for all")
        self._signal = moments.site.detach().std()
        rivals = cov.competitors(moments.mean, batch.y, self.rows)
        trace, q = self._variances(moments, batch.y, rivals)
        terms: Terms = {}
        if self.w_mse:
            terms["mse"] = self.w_mse * cov.squared_error(moments.mean, trace, batch.y, self.target).mean()
        if self.w_prob:
            terms["prob"] = -self.w_prob * cov.log_win(moments.mean, q, batch.y, rivals).sum(0).mean()
        return terms

    def _variances(self, moments: cov.LogitMoments, y: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
        """Trace in the squared error (b) and q of each rival (r b), from no more rows than the terms need."""
        mean = moments.mean
        if self.rows == 0 or (self.probes == 0 and self.w_mse):
            full = moments.covariance()
            return cov.trace(mean, full, self.target), cov.pair_variance(full, y, rivals)
        probes = cov.sign_rows(mean, self.probes if self.w_mse else 0)
        if self.target == "softmax":
            probes = cov.softmax_rows(mean, probes)
        pairs = cov.pair_rows(mean, y, rivals if self.w_prob else rivals[:, :0])
        variances = moments.quadratic(torch.cat([probes, pairs]))
        return variances[: len(probes)].mean(0), variances[len(probes) :]

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        sigma = _noise(net).sigma().detach()
        found = {"sigma": sigma, "w1_norm": cov.first_weight(net).norm()}
        return found if self._signal is None else {**found, "snr": self._signal / sigma}


def _noise(net: nn.Module) -> Noise:
    found = net.noise
    assert isinstance(found, Noise)
    return found
