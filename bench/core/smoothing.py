"""Randomized smoothing (Cohen et al. 2019, arXiv 1902.02918): a vote under Gaussian noise, with a certificate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier, predicted
from bench.core.stats import clopper_pearson_lower
from bench.core.stochastic import InputNoise, class_counts

ABSTAIN = -1
CPU_ROWS = 256  # more draws in one pass leave the processor's cache: small_cnn took twice as long with 1000

Draw = Callable[[Tensor], Tensor]  # images `b c h w` -> logits `b k` of a fresh draw for each


class Certificate(NamedTuple):
    """Per image (shape b): `prediction` (-1 abstains), L2 `radius` in pixel units ([0,1]; 0 where abstaining), and
    `p_lower`, the lower confidence bound (float64) of the share of draws that gave the class seen most."""

    prediction: Tensor
    radius: Tensor
    p_lower: Tensor


class Vote(Classifier):
    """g(x) = argmax_c P(f(x) = c) for a randomized f whose noise is Gaussian in some affine image of x.

    `forward` is one noisy draw, `predict` the vote of `n_vote` draws, `certify` the certificate. A subclass defines
    `radius_unit`, the scale of the noise in pixels. Predictions and certificates are those of the vote g, not of the
    noise-free net.
    """

    stochastic = True
    smoothed = True

    def __init__(self, net: nn.Module, n_vote: int = 100, alpha: float = 0.001) -> None:
        super().__init__(net)
        if n_vote < 1 or not 0 < alpha < 1:
            raise ValueError(f"expected n_vote >= 1 and 0 < alpha < 1, got {n_vote}, {alpha}")
        self.n_vote, self.alpha = n_vote, alpha

    def uncertifiable(self) -> str | None:
        """The reason why this vote has no certificate, in one line; None if it has one."""
        return None

    def radius_unit(self, x: Tensor) -> float:
        """Certified L2 radius for images shaped like `x` (b c h w) in units of Phi^-1(p): the noise's standard
        deviation over the Lipschitz constant of the map from the image to where it enters. Raises ValueError."""
        raise NotImplementedError(f"{type(self).__name__} must define radius_unit")

    def drawer(self, x: Tensor, rows: int) -> Draw:
        """A function that makes one draw for at most `rows` images like `x`; it may reuse a buffer between calls."""
        return self

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """PREDICT of the paper, shape b: the class of most draws, or -1 where its lead is not significant.

        With probability at least 1 - alpha an answer other than -1 is the class of the ideal (infinite) vote.
        """
        counts = class_counts(self, x, self.n_vote)
        top, label = counts.topk(2, dim=1)
        needed = torch.tensor(votes_needed(self.n_vote, self.alpha), device=x.device)
        return torch.where(top[:, 0] >= needed[top.sum(1)], label[:, 0], ABSTAIN)

    def certify(
        self,
        x: Tensor,
        *,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        report: Callable[[int], None] = lambda done: None,
    ) -> Certificate:
        """CERTIFY of the paper for images `b c h w`.

        `n0` draws choose the class, `n` *further* draws count it. With probability at least 1 - alpha for each image,
        no perturbation of L2 size below `radius` changes the ideal vote. Raises ValueError where even n hits of n
        certify nothing, or no certificate holds. `report(images done)` is called as each image's draws are under way.
        """
        check_certifiable(n, alpha)
        unit = self.radius_unit(x)
        counts = self.counts(x, n0, n, batch_size, report)
        chosen = counts[:, 0].argmax(1)
        hits = counts[:, 1].gather(1, chosen[:, None])[:, 0]
        bounds = [clopper_pearson_lower(k, n, alpha) for k in hits.tolist()]  # the first look at the device's results
        radii = [unit * NormalDist().inv_cdf(p) if p > 0.5 else 0.0 for p in bounds]
        p_lower = torch.tensor(bounds, dtype=torch.float64, device=x.device)
        radius = torch.tensor(radii, dtype=torch.float64, device=x.device)
        return Certificate(torch.where(p_lower > 0.5, chosen, ABSTAIN), radius, p_lower)

    @torch.no_grad()
    def counts(
        self, x: Tensor, n0: int, n: int, batch_size: int, report: Callable[[int], None] = lambda done: None
    ) -> Tensor:
        """How many of the first `n0` and of `n` further draws gave each class, int64 of shape b 2 k; NaN is no class.

        The draws of all images are one stream, image after image, cut into passes of at most `batch_size` draws, so
        the counts do not depend on the cut wherever the generator's numbers do not (on a CPU, for images of a multiple
        of 16 values). Nothing is read back between passes.
        """
        if n0 < 1 or n < 1 or not len(x):
            raise ValueError(f"expected at least one image and one draw of each kind, got {len(x)}, n0={n0}, n={n}")
        each, rows = n0 + n, min(batch_size, CPU_ROWS) if x.device.type == "cpu" else batch_size
        draw, total, counts = self.drawer(x, rows), len(x) * each, torch.empty(0)
        for first in range(0, total, rows):
            last = min(first + rows, total)
            position = torch.arange(first, last, device=x.device)  # in the stream of draws
            image = position // each
            logits = draw(x[image])
            if not first:
                counts = torch.zeros(len(x), 2, logits.shape[1], dtype=torch.int64, device=x.device)
            label = predicted(logits)
            entry = (2 * image + (position % each >= n0)) * logits.shape[1] + label.clamp_min(0)
            counts.view(-1).scatter_add_(0, entry, (label >= 0).long())  # bincount would synchronize a GPU
            for done in range(first // each, last // each):
                report(done + 1)
        return counts


class Smoothed(Vote):
    """g(x) = argmax_c P(net(x + sigma N(0, I)) = c). The noise is added before any normalization and not clipped."""

    def __init__(self, net: nn.Module, sigma: float, n_vote: int = 100, alpha: float = 0.001) -> None:
        super().__init__(net, n_vote, alpha)
        if sigma <= 0:
            raise ValueError(f"expected sigma > 0, got {sigma}")
        self.sigma = sigma
        self.noise_input = InputNoise(sigma)  # found by noise_sites; `forward` applies it

    def forward(self, x: Tensor) -> Tensor:
        """Logits `b k` of one fresh draw for each image `b c h w`."""
        logits: Tensor = self.net(x + self.sigma * torch.randn_like(x) if self.noise_input.enabled else x)
        return logits

    def radius_unit(self, x: Tensor) -> float:
        """sigma: the noise enters at the image."""
        return self.sigma

    def drawer(self, x: Tensor, rows: int) -> Draw:
        """Draws into one buffer, contiguous: a draw straight into channels_last takes nine times as long on a CPU."""
        buffer = torch.empty(rows, *x.shape[1:], dtype=x.dtype, device=x.device)

        def draw(images: Tensor) -> Tensor:
            noisy = buffer[: len(images)].normal_().mul_(self.sigma).add_(images)
            logits: Tensor = self.net(noisy)
            return logits

        return draw


def check_certifiable(n: int, alpha: float) -> None:
    """Raise ValueError where even n hits in n draws certify nothing: their bound is alpha^(1/n)."""
    if n < 1 or not 0 < alpha < 1:
        raise ValueError(f"a certificate needs n >= 1 and 0 < alpha < 1, got n={n}, alpha={alpha}")
    bound = alpha ** (1 / n)
    if bound <= 0.5:
        raise ValueError(
            f"n={n} draws at alpha={alpha} can certify nothing: n hits of n give a bound of {bound:.3g} <= 0.5; "
            "expected alpha^(1/n) > 0.5"
        )


@functools.cache
def votes_needed(n: int, alpha: float) -> tuple[int, ...]:
    """For m = 0..n votes of the two leading classes, how many the first needs for an answer.

    The smallest count whose two-sided binomial test at 1/2 has p <= alpha; m + 1 where none does.
    """
    import numpy as np
    from scipy.stats import binom

    m = np.arange(n + 1)
    # at 1/2 the two-sided p-value of k > m/2 is 2 P(X >= k); isf gives the smallest k with P(X > k) <= alpha/2
    needed = np.where(m == 0, 1, binom.isf(alpha / 2, np.maximum(m, 1), 0.5) + 1)
    return tuple(int(value) for value in np.minimum(needed, m + 1))
