"""The log of `noisy` beside its loss: the pull on the noise scale, and the closed form against noise draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.core.classifier import frozen, keep_buffers
from bench.core.defense import Batch
from bench.core.rng import normal_like, scope, seed
from bench.noise import losses
from bench.noise.gaussian_noise import constant_variance
from bench.noise.injection import InjectionSite, edit_site
from bench.noise.logit_moments import fixed_batch_statistics, full_precision

if TYPE_CHECKING:
    from bench.noise.closed_form import ClosedFormTraining

IMAGES = 64  # of an epoch's last batch
DRAWS = 256  # of the noise for each of them
DRAWS_AT_ONCE = 16
MOST_RIVALS = 19  # Genz's integral takes minutes in 100 dimensions


def measure(defense: ClosedFormTraining, net: nn.Module, batch: Batch, sigma: Tensor, draws: bool) -> dict[str, Tensor]:
    """Scalars on the first 64 images of `batch`: `sigma_pull`, and with `draws` also `against_draws`.

    Random streams, buffers and gradients are left as they were, so that logging does not change the training.
    """
    x, y = batch.x[:IMAGES], batch.y[:IMAGES]
    with scope(seed("noisy", "log", batch.epoch)), keep_buffers(net), torch.enable_grad():
        found = sigma_pull(defense, net, x, y, sigma)
        if draws:
            with frozen(net):
                found |= against_draws(defense, net, x, y, sigma)
    return found


def sigma_pull(defense: ClosedFormTraining, net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor) -> dict[str, Tensor]:
    """d<term>_dsigma_<correct|wrong>: the derivative of each term by sigma over the images that the net classifies
    correctly or wrongly (negative: the term pulls sigma up). They add up to the derivative of the loss.

    snr: standard deviation of the noise-free quantity at the site (over images, channels, positions) over sigma.
    """
    scale = sigma.clone().requires_grad_()
    terms, _, moments = defense.terms(net, x, y, scale)
    found = {"snr": moments.sites[0].detach().std() / constant_variance(sigma)(moments.sites[0]).sqrt()}
    correct = moments.mean.argmax(1) == y
    for name, value in terms.items():
        for side, mask in (("correct", correct), ("wrong", ~correct)):
            (slope,) = torch.autograd.grad((value * mask).sum() / len(y), scale, retain_graph=True)
            found[f"d{name}_dsigma_{side}"] = slope
    return found


def against_draws(
    defense: ClosedFormTraining, net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor
) -> dict[str, Tensor]:
    """The closed form against 256 draws of the noise (Monte Carlo, hence mc_):

    mc_mean_error   ||m - mean of the draws|| / ||mean of the draws||
    mc_mean_shift   the same distance for the noise-free logits
    mc_trace_ratio  mean tr S over the mean trace of the draws' covariance
    mc_win          share of draws in which the true class wins, beside what the moments give for it: mc_win_genz (the
                    joint normal, for at most 20 classes), mc_win_product (independent pairs, the trained loss),
                    mc_win_min (the least pair, an upper bound), mc_win_union (the union bound, a lower bound)
    """
    with torch.no_grad():
        drawn = torch.cat([draw_logits(net, x, sigma, defense.site) for _ in range(DRAWS // DRAWS_AT_ONCE)])
        noise_free = net(x)
    mean, trace = drawn.mean(0), drawn.var(0).sum(1).mean()
    closed = defense.moments(net, x, sigma)
    covariance = closed.covariance()
    rivals = losses.competitors(closed.mean, y, 0)
    wins = losses.log_win(closed.mean, losses.pair_variance(covariance, y, rivals), y, rivals)
    found = {}
    if rivals.shape[1] <= MOST_RIVALS:
        pairs = losses.pair_rows(closed.mean, y, rivals).transpose(0, 1)
        joint = losses.joint_probability(closed.mean, pairs @ covariance @ pairs.transpose(1, 2), y, rivals)
        found["mc_win_genz"] = joint.mean()
    return found | {
        "mc_mean_error": (closed.mean - mean).norm() / mean.norm(),
        "mc_mean_shift": (noise_free - mean).norm() / mean.norm(),
        "mc_trace_ratio": covariance.diagonal(dim1=1, dim2=2).sum(1).mean() / trace,
        "mc_win": (drawn.argmax(2) == y).float().mean(),
        "mc_win_product": wins.sum(0).exp().mean(),
        "mc_win_min": wins.min(0).values.exp().mean(),
        "mc_win_union": (1 + wins.expm1().sum(0)).clamp_min(0).mean(),
    }


def draw_logits(
    net: nn.Module, x: Tensor, sigma: Tensor, site: InjectionSite = "first", draws: int = DRAWS_AT_ONCE
) -> Tensor:
    """Logits (draws b k) of images `x` (b c h w) under draws of N(0, sigma^2) at `site`.

    BatchNorm in training mode uses the statistics of one noise-free pass, as constants; its buffers move by that pass.
    """
    variance = constant_variance(sigma)
    noisy = edit_site(net, site, lambda z: z + variance(z).sqrt() * normal_like(z))
    with fixed_batch_statistics(net, x), noisy:
        logits = full_precision(net(x.repeat(draws, *[1] * (x.dim() - 1))))
    return logits.unflatten(0, (draws, len(x)))
