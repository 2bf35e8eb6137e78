"""The log of `noisy` beside its loss: what its terms see and pull at, and the closed form against noise draws."""

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
    """Scalars on the first 64 images of `batch`: `gaps`, `gradient_norms`, `sigma_pull`, and with `draws` also
    `against_draws`.

    Random streams, buffers and gradients are left as they were, so that logging does not change the training.
    """
    x, y = batch.x[:IMAGES], batch.y[:IMAGES]
    with scope(seed("noisy", "log", batch.epoch)), keep_buffers(net), torch.enable_grad():
        scale = sigma.clone().requires_grad_()
        terms, q, moments = defense.terms(net, x, y, scale)
        found = gaps(moments.mean, q, y) | gradient_norms(net, terms) | sigma_pull(terms, moments.mean, y, scale)
        if draws:
            with frozen(net):
                found |= against_draws(defense, net, x, y, sigma)
    return found


def gaps(mean: Tensor, q: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What the probability term sees of the rivals whose variances are the rows of q (r b); empty if there is none:

    t_median      median over images and rivals of t = d / sqrt q, the gap in units of the noise; Phi(t) is to be won
    gap_constant  share of |d| that is image-independent: with d' the gap of the same two classes in the mean logits,
                  sum |d'| / sum (|d'| + |d - d'|). 1: all images have equal logits
    """
    if not len(q):
        return {}
    rivals = losses.competitors(mean, y, len(q))
    d = losses.gap(mean, y, rivals).detach()
    constant = losses.gap(mean.mean(0, keepdim=True).expand_as(mean), y, rivals).detach()
    share = constant.abs().sum() / (constant.abs() + (d - constant).abs()).sum()
    return {"t_median": losses.in_noise(d, q.detach()).median(), "gap_constant": share}


def gradient_norms(net: nn.Module, terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """grad_<term>: L2 norm of the gradient of the mean of each term (b) in the weights of the net."""
    weights = [p for p in net.parameters() if p.requires_grad]
    found = {}
    for name, value in terms.items():
        slopes = torch.autograd.grad(value.mean(), weights, retain_graph=True, allow_unused=True)
        found[f"grad_{name}"] = torch.stack([slope.norm() for slope in slopes if slope is not None]).norm()
    return found


def sigma_pull(terms: dict[str, Tensor], mean: Tensor, y: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """d<term>_dsigma_<correct|wrong>: the derivative of each term (b) by `scale` over the images that the net
    classifies correctly or wrongly (negative: the term pulls sigma up). They add up to the derivative of the loss."""
    found = {}
    correct = mean.argmax(1) == y
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
