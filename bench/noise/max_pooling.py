"""E and Var of the maximum over pooling windows: Clark's maximum of two Gaussians (1961) as a tournament."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.noise.layer_moments import VAR_MIN, Moments, ReluRule, Step, cdf, density, pair


def max_pool2d(
    x: Moments, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, *, rule: ReluRule
) -> Step:
    """`adf`: Clark's maximum as a tournament; the other rules: the element of largest mean, with its variance.

    Raises ValueError where `adf` meets windows that overlap or are padded.
    """
    shape = x.mean.shape
    if rule != "adf":
        mean, index = F.max_pool2d(x.mean, kernel, stride, padding, dilation, return_indices=True)
        index = index.flatten(2)

        def pull(rows: Tensor) -> Tensor:
            before = rows.new_zeros(rows.shape[0], *shape).flatten(3)
            return before.scatter_add(3, index.expand(len(rows), *index.shape), rows.flatten(3)).unflatten(3, shape[2:])

        return Step(Moments(mean, x.var.flatten(2).gather(2, index).view(mean.shape)), (pull,))
    size = pair(kernel)
    if pair(stride or kernel) != size or pair(padding) != (0, 0) or pair(dilation) != (1, 1):
        raise ValueError(f"exact max-pooling needs disjoint windows, got kernel {kernel}, stride {stride}; use laplace")
    windows = Moments(_windows(x.mean, size), _windows(x.var, size))
    out, weights = _tournament(windows)
    explained = (weights.square() * windows.var).sum(-1)
    return Step(
        out, (lambda rows: _unwindow(rows[..., None] * weights, size, shape),), (out.var - explained).clamp_min(0)
    )


def clark_max(a: Moments, b: Moments) -> tuple[Moments, Tensor]:
    """Moments of max(A, B) of independent A and B, and P(A > B), the weight of A in the linearized maximum."""
    theta = (a.var + b.var).clamp_min(VAR_MIN).sqrt()
    z = (a.mean - b.mean) / theta
    first, second, at = cdf(z), cdf(-z), density(z)
    # var = weighted variances + spread of the means - what both share; free of E[max^2] - E[max]^2 cancellation
    mean = a.mean * first + b.mean * second + theta * at
    gap = a.mean - b.mean
    spread = gap.square() * first * second + gap * theta * at * (second - first) - (theta * at).square()
    return Moments(mean, (a.var * first + b.var * second + spread).clamp_min(0)), first


def _tournament(x: Moments) -> tuple[Moments, Tensor]:
    """The maximum over the last axis by halves, and the weight of each element in it, shape of `x`."""
    if x.mean.shape[-1] == 1:
        return Moments(x.mean[..., 0], x.var[..., 0]), torch.ones_like(x.mean)
    middle = (x.mean.shape[-1] + 1) // 2
    (left, left_weight), (right, right_weight) = (
        _tournament(Moments(x.mean[..., half], x.var[..., half])) for half in (slice(middle), slice(middle, None))
    )
    out, win = clark_max(left, right)
    return out, torch.cat([left_weight * win[..., None], right_weight * (1 - win)[..., None]], -1)


def _windows(t: Tensor, size: tuple[int, int]) -> Tensor:
    """b c h w -> b c h/kh w/kw (kh kw), what does not fill a window cut off."""
    high, wide = t.shape[2] // size[0], t.shape[3] // size[1]
    t = t[:, :, : high * size[0], : wide * size[1]]
    return t.unflatten(3, (wide, size[1])).unflatten(2, (high, size[0])).transpose(3, 4).flatten(4)


def _unwindow(t: Tensor, size: tuple[int, int], shape: torch.Size) -> Tensor:
    """The transpose of `_windows` on r b c h/kh w/kw (kh kw), with zeros for what was cut off."""
    t = t.unflatten(5, size).transpose(4, 5).flatten(5).flatten(3, 4)
    return F.pad(t, (0, shape[3] - t.shape[4], 0, shape[2] - t.shape[3]))
