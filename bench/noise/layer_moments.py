"""E[h(Z)] and Var[h(Z)] element by element, Z ~ N(mean, var): the rule of each layer type.

Each rule takes `Moments` (independent elements) and gives a `Step`: the moments behind the layer, the transpose of its
linearized map for backward recursions, and the variance that the linearized map does not explain. Exact rectified
moments as in assumed density filtering (ADF); maximum of two Gaussians after Clark (1961); smooth activations by
Gauss-Hermite quadrature.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input
from torch.nn.modules.batchnorm import _BatchNorm

ReluRule = Literal["laplace", "adf", "ungated"]
Pull = Callable[[Tensor], Tensor]  # rows behind a layer (r b out...) -> rows before it (r b in...)

NODES = 9  # of the quadrature: exact for polynomials up to degree 17
VAR_MIN = 1e-8  # below it the standardized mean of exact rules overflows in float32


class Moments(NamedTuple):
    """Mean and variance of independent Gaussian elements, both b ..."""

    mean: Tensor
    var: Tensor


class Step(NamedTuple):
    """A layer's effect: `pulls` (one for each random input) and `innovation`, the variance `out.var` minus what the
    linearized map carries (>= 0; None where the map is linear). Where the layer itself is random, `further` maps rows
    at its output to its terms R diag(w) R^T of their covariance."""

    out: Moments
    pulls: tuple[Pull, ...]
    innovation: Tensor | None = None
    further: Callable[[Tensor], list[tuple[Tensor, Tensor]]] | None = None


def linear(x: Moments, weight: Tensor, bias: Tensor | None = None) -> Step:
    """W m + b and (W * W) v."""
    out = Moments(F.linear(x.mean, weight, bias), F.linear(x.var, weight.square()))
    return Step(out, (lambda rows: rows @ weight,))


def conv2d(x: Moments, layer: nn.Conv2d) -> Step:
    """The convolution, with squared weights for the variance. Raises ValueError for padding other than zeros."""
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError(f"moments need explicit zero padding, got {layer.padding!r} {layer.padding_mode}")
    weight, options = layer.weight, (layer.stride, layer.padding, layer.dilation, layer.groups)

    def pull(rows: Tensor) -> Tensor:
        shape = (rows.shape[0] * rows.shape[1], *x.mean.shape[1:])
        before: Tensor = conv2d_input(shape, weight, rows.flatten(0, 1), *options)  # type: ignore[arg-type]
        return before.unflatten(0, rows.shape[:2])

    mean = F.conv2d(x.mean, weight, layer.bias, *options)
    return Step(Moments(mean, F.conv2d(x.var, weight.square(), None, *options)), (pull,))


def relu(x: Moments, rule: ReluRule) -> Step:
    """`laplace`: (max(m, 0), v 1[m > 0]), the noise-free mean and first-order variance. `adf`: exact moments.
    `ungated`: (max(m, 0), v), Laplace's approximation of the truncated Gaussian taken literally."""
    if rule == "ungated":
        return Step(Moments(x.mean.relu(), x.var), (_same,))
    if rule == "laplace":
        gate = (x.mean > 0).to(x.mean.dtype)
        return Step(Moments(x.mean.relu(), x.var * gate), (lambda rows: rows * gate,))
    v = x.var.clamp_min(VAR_MIN)
    s = v.sqrt()
    a = x.mean / s
    up, down, density = _phi(a), _phi(-a), _density(a)
    mean = s * (a * up + density)
    # E[h^2] - E[h]^2 with the large terms canceled on paper: float32 loses them from |a| > 5 on
    var = v * (up + a.square() * up * down + a * density * (down - up) - density.square()).clamp_min(0)
    return Step(Moments(mean, var), (lambda rows: rows * up,), (var - up.square() * v).clamp_min(0))


