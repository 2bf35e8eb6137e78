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
Map = Callable[[Tensor], Tensor]
Pull = Map  # rows at the output of a layer (r b out...) -> rows at its input (r b in...)

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


def weighted(x: Moments, layer: nn.Linear | nn.Conv2d) -> Step:
    """A linear layer or convolution: W m + b and (W * W) v. Raises ValueError for padding other than zeros."""
    if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
        raise ValueError(f"moments need explicit zero padding, got {layer.padding!r} {layer.padding_mode}")
    weight = layer.weight  # read once: where the weights are noisy, each access is a draw
    out = Moments(apply(x.mean, layer, weight, layer.bias), apply(x.var, layer, weight.square()))
    return Step(out, (transposed(layer, weight, x.mean.shape),))


def transposed(layer: nn.Linear | nn.Conv2d, weight: Tensor, shape: torch.Size) -> Pull:
    """The transpose of a linear layer or convolution with these weights, for inputs of `shape` (b ...)."""
    if isinstance(layer, nn.Linear):
        return lambda rows: rows @ weight

    def pull(rows: Tensor) -> Tensor:
        options: Any = layer.stride, layer.padding, layer.dilation, layer.groups
        size = (rows.shape[0] * rows.shape[1], *shape[1:])
        return conv2d_input(size, weight, rows.flatten(0, 1), *options).unflatten(0, rows.shape[:2])

    return pull


