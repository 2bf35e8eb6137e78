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
max(m, 0) and second log-derivative -1/v there, so the literal reading is N(max(m, 0), v): the variance passes whole
(`ungated`). The default structures read it as N(max(m, 0), v 1[m > 0]): an inactive unit passes none.

The mean m is that of the noise-free network in each structure and does not depend on s, so only misclassified images
can keep a learned s up: d<term>_dsigma_<correct|wrong> in the log (bench.noise.diagnostics) measures it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.defense import Batch, Defense, Losses
from bench.noise import diagnostics, losses
from bench.noise.gaussian_noise import KnownNoise, NoiseFreeDeployment, NoiseScale, constant_variance
from bench.noise.injection import first_weight
from bench.noise.logit_moments import LogitMoments, Passes, logit_moments, passes


@dataclass
class Noisy(Defense):
    """Closed-form noise injection. Costs 3 (1 + probes + rows) forward passes F in the default structure."""

    uses_threat: ClassVar[bool] = False
    predictor: ClassVar[str] = "deterministic"
    cost: ClassVar[str] = "3 (1 + probes + rows) F"
    adaptive_attacks: ClassVar[str] = "closed_form"
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = (
        "scale", "noise_at", "param", "sigma_lr", "draws", "joint", "w_ece", "check_every",
    )  # fmt: skip
    retired_settings: ClassVar[dict[str, Any]] = {
        "relu": "laplace", "scale": "absolute", "noise_at": "pre_bn", "draws": 16, "joint": "product", "w_ece": 0.0,
    }  # fmt: skip
    retired_results: ClassVar[str] = "docs/findings/noisy.md"
    # best on MNIST's validation images under AutoAttack (docs/findings/noisy.md), with a learning rate that decays
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "input": {"site": "input", "sigma": 1.5, "w_mse": 0.0, "probes": 0},
    }
    test_settings: ClassVar[dict[str, Any]] = {"sigma": 0.3}

    sigma: Annotated[float, Gt(0)] = 0.6
    """Noise standard deviation s, in units of the quantity at the site (pixels in [0,1] at the input)."""
    learn_sigma: bool = False
    """Train s too, with a learning rate of its own and without weight decay."""
    site: Literal["first", "input"] = "first"
    """Where the noise enters: the output of the first convolution or linear layer, or the image."""
    structure: Literal["jacobian", "diag", "adjoint", "ungated"] = "jacobian"
    """Covariance of the logits: s^2 J J^T, element-wise variances, their backward recursion, or that recursion with
    every activation's slope set to 1 (the literal Laplace reading)."""
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
    param: Literal["softplus", "exp"] = "softplus"
    """How a learned s stays positive; exp makes its steps proportional to s."""
    sigma_lr: Annotated[float, Gt(0)] = 0.1
    """Learning rate of s relative to that of the weights."""
    check_every: Annotated[int, Ge(0)] = 2
    """Compare the closed form with 256 noise draws on 64 images at the end of every so many epochs; 0 = never."""

    def __post_init__(self) -> None:
        if self.w_mse == 0 and self.w_prob == 0:
            raise ValueError("w_mse and w_prob are both 0, so nothing is trained; set one above 0")
        self._last: Batch | None = None  # the images of the log
        self._floored: Tensor | None = None  # share of rivals in the last step whose variance q is at its floor

    def wrap(self, net: nn.Module) -> nn.Module:
        net.noise = NoiseScale(self.sigma, self.learn_sigma, self.param)
        return net

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        mean = self.moments(net, x, _sigma(net)).mean  # raises for a layer without a moment rule
        losses.competitors(mean, mean.argmax(1), self.rows)

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        own = list(net.noise.parameters())  # type: ignore[union-attr]
        rest = [p for p in net.parameters() if not any(p is q for q in own)]
        return [{"params": rest}, *([{"params": own, "lr_scale": self.sigma_lr, "weight_decay": 0.0}] if own else [])]

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        terms, q, _ = self.terms(net, batch.x, batch.y, _sigma(net))
        self._last, self._floored = batch, (q.detach() < losses.Q_MIN).float().mean()
        return {name: value.mean() for name, value in terms.items()}

    def terms(
        self, net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, LogitMoments]:
        """The weighted terms of the loss (b each) at noise scale `sigma`, q of each rival (r b), and the moments."""
        moments = self.moments(net, x, sigma)
        mean, rivals = moments.mean, losses.competitors(moments.mean, y, self.rows)
        if self._full:
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
    def _full(self) -> bool:
        """Do the terms need the whole covariance?"""
        return self.rows == 0 or (self.probes == 0 and self.w_mse > 0)

    def moments(self, net: nn.Module, x: Tensor, sigma: Tensor) -> LogitMoments:
        """Moments of the logits of images `x` (b c h w) at noise scale `sigma`."""
        return logit_moments(net, x, [constant_variance(sigma)], [self.site], self.structure)

    def deploy(self, net: nn.Module) -> Classifier:
        """The noise-free net, which still gives an adaptive attack the noise and the loss of its training."""
        return NoiseFreeDeployment(net, self)

    def known_noise(self, net: nn.Module) -> KnownNoise:
        """The noise at its present scale."""
        return KnownNoise(net, [constant_variance(_sigma(net))], [self.site])

    def closed_form_loss(self, net: nn.Module, x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Passes]:
        """The sum of the weighted terms for each image (b) with `factor` times the noise, and its cost."""
        terms, _, moments = self.terms(net, x, y, factor * _sigma(net))
        own = (self.probes if self.w_mse else 0) + (self.rows if self.w_prob else 0)
        rows = moments.mean.shape[1] if self._full else own
        return torch.stack(list(terms.values())).sum(0), passes(self.structure, rows)

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        """sigma and ||W1|| at the end of an epoch; after a step also floor_hits and bench.noise.diagnostics."""
        found = {"sigma": _sigma(net).detach(), "w1_norm": first_weight(net).norm()}
        if self._last is None or self._floored is None:
            return found
        draws = self.check_every > 0 and (self._last.epoch + 1) % self.check_every == 0
        return found | {"floor_hits": self._floored} | diagnostics.measure(self, net, self._last, found["sigma"], draws)


def _sigma(net: nn.Module) -> Tensor:
    assert isinstance(net.noise, NoiseScale)
    return net.noise.sigma()