def clip(x: Moments, low: float, high: float, rule: ReluRule) -> Step:
    """min(max(z, low), high), ReLU6 among them; rules as of `relu`."""
    if rule != "adf":
        inside = (x.mean > low) & (x.mean < high)
        gate = inside.to(x.mean.dtype) if rule == "laplace" else torch.ones_like(x.mean)
        return Step(Moments(x.mean.clamp(low, high), x.var * gate), (lambda rows: rows * gate,))
    v = x.var.clamp_min(VAR_MIN)
    s = v.sqrt()
    a, b = (low - x.mean) / s, (high - x.mean) / s
    below, above, at_a, at_b = _phi(a), _phi(-b), _density(a), _density(b)
    inside = (_phi(b) - below).clamp_min(0)
    mean = low * below + high * above + x.mean * inside + s * (at_a - at_b)
    # second moment around the mean itself, so that no large terms cancel
    d = x.mean - mean
    middle = (d.square() + v) * inside + 2 * d * s * (at_a - at_b) + v * (a * at_a - b * at_b)
    var = ((low - mean).square() * below + (high - mean).square() * above + middle).clamp_min(0)
    return Step(Moments(mean, var), (lambda rows: rows * inside,), (var - inside.square() * v).clamp_min(0))


def smooth(x: Moments, function: Callable[[Tensor], Tensor], rule: ReluRule) -> Step:
    """An element-wise smooth activation h (GELU, SiLU, tanh, ...): `laplace` (h(m), h'(m)^2 v); `ungated` the same
    without the slope; `adf` E[h], Var[h] and the gate E[h'] by Gauss-Hermite quadrature with NODES nodes."""
    if rule == "ungated":
        return Step(Moments(function(x.mean), x.var), (_same,))
    if rule == "laplace":
        gate = _slope(function, x.mean)
        return Step(Moments(function(x.mean), x.var * gate.square()), (lambda rows: rows * gate,))
    v = x.var.clamp_min(VAR_MIN)
    nodes, weights = (torch.as_tensor(a, dtype=v.dtype, device=v.device) for a in _hermite())
    shape = (-1, *[1] * v.dim())
    points, weights = x.mean + v.sqrt() * nodes.view(shape), weights.view(shape)
    values = function(points)
    mean = (weights * values).sum(0)
    var = (weights * (values - mean).square()).sum(0)
    gate = (weights * _slope(function, points)).sum(0)
    return Step(Moments(mean, var), (lambda rows: rows * gate,), (var - gate.square() * v).clamp_min(0))


def clark_max(a: Moments, b: Moments, cov: Tensor | float = 0.0) -> tuple[Moments, Tensor]:
    """Moments of max(A, B) with covariance `cov`, and P(A > B), the weight of A in the linearized maximum."""
    theta = (a.var + b.var - 2 * cov).clamp_min(VAR_MIN).sqrt()
    z = (a.mean - b.mean) / theta
    first, second, density = _phi(z), _phi(-z), _density(z)
    # var = weighted variances + spread of the means - what both share; free of E[max^2] - E[max]^2 cancellation
    mean = a.mean * first + b.mean * second + theta * density
    gap = a.mean - b.mean
    spread = gap.square() * first * second + gap * theta * density * (second - first) - (theta * density).square()
    return Moments(mean, (a.var * first + b.var * second + spread).clamp_min(0)), first


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
    size = _pair(kernel)
    if _pair(stride or kernel) != size or _pair(padding) != (0, 0) or _pair(dilation) != (1, 1):
        raise ValueError(f"exact max-pooling needs disjoint windows, got kernel {kernel}, stride {stride}; use laplace")
    windows = Moments(_windows(x.mean, size), _windows(x.var, size))
    out, weights = _tournament(windows)
    explained = (weights.square() * windows.var).sum(-1)
    return Step(
        out, (lambda rows: _unwindow(rows[..., None] * weights, size, shape),), (out.var - explained).clamp_min(0)
    )


def average(x: Moments, mean_of: Pull, count: int) -> Step:
    """A linear map whose outputs are means of `count` independent elements each: variance mean(v) / count."""

    def pull(rows: Tensor) -> Tensor:
        with torch.enable_grad():
            point = rows.new_zeros(rows.shape[0] * rows.shape[1], *x.mean.shape[1:]).requires_grad_()
            (before,) = torch.autograd.grad(mean_of(point), point, rows.flatten(0, 1), create_graph=True)
        return before.unflatten(0, rows.shape[:2])

    return Step(Moments(mean_of(x.mean), mean_of(x.var) / count), (pull,))