def apply(x: Tensor, layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear layer or convolution with other weights."""
    if not isinstance(layer, nn.Conv2d):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]


def relu(x: Moments, rule: ReluRule) -> Step:
    """`laplace`: (max(m, 0), v 1[m > 0]), the noise-free mean and first-order variance. `adf`: exact moments.
    `ungated`: (max(m, 0), v), Laplace's approximation of the truncated Gaussian taken literally."""

    def exact(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = v.sqrt()
        a = m / s
        up, down, at = cdf(a), cdf(-a), density(a)
        mean = s * (a * up + at)
        # E[h^2] - E[h]^2 with the large terms canceled on paper: float32 loses them from |a| > 5 on
        var = v * (up + a.square() * up * down + a * at * (down - up) - at.square()).clamp_min(0)
        return mean, var, up

    return _activation(x, rule, torch.relu, lambda m: (m > 0).to(m.dtype), exact)


def clip(x: Moments, low: float, high: float, rule: ReluRule) -> Step:
    """min(max(z, low), high), ReLU6 among them; rules as of `relu`."""

    def exact(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = v.sqrt()
        a, b = (low - m) / s, (high - m) / s
        below, above, at_a, at_b = cdf(a), cdf(-b), density(a), density(b)
        inside = (cdf(b) - below).clamp_min(0)
        mean = low * below + high * above + m * inside + s * (at_a - at_b)
        # second moment around the mean itself, so that no large terms cancel
        d = m - mean
        middle = (d.square() + v) * inside + 2 * d * s * (at_a - at_b) + v * (a * at_a - b * at_b)
        var = ((low - mean).square() * below + (high - mean).square() * above + middle).clamp_min(0)
        return mean, var, inside

    def slope(m: Tensor) -> Tensor:
        return ((m > low) & (m < high)).to(m.dtype)

    return _activation(x, rule, lambda m: m.clamp(low, high), slope, exact)


def smooth(x: Moments, function: Map, rule: ReluRule) -> Step:
    """An element-wise smooth activation h (GELU, SiLU, tanh, ...): `laplace` (h(m), h'(m)^2 v); `ungated` the same
    without the slope; `adf` E[h], Var[h] and the gate E[h'] by Gauss-Hermite quadrature with NODES nodes."""

    def exact(m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nodes, weights = (torch.as_tensor(a, dtype=v.dtype, device=v.device) for a in _hermite())
        shape = (-1, *[1] * v.dim())
        points, weights = m + v.sqrt() * nodes.view(shape), weights.view(shape)
        values = function(points)
        mean = (weights * values).sum(0)
        var = (weights * (values - mean).square()).sum(0)
        return mean, var, (weights * _slope(function, points)).sum(0)

    return _activation(x, rule, function, functools.partial(_slope, function), exact)


def _activation(
    x: Moments,
    rule: ReluRule,
    function: Map,
    slope: Map,
    exact: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
) -> Step:
    """An element-wise activation h by one of the rules. `exact` maps (m, v) to E[h], Var[h] and the gate E[h']."""
    if rule == "ungated":
        return Step(Moments(function(x.mean), x.var), (lambda rows: rows,))
    if rule == "laplace":
        gate = slope(x.mean)
        return _gated(function(x.mean), x.var, gate)
    v = x.var.clamp_min(VAR_MIN)
    mean, var, gate = exact(x.mean, v)
    return Step(Moments(mean, var), (lambda rows: rows * gate,), (var - gate.square() * v).clamp_min(0))


def _gated(mean: Tensor, var: Tensor, factor: Tensor | float) -> Step:
    """`mean`, and the variance `var` of the input times the square of the factor of each element."""
    return Step(Moments(mean, var * factor**2), (lambda rows: rows * factor,))


def avg_pool2d(
    x: Moments,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Step:
    """Average pooling of complete windows. Raises ValueError for padding, ceil_mode or another divisor."""
    if pair(padding) != (0, 0) or ceil_mode or divisor_override is not None:
        raise ValueError(
            "no moment rule for average pooling with padding, ceil_mode or a divisor; use structure=jacobian"
        )
    return _average(x, lambda t: F.avg_pool2d(t, kernel_size, stride), math.prod(pair(kernel_size)))


def adaptive_avg_pool2d(x: Moments, output_size: Any) -> Step:
    """Average pooling to a size. Raises ValueError where the windows are unequal."""
    size, (high, wide) = x.mean.shape[2:], pair(output_size)
    if size[0] % high or size[1] % wide:
        raise ValueError(f"adaptive pooling of {tuple(size)} to {output_size} has unequal windows; no moment rule")
    return _average(x, lambda t: F.adaptive_avg_pool2d(t, output_size), size[0] * size[1] // (high * wide))


def mean(x: Moments, dim: Any, keepdim: bool = False) -> Step:
    """The mean over dimensions of each sample."""
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    return _average(x, lambda t: t.mean(dims, keepdim=keepdim), math.prod(x.mean.shape[d] for d in dims))


def _average(x: Moments, mean_of: Map, count: int) -> Step:
    """A linear map whose outputs are means of `count` independent elements each: variance mean(v) / count."""

    return Step(
        Moments(mean_of(x.mean), mean_of(x.var) / count), (functools.partial(pull_linear, mean_of, x.mean.shape),)
    )


def pull_linear(function: Map, shape: torch.Size, rows: Tensor) -> Tensor:
    """The transpose of a linear function of inputs of `shape` (b ...), by autograd."""
    with torch.enable_grad():
        point = rows.new_zeros(rows.shape[0] * rows.shape[1], *shape[1:]).requires_grad_()
        (before,) = torch.autograd.grad(function(point), point, rows.flatten(0, 1), create_graph=True)
    return before.unflatten(0, rows.shape[:2])


def batch_norm(x: Moments, layer: _BatchNorm) -> Step:
    """Running statistics, or in training those of the batch with its *total* variance Var(m) + mean(v).

    Running buffers are left alone: they must come from the noise-free pass.
    """
    shape = (1, -1, *[1] * (x.mean.dim() - 2))
    center, spread = layer.running_mean, layer.running_var
    if layer.training or center is None or spread is None:
        axes = [0, *range(2, x.mean.dim())]
        center, spread = x.mean.mean(axes), x.mean.var(axes, unbiased=False) + x.var.mean(axes)
    factor = ((spread + layer.eps).rsqrt() * (1.0 if layer.weight is None else layer.weight)).view(shape)
    bias = 0.0 if layer.bias is None else layer.bias.view(shape)
    return _gated((x.mean - center.view(shape)) * factor + bias, x.var, factor)


def scale(x: Moments, factor: Tensor | float) -> Step:
    """c m and c^2 v for a constant c."""
    return _gated(x.mean * factor, x.var, factor)


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


def cdf(a: Tensor) -> Tensor:
    """The normal cdf, relatively exact in the lower tail, where float32 `torch.special.ndtr` is off by 1e-8."""
    return torch.erfc(-a / math.sqrt(2)) / 2


def density(a: Tensor) -> Tensor:
    """The standard normal density."""
    return torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)


@functools.cache
def _hermite() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of quadrature under the standard normal density."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    return nodes, weights / math.sqrt(2 * math.pi)


def _slope(function: Map, at: Tensor) -> Tensor:
    """h'(at), differentiable again."""
    with torch.enable_grad():
        point = at if at.requires_grad else at.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(point).sum(), point, create_graph=True)
    return slope


def pair(value: Any) -> tuple[int, int]:
    """Height and width, from one number for both or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
