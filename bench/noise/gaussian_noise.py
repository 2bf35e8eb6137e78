"""Gaussian noise at known sites of a deployed model: what an attack in closed form needs instead of draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.smoothing import Smoothed
from bench.core.stochastic import Site, noise_off, noise_sites
from bench.noise.layer_moments import ReluRule
from bench.noise.logit_moments import LogitMoments, Passes, Structure, logit_moments
from bench.noise.propagation import Place, SiteVariance
from bench.noise.test_time_noise import on_weight


class KnownNoise(NamedTuple):
    """The net without its noise, and for each site the variance of the noise there (`post_bn`: as of `edit_sites`)."""

    net: nn.Module
    variances: Sequence[SiteVariance]
    sites: Sequence[Place]
    post_bn: bool = False

    @property
    def on_weights(self) -> bool:
        """Is there noise on weights?"""
        return any(on_weight(site) for site in self.sites)

    def moments(self, x: Tensor, structure: Structure, rule: ReluRule, factor: float = 1.0) -> LogitMoments:
        """Moments of the logits for images `x` (b c h w) with `factor` times each standard deviation. Nothing is drawn.

        Raises ValueError naming a layer without a rule."""
        variances = [_scaled(variance, factor) for variance in self.variances]
        with noise_off(self.net):
            return logit_moments(self.net, x, variances, self.sites, structure, rule, post_bn=self.post_bn)


class ClosedFormTraining(Protocol):
    """A defense that trains on a closed-form loss under noise which it withdraws when it deploys."""

    def known_noise(self, net: nn.Module) -> KnownNoise:
        """The noise of training at the scales that `net` has learnt."""

    def closed_form_loss(self, net: nn.Module, x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Passes]:
        """The loss of training for each image, shape b, with `factor` times each standard deviation; and its cost."""


class NoiseFreeDeployment(Classifier):
    """A net deployed without the noise of its training. `training` still knows noise and loss, for whoever attacks."""

    def __init__(self, net: nn.Module, training: ClosedFormTraining) -> None:
        super().__init__(net)
        self.training_noise = training


def known_noise(model: nn.Module) -> KnownNoise | None:
    """The Gaussian noise of a deployed model (that of its training, where deployment withdraws it); None for a model
    without noise, or whose noise is of a kind that it does not tell."""
    if isinstance(model, NoiseFreeDeployment):
        return model.training_noise.known_noise(model.net)
    if not isinstance(model, Classifier) or not model.stochastic:
        return None
    own = [site for site in noise_sites(model.net) if site.source.enabled]
    variances, sites = [_of(site) for site in own], list[Place](own)
    if isinstance(model, Smoothed):
        variances, sites = [_constant(model.sigma), *variances], ["input", *sites]
    return KnownNoise(model.net, variances, sites) if sites else None


def _of(site: Site) -> SiteVariance:
    return lambda signal: site.source.std(signal).square()


def _constant(sigma: float) -> SiteVariance:
    return lambda signal: signal.new_full((), sigma**2)


def _scaled(variance: Callable[[Tensor], Tensor], factor: float) -> SiteVariance:
    return lambda signal: factor**2 * variance(signal)
