"""min_w E||f(x; z + s n) - onehot(y)||^2 - sum_j log Phi(d_j / sqrt q_j), n ~ N(0, I), in closed form

Noise-injection stochastic training (Arous et al. 2023, arXiv 2312.08877): Gaussian noise on the first layer's
pre-activation z in training only; its mean and variance are propagated analytically to the logits, and the loss has a
mean-squared-error term and a term on the probability that the true class wins. The noise-free network is deployed.

Known without the full text: the site, fixed or learnable s, moment propagation, a Laplace approximation at the ReLU,
the two ingredients of the loss, withdrawal of the noise. Reconstruction: everything else. The covariance S of the
logits is s^2 J J^T (`jacobian`: one random probe for its trace, one row for the strongest competitor), the same without
the gates (`ungated`), element-wise (`diag`), by backward recursion (`adjoint`) or from draws (`sampled`);
d_j = m_y - m_j, q_j = S_yy + S_jj - 2 S_yj; loss weights, one-hot targets on the logits, the floor of q_j and every
default but s = 0.6 are ours. Ours too, and off by default: several sites, noise relative to the signal there, noise
behind BatchNorm, other joint probabilities, and a bound of the expected cross-entropy.

Under relu=laplace the mean is the noise-free network and does not depend on s, so only misclassified samples can keep
a learned s up: d<term>_dsigma_<correct|wrong> in the log says so. Under relu=adf the mean that is trained is the noisy
network's, and withdrawing the noise can cost most of the accuracy: mc_mean_shift is what the noise moves the logits by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from bench.core.classifier import Classifier, frozen, keep_buffers
from bench.core.defense import Batch, Defense, Losses
from bench.core.rng import scope, seed
from bench.noise import logit_moments as cov
from bench.noise import losses as expected
from bench.noise.gaussian_noise import KnownNoise, NoiseFreeDeployment
from bench.noise.injection import Site, first_weight, signal_scale
from bench.noise.propagation import SiteVariance

PROBED = 64  # images of an epoch's last batch that the log looks at more closely
CHECK_DRAWS = 256  # of the noise for each of them, against which the closed form is held


class Noise(nn.Module):
    """The noise scales s = softplus(rho) or exp(rho), kept with the network so that they train and are stored with it:
    a scalar for one site, a vector for several."""

    rho: Tensor

    def __init__(
        self, sigma: float, learn: bool, param: Literal["softplus", "exp"] = "softplus", sites: int = 1
    ) -> None:
        super().__init__()
        self.exp = param == "exp"
        rho = torch.tensor(math.log(sigma) if self.exp else sigma + math.log(-math.expm1(-sigma)))
        rho = rho if sites == 1 else rho.expand(sites).clone()
        if learn:
            self.rho = nn.Parameter(rho)
        else:
            self.register_buffer("rho", rho)

    def sigma(self) -> Tensor:
        """s, scalar or one for each site, in units of the quantity there or (relative) of its standard deviation."""
        return self.rho.exp() if self.exp else nn.functional.softplus(self.rho)


@dataclass
class Noisy(Defense):
    """Closed-form noise injection. Costs 3 (1 + probes + rows) forward passes F in the default structure."""

    uses_threat: ClassVar[bool] = False
    predictor: ClassVar[str] = "deterministic"
    cost: ClassVar[str] = "3 (1 + probes + rows) F"
    adaptive_attacks: ClassVar[str] = "closed_form"
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = (
        "scale",
        "noise_at",
        "param",
        "sigma_lr",
        "draws",
        "joint",
        "w_ece",
        "check_every",
    )
    # the best form found on MNIST's validation images under AutoAttack (docs/findings/noisy.md) with a rate that decays
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "input": {"site": "input", "sigma": 1.5, "w_mse": 0.0, "probes": 0},
    }
    test_settings: ClassVar[dict[str, Any]] = {"sigma": 0.3}

    sigma: Annotated[float, Gt(0)] = 0.6
    """Noise standard deviation, in units of the quantity at the site (pixels in [0,1] at the input)."""
    learn_sigma: bool = False
    """Train s too, one for each site, at a rate of its own and without weight decay."""
    site: Literal["first", "input"] | list[int | Literal["input"]] = "first"
    """Where the noise enters: what the first convolution or linear layer puts out, the image, or a list of both kinds:
    numbers count these layers in running order from 0."""
    structure: Literal["jacobian", "diag", "adjoint", "ungated", "sampled"] = "jacobian"
    """Covariance of the logits: s^2 J J^T, element-wise variances, backward recursion over the gates, J with every
    activation's slope set to 1, or mean and covariance of draws."""
    rows: Annotated[int, Ge(0)] = 1
    """Strongest competitors in the probability term; 0 = all classes."""
    probes: Annotated[int, Ge(0)] = 1
    """Random probes for the trace in the squared error; 0 = exact. Where rows = 0 it is exact anyway."""
    relu: Literal["laplace", "adf"] = "laplace"
    """Moments behind an activation or max-pool in diag and adjoint: Laplace approximation (variance passes where the
    mean does) or exact ones."""
    target: Literal["logits", "softmax"] = "logits"
    """What the squared error compares with the one-hot label."""
    w_mse: Annotated[float, Ge(0)] = 1.0
    """Weight of the squared error."""
    w_prob: Annotated[float, Ge(0)] = 1.0
    """Weight of the probability term."""
    scale: Literal["absolute", "relative"] = "absolute"
    """Unit of sigma: that of the quantity at the site, or the standard deviation of each channel there in the batch."""
    noise_at: Literal["pre_bn", "post_bn"] = "pre_bn"
    """What a layer puts out, or what the BatchNorm that takes it makes of it."""
    param: Literal["softplus", "exp"] = "softplus"
    """How a learned s stays positive; exp makes its steps proportional to s."""
    sigma_lr: Annotated[float, Gt(0)] = 0.1
    """Learning rate of s relative to the weights'."""
    draws: Annotated[int, Ge(2)] = 16
    """Draws of the noise with structure=sampled."""
    joint: Literal["product", "min", "union"] = "product"
    """Probability to beat all rivals: product over them, the least (upper bound), or the union bound (lower bound)."""
    w_ece: Annotated[float, Ge(0)] = 0.0
    """Weight of an upper bound of the expected cross-entropy (costs a row for each class)."""
    check_every: Annotated[int, Ge(0)] = 2
    """Hold the closed form against 256 draws on 64 images at the end of every so many epochs; 0 = never."""

    def __post_init__(self) -> None:
        if self.relu == "adf" and self.structure not in ("diag", "adjoint"):
            raise ValueError("relu=adf needs propagated variances; use structure=diag or structure=adjoint")
        if self.w_mse == 0 and self.w_prob == 0 and self.w_ece == 0:
            raise ValueError("w_mse, w_prob and w_ece are all 0, so nothing is trained; set one above 0")
        if isinstance(self.site, list) and (not self.site or len(set(self.site)) < len(self.site)):
            raise ValueError(f"site is {self.site}; expected at least one layer and none twice")
        if any(isinstance(site, int) and site < 0 for site in self.site):
            raise ValueError(f"site is {self.site}; expected layers counted from 0")
        if self.noise_at == "post_bn" and "input" in self._sites:
            raise ValueError("noise_at=post_bn needs a layer, but the site is the input")
        self._last: Batch | None = None  # what the log looks at
        self._floored: Tensor | None = None  # share of pairs in the last step whose variance was at its floor

    @property
    def _full(self) -> bool:
        """Do the terms need the whole covariance?"""
        return self.w_ece > 0 or self.rows == 0 or (self.probes == 0 and self.w_mse > 0)

    @property
    def _sites(self) -> Sequence[Site]:
        return self.site if isinstance(self.site, list) else [self.site]

    def wrap(self, net: nn.Module) -> nn.Module:
        net.noise = Noise(self.sigma, self.learn_sigma, self.param, len(self._sites))
        return net

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        mean = self.moments(net, x).mean  # names a layer without a rule
        expected.competitors(mean, mean.argmax(1), self.rows)

    def param_groups(self, net: nn.Module) -> list[dict[str, Any]]:
        own = list(_noise(net).parameters())
        rest = [p for p in net.parameters() if not any(p is q for q in own)]
        return [{"params": rest}, *([{"params": own, "lr_scale": self.sigma_lr, "weight_decay": 0.0}] if own else [])]

    def moments(self, net: nn.Module, x: Tensor) -> cov.LogitMoments:
        """Moments of the logits `b k` for images `x` under the present noise; an attack may climb them too."""
        return self._moments(net, x, _noise(net).sigma())

    def _moments(self, net: nn.Module, x: Tensor, sigma: Tensor) -> cov.LogitMoments:
        variances, post_bn = self._variance_at(sigma), self.noise_at == "post_bn"
        return cov.logit_moments(
            net, x, variances, self._sites, self.structure, self.relu, draws=self.draws, post_bn=post_bn
        )

    def _variance_at(self, sigma: Tensor) -> list[SiteVariance]:
        scales = sigma.expand(len(self._sites)).unbind()

        def of(s: Tensor) -> SiteVariance:
            return lambda z: (s * signal_scale(z, self.scale)).square()

        return [of(s) for s in scales]

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        self._last = batch
        terms, q, _ = self._terms(net, batch.x, batch.y, _noise(net).sigma())
        self._floored = (q.detach() < expected.Q_MIN).float().mean()
        return {name: value.mean() for name, value in terms.items()}

    def _terms(
        self, net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, cov.LogitMoments]:
        """Weighted terms (each b), the pair variances q (r b) and the moments behind them."""
        moments = self._moments(net, x, sigma)
        rivals = expected.competitors(moments.mean, y, self.rows)
        covariance = moments.covariance() if self._full else None
        trace, q = self._variances(moments, covariance, y, rivals)
        terms = {}
        if self.w_mse:
            terms["mse"] = self.w_mse * expected.squared_error(moments.mean, trace, y, self.target)
        if self.w_prob:
            terms["prob"] = self.w_prob * expected.joint_loss(expected.log_win(moments.mean, q, y, rivals), self.joint)
        if covariance is not None and self.w_ece:
            terms["ece"] = self.w_ece * expected.cross_entropy_bound(moments.mean, covariance, y)
        return terms, q, moments

    def _variances(
        self, moments: cov.LogitMoments, covariance: Tensor | None, y: Tensor, rivals: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Trace in the squared error (b) and q of each rival (r b), from no more rows than the terms need."""
        mean = moments.mean
        if covariance is not None:
            return expected.trace(mean, covariance, self.target), expected.pair_variance(covariance, y, rivals)
        probes = cov.sign_rows(mean, self.probes if self.w_mse else 0)
        if self.target == "softmax":
            probes = expected.softmax_rows(mean, probes)
        pairs = expected.pair_rows(mean, y, rivals if self.w_prob else rivals[:, :0])
        variances = moments.quadratic(torch.cat([probes, pairs]))
        return variances[: len(probes)].mean(0), variances[len(probes) :]

    def deploy(self, net: nn.Module) -> Classifier:
        """The noise-free net, which still tells an adaptive attack what noise and which loss it was trained on."""
        return NoiseFreeDeployment(net, self)

    def known_noise(self, net: nn.Module) -> KnownNoise:
        """The noise at its present scales."""
        return KnownNoise(net, self._variance_at(_noise(net).sigma()), self._sites, self.noise_at == "post_bn")

    def closed_form_loss(self, net: nn.Module, x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, cov.Passes]:
        """The sum of the weighted terms for each image, with `factor` times the noise, and what it costs."""
        terms, _, moments = self._terms(net, x, y, factor * _noise(net).sigma())
        own = (self.probes if self.w_mse else 0) + (self.rows if self.w_prob else 0)
        rows = moments.mean.shape[1] if self._full else own
        return torch.stack(list(terms.values())).sum(0), cov.passes(self.structure, rows, draws=self.draws)

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        """At the end of an epoch, on 64 images of its last batch: sigma (sigma_0, ... of several sites), the norm of
        the first layer's weights, signal-to-noise ratio (standard deviations) at the first site, share of pairs whose
        variance is at its floor, d<term>_dsigma_<correct|wrong> (sums over the sites; they add up to the derivative of
        the loss), and every `check_every` epochs the closed form against draws (mc_...)."""
        sigma = _noise(net).sigma().detach()
        names = ["sigma"] if sigma.dim() == 0 else [f"sigma_{i}" for i in range(len(sigma))]
        found = dict(zip(names, sigma.reshape(-1), strict=True)) | {"w1_norm": first_weight(net).norm()}
        if self._last is None or self._floored is None:
            return found
        found["floor_hits"] = self._floored
        x, y = self._last.x[:PROBED], self._last.y[:PROBED]
        # random streams and buffers are left as they were: looking must not change what is trained
        with scope(seed("noisy", "log", self._last.epoch)), keep_buffers(net), torch.enable_grad():
            found |= self._pull(net, x, y, sigma)
            if self.check_every and (self._last.epoch + 1) % self.check_every == 0:
                with frozen(net):
                    found |= self._check(net, x, y, sigma)
        return found

    def _pull(self, net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """What pulls sigma up (negative) or down: its derivative of each term over samples that are right or wrong."""
        scales = sigma.clone().requires_grad_()
        terms, _, moments = self._terms(net, x, y, scales)
        noise = self._variance_at(sigma)[0](moments.sites[0]).mean().sqrt()
        found = {"snr": moments.sites[0].detach().std() / noise}
        right = moments.mean.argmax(1) == y
        for name, value in terms.items():
            for side, mask in (("correct", right), ("wrong", ~right)):
                (slope,) = torch.autograd.grad((value * mask).sum() / len(y), scales, retain_graph=True)
                found[f"d{name}_dsigma_{side}"] = slope.sum()
        return found

    def _check(self, net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """The closed form beside draws of the noise: relative error of the mean, relative distance of the noise-free
        logits from the mean, ratio of the traces, and the share of draws that win beside what the moments say of it."""
        variances, sites, post_bn = self._variance_at(sigma), self._sites, self.noise_at == "post_bn"
        with torch.no_grad():
            parts = [cov.draw_logits(net, x, variances, sites, 16, post_bn)[0] for _ in range(CHECK_DRAWS // 16)]
            drawn, plain = torch.cat(parts), net(x)
        mean, spread = drawn.mean(0), drawn.var(0).sum(1).mean()
        closed = self._moments(net, x, sigma)
        full = closed.covariance()
        rivals = expected.competitors(closed.mean, y, 0)
        wins = expected.log_win(closed.mean, expected.pair_variance(full, y, rivals), y, rivals)
        found = {}
        if rivals.shape[1] < 20:  # the integral takes for ever in 100 dimensions
            pairs = expected.pair_rows(closed.mean, y, rivals).transpose(0, 1)
            joint = expected.joint_probability(closed.mean, pairs @ full @ pairs.transpose(1, 2), y, rivals)
            found["mc_win_genz"] = joint.mean()
        return found | {
            "mc_mean_error": (closed.mean - mean).norm() / mean.norm(),
            "mc_mean_shift": (plain - mean).norm() / mean.norm(),
            "mc_trace_ratio": full.diagonal(dim1=1, dim2=2).sum(1).mean() / spread,
            "mc_win": (drawn.argmax(2) == y).float().mean(),
            "mc_win_product": expected.joint_loss(wins, "product").neg().exp().mean(),
            "mc_win_min": expected.joint_loss(wins, "min").neg().exp().mean(),
            "mc_win_union": (1 + wins.expm1().sum(0)).clamp_min(0).mean(),
        }


def _noise(net: nn.Module) -> Noise:
    found = net.noise
    assert isinstance(found, Noise)
    return found