def batch_norm(x: Moments, layer: _BatchNorm) -> Step:
    """Running statistics, or in training those of the batch with its *total* variance Var(m) + mean(v).

    Running buffers are left alone: they must come from the noise-free pass.
    """
    shape = (1, -1, *[1] * (x.mean.dim() - 2))
    centre, spread = layer.running_mean, layer.running_var
    if layer.training or centre is None or spread is None:
        axes = [0, *range(2, x.mean.dim())]
        centre, spread = x.mean.mean(axes), x.mean.var(axes, unbiased=False) + x.var.mean(axes)
    factor = ((spread + layer.eps).rsqrt() * (1.0 if layer.weight is None else layer.weight)).view(shape)
    bias = 0.0 if layer.bias is None else layer.bias.view(shape)
    mean = (x.mean - centre.view(shape)) * factor + bias
    return Step(Moments(mean, x.var * factor.square()), (lambda rows: rows * factor,))


def scale(x: Moments, factor: Tensor | float) -> Step:
    """c m and c^2 v for a constant c."""
    return Step(Moments(x.mean * factor, x.var * factor**2), (lambda rows: rows * factor,))


def add(a: Any, b: Any, sign: float = 1.0) -> Step:
    """a + sign b, each Moments or a constant. Two random summands count as independent: in the element-wise variance
    the covariance of a skip with its branch is dropped. Raises ValueError where a random summand is broadcast."""
    random = [(part, s) for part, s in ((a, 1.0), (b, sign)) if isinstance(part, Moments)]
    mean: Tensor = (a.mean if isinstance(a, Moments) else a) + sign * (b.mean if isinstance(b, Moments) else b)
    if any(part.mean.shape != mean.shape for part, _ in random):
        raise ValueError(f"moments of a sum need equal shapes, got {[tuple(part.mean.shape) for part, _ in random]}")
    pulls = tuple(functools.partial(torch.mul, s) for _, s in random)
    return Step(Moments(mean, torch.stack([part.var for part, _ in random]).sum(0)), pulls)


def reshape(x: Moments, mean: Tensor) -> Step:
    """The same elements in the shape of `mean` (batch first)."""
    return Step(Moments(mean, x.var.reshape(mean.shape)), (lambda rows: rows.reshape(len(rows), *x.mean.shape),))


def _phi(a: Tensor) -> Tensor:
    """The normal cdf, relatively exact in the lower tail, where float32 `torch.special.ndtr` is off by 1e-8."""
    return torch.erfc(-a / math.sqrt(2)) / 2


def _density(a: Tensor) -> Tensor:
    return torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)


@functools.cache
def _hermite() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of quadrature under the standard normal density."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / math.sqrt(2 * math.pi)


def _slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """h'(at), differentiable again."""
    with torch.enable_grad():
        point = at if at.requires_grad else at.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(point).sum(), point, create_graph=True)
    return slope


def _same(rows: Tensor) -> Tensor:
    return rows


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _windows(t: Tensor, size: tuple[int, int]) -> Tensor:
    """b c h w -> b c h/kh w/kw (kh kw), what does not fill a window cut off."""
    high, wide = t.shape[2] // size[0], t.shape[3] // size[1]
    t = t[:, :, : high * size[0], : wide * size[1]]
    return t.unflatten(3, (wide, size[1])).unflatten(2, (high, size[0])).transpose(3, 4).flatten(4)


def _unwindow(t: Tensor, size: tuple[int, int], shape: torch.Size) -> Tensor:
    """The transpose of `_windows` on r b c h/kh w/kw (kh kw), with zeros for what was cut off."""
    t = t.unflatten(5, size).transpose(4, 5).flatten(5).flatten(3, 4)
    return F.pad(t, (0, shape[3] - t.shape[4], 0, shape[2] - t.shape[3]))


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
