"""Randomised smoothing (Cohen et al. 2019, arXiv 1902.02918): a vote under Gaussian noise, with a certificate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.stats import clopper_pearson_lower

ABSTAIN = -1


class Certificate(NamedTuple):
    """Per image (shape b): `prediction` (-1 abstains), L2 `radius` in pixel units ([0,1]; 0 where abstaining), and
    `p_lower`, the lower confidence bound (float64) of the share of draws that gave the class seen most."""

    prediction: Tensor
    radius: Tensor
    p_lower: Tensor


class Smoothed(Classifier):
    """g(x) = argmax_c P(net(x + sigma N(0, I)) = c). The noise is added before any normalisation and not clipped.

    `forward` is one noisy draw, `predict` the vote of `n_vote` draws, `certify` the certificate.
    """

    stochastic = True
    smoothed = True

    def __init__(self, net: nn.Module, sigma: float, n_vote: int = 100, alpha: float = 0.001) -> None:
        super().__init__(net)
        if sigma <= 0 or n_vote < 1 or not 0 < alpha < 1:
            raise ValueError(f"expected sigma > 0, n_vote >= 1, 0 < alpha < 1, got {sigma}, {n_vote}, {alpha}")
        self.sigma, self.n_vote, self.alpha = sigma, n_vote, alpha

    def forward(self, x: Tensor) -> Tensor:
        """Logits `b k` of one fresh draw for each image `b c h w`."""
        logits: Tensor = self.net(x + self.sigma * torch.randn_like(x))
        return logits

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """PREDICT of the paper, shape b: the class of most draws, or -1 where its lead over the second is not sure.

        With probability at least 1 - alpha an answer other than -1 is the class of the ideal (infinite) vote.
        """
        counts: Tensor | None = None
        for _ in range(self.n_vote):
            logits = self(x)
            if counts is None:
                counts = torch.zeros(logits.shape, dtype=torch.int64, device=x.device)
            counts.scatter_add_(1, logits.argmax(1, keepdim=True), torch.ones_like(counts[:, :1]))
        assert counts is not None
        top, label = counts.topk(2, dim=1)
        needed = torch.tensor(votes_needed(self.n_vote, self.alpha), device=x.device)
        return torch.where(top[:, 0] >= needed[top.sum(1)], label[:, 0], ABSTAIN)

    @torch.no_grad()
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
        """CERTIFY of the paper for images `b c h w`, one after another.

        `n0` draws choose the class, `n` *further* draws count it. With probability at least 1 - alpha for each image,
        no perturbation of L2 size below `radius` changes the ideal vote. Raises ValueError where even n hits of n
        certify nothing. `report(images done)` is called after each image.
        """
        check_certifiable(n, alpha)
        labels, radii, bounds = [], [], []
        for done, image in enumerate(x, start=1):
            label = int(self._counts(image, n0, batch_size).argmax())
            hits = int(self._counts(image, n, batch_size)[label])
            p_lower = clopper_pearson_lower(hits, n, alpha)
            sure = p_lower > 0.5
            labels.append(label if sure else ABSTAIN)
            radii.append(self.sigma * NormalDist().inv_cdf(p_lower) if sure else 0.0)
            bounds.append(p_lower)
            report(done)
        return Certificate(
            torch.tensor(labels, dtype=torch.int64, device=x.device),
            torch.tensor(radii, dtype=torch.float64, device=x.device),
            torch.tensor(bounds, dtype=torch.float64, device=x.device),
        )

    def _counts(self, image: Tensor, n: int, batch_size: int) -> Tensor:
        """How many of n draws gave each class, int64 on the device: nothing is read back between batches."""
        counts: Tensor | None = None
        for start in range(0, n, batch_size):
            logits = self(image.expand(min(batch_size, n - start), *image.shape))
            found = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
            counts = found if counts is None else counts + found
        if counts is None:
            raise ValueError(f"expected at least one draw, got {n}")
        return counts


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
