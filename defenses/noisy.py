"""min_w E||f(x; z + s n) - onehot(y)||^2 - sum_j log Phi(d_j / sqrt q_j), n ~ N(0, I), in closed form

Noise-injection stochastic training (Arous et al. 2023, arXiv 2312.08877): Gaussian noise of scale s on the first
layer's pre-activation z, in training only. Mean m and covariance S of the logits are propagated analytically. The loss
is the expected squared error ||m - onehot(y)||^2 + tr S and the negative log-probability that the true class y beats
its rivals j, with d_j = m_y - m_j and q_j = S_yy + S_jj - 2 S_yj. The noise-free network is deployed.

From the abstract alone: the site, fixed or learnable s, moment propagation, a Laplace approximation at the ReLU, the
two terms of the loss, removal of the noise. Everything else is a reconstruction: S = s^2 J J^T with the noise-free
Jacobian J (`jacobian`; one random probe for its trace, one row for the strongest rival), element-wise variances
(`diag`) or their backward recursion (`adjoint`); the loss weights, one-hot targets on the logits, the floor of q_j and
every default but s = 0.6.

The Laplace approximation has two readings. The density of a rectified N(m, v), truncated at 0, has its mode at
max(m, 0) and second log-derivative -1/v there, so the literal reading of the source is N(max(m, 0), v): the variance
passes whole (`ungated`). The default structures take the more generous one, N(max(m, 0), v 1[m > 0]): an inactive unit
passes none, as in first-order propagation.

With rows < K - 1 the probability term speaks of the chosen rivals alone; with all it is -log of the product of the
pairs' probabilities, which is that of winning only if the pairs are independent.

The mean m is that of the noise-free network in each structure and does not depend on s, so only misclassified images
can keep a learned s up: d<term>_dsigma_<correct|wrong> in the log (bench.noise.diagnostics) measures it. The
settings of the noise and its removal are in bench.noise.closed_form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor, nn

from bench.noise import losses
from bench.noise.closed_form import ClosedFormTraining, scale
from bench.noise.logit_moments import LogitMoments


@dataclass
class Noisy(ClosedFormTraining):
    """Closed-form noise injection. Costs 3 (1 + probes + rows) forward passes F in the default structure."""

    cost: ClassVar[str] = "3 (1 + probes + rows) F"
    revision: ClassVar[int] = 1
    # best on MNIST's validation images under AutoAttack (docs/findings/noisy.md), with a learning rate that decays
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "input": {"site": "input", "sigma": 1.5, "w_mse": 0.0, "probes": 0},
    }

    rows: Annotated[int, Ge(0)] = 1
    """Strongest rivals in the probability term; 0 = all classes."""
    probes: Annotated[int, Ge(0)] = 1
    """Random probes for the trace in the squared error; 0 = exact. With rows = 0 it is exact anyway."""
    target: Literal["logits", "softmax"] = "logits"
    """What the squared error compares with the one-hot label."""
    w_mse: Annotated[float, Ge(0)] = 1.0
    """Weight of the squared error."""
    w_prob: Annotated[float, Ge(0)] = 1.0
    """Weight of the probability term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.w_mse == 0 and self.w_prob == 0:
            raise ValueError("w_mse and w_prob are both 0, so nothing is trained; set one above 0")

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        mean = self.moments(net, x, scale(net)).mean  # raises for a layer without a moment rule
        losses.competitors(mean, mean.argmax(1), self.rows)

    def terms(
        self, net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, LogitMoments]:
        """The weighted squared error and -sum_j log Phi (b each), q of each rival (r b), and the moments."""
        moments = self.moments(net, x, sigma)
        mean, rivals = moments.mean, losses.competitors(moments.mean, y, self.rows)
        if self._needs_all:
            trace, q = losses.exact_variances(moments, y, rivals, self.target)
        else:  # only the rows of S that the terms need
            needed, probes = (rivals if self.w_prob else rivals[:, :0]), (self.probes if self.w_mse else 0)
            trace, q = losses.probed_variances(moments, y, needed, self.target, probes)
        terms = {}
        if self.w_mse:
            terms["mse"] = self.w_mse * losses.squared_error(mean, trace, y, self.target)
        if self.w_prob:
            terms["prob"] = self.w_prob * -losses.log_win(mean, q, y, rivals).sum(0)
        return terms, q, moments

    @property
    def _needs_all(self) -> bool:
        """True if the terms need the whole covariance."""
        return self.rows == 0 or (self.probes == 0 and self.w_mse > 0)

    def covariance_rows(self, classes: int) -> int:
        """All, or one for each probe and rival that a term uses."""
        used = (self.probes if self.w_mse else 0) + (self.rows if self.w_prob else 0)
        return classes if self._needs_all else used
