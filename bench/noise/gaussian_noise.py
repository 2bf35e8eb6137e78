"""Gaussian noise at known sites of a deployed model: what an attack in closed form needs instead of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.smoothing import Smoothed
from bench.core.stochastic import OwnNoise, noise_off, noise_sites
from bench.noise.injection import Site, on_weight
from bench.noise.layer_moments import ReluRule
from bench.noise.logit_moments import LogitMoments, Passes, Structure, logit_moments
from bench.noise.propagation import SiteVariance


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
        """Is there noise on weights?"""
        return any(on_weight(site) for site in self.sites)

    def moments(self, x: Tensor, structure: Structure, rule: ReluRule, factor: float = 1.0) -> LogitMoments:
        """Moments of the logits for images `x` (b c h w) with `factor` times each standard deviation. Nothing is drawn.

        Raises ValueError naming a layer without a rule."""
        variances = [_scaled(variance, factor) for variance in self.variances]
        with noise_off(self.net):
            return logit_moments(self.net, x, variances, self.sites, structure, rule)


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
    variances, sites = [_of(site) for site in own], list[Site](own)
    if isinstance(model, Smoothed):
        variances, sites = [_constant(model.sigma), *variances], ["input", *sites]
    return KnownNoise(model.net, variances, sites) if sites else None


def _of(site: OwnNoise) -> SiteVariance:
    return lambda signal: site.source.std(signal).square()


def _constant(sigma: float) -> SiteVariance:
    return lambda signal: signal.new_full((), sigma**2)


def _scaled(variance: Callable[[Tensor], Tensor], factor: float) -> SiteVariance:
    return lambda signal: factor**2 * variance(signal)
