"""Gaussian noise at known sites of a deployed model: what an attack in closed form needs instead of draws."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.smoothing import Smoothed
from bench.core.stochastic import NoiseSource, noise_off, noise_sites
from bench.noise.injection import Site, on_weight
from bench.noise.layer_moments import ReluRule
from bench.noise.logit_moments import LogitMoments, Structure, logit_moments
from bench.noise.propagation import SiteVariance

if TYPE_CHECKING:
    from bench.noise.closed_form import ClosedFormTraining


class NoiseScale(nn.Module):
    """The scale s = softplus(rho) or exp(rho), a child of the network so that it is trained and stored with it."""

    rho: Tensor

    def __init__(self, sigma: float, learn: bool, param: Literal["softplus", "exp"] = "softplus") -> None:
        super().__init__()
        self.exp = param == "exp"
        rho = torch.tensor(math.log(sigma) if self.exp else sigma + math.log(-math.expm1(-sigma)))
        if learn:
            self.rho = nn.Parameter(rho)
        else:
            self.register_buffer("rho", rho)

    def sigma(self) -> Tensor:
        """s, a scalar in units of the quantity at the site."""
        return self.rho.exp() if self.exp else nn.functional.softplus(self.rho)


def constant_variance(sigma: Tensor) -> SiteVariance:
    """sigma^2 (a scalar) for every element, in the wider precision of sigma and of the quantity at the site."""
    return lambda z: (sigma * z.new_ones(())).square()


class KnownNoise(NamedTuple):
    """The net without its noise, and for each site the variance of the noise there."""

    net: nn.Module
    variances: Sequence[SiteVariance]
    sites: Sequence[Site]

    @property
    def on_weights(self) -> bool:
        """True if some of the noise is on weights."""
        return any(on_weight(site) for site in self.sites)

    def moments(self, x: Tensor, structure: Structure, rule: ReluRule, factor: float = 1.0) -> LogitMoments:
        """Moments of the logits for images `x` (b c h w) with `factor` times each standard deviation. Nothing is drawn.

        Raises ValueError naming a layer without a rule."""
        variances = [(lambda z, variance=variance: factor**2 * variance(z)) for variance in self.variances]
        with noise_off(self.net):
            return logit_moments(self.net, x, variances, self.sites, structure, rule)


class NoiseFreeDeployment(Classifier):
    """A net deployed without the noise of its training. `training_noise` keeps noise and loss for adaptive attacks."""

    def __init__(self, net: nn.Module, training: ClosedFormTraining) -> None:
        super().__init__(net)
        self.training_noise = training


def known_noise(model: nn.Module) -> KnownNoise | None:
    """The Gaussian noise of a deployed model (that of its training, where deployment removes it); None for a model
    without noise or with noise of an unknown kind."""
    if isinstance(model, NoiseFreeDeployment):
        return model.training_noise.known_noise(model.net)
    if not isinstance(model, Classifier) or not model.stochastic:
        return None
    variances, sites = list[SiteVariance](), list[Site]()
    if isinstance(model, Smoothed):
        variance = model.sigma**2
        variances, sites = [lambda image: image.new_full((), variance)], ["input"]
    for site in noise_sites(model.net):
        if site.source.enabled:
            variances.append(_variance_of(site.source))
            sites.append(site)
    return KnownNoise(model.net, variances, sites) if sites else None


def _variance_of(source: NoiseSource) -> SiteVariance:
    return lambda signal: source.std(signal).square()
