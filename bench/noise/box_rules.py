"""The image of a box {z: low <= z <= high} under each type of layer, and the linear bounds of the layer over the box.

Each rule takes a `Box` and gives a `Hull`: a box that holds every output, and for the backward pass the transpose of
linear bounds, L z + c <= layer(z). Interval arithmetic as in Gowal et al. 2018 (arXiv 1810.12715, equation 6: center
and radius through linear layers), bounds of ReLU as in Zhang et al. 2018 (CROWN, arXiv 1811.00866).

`unit` bounds the relative error of one rounded operation. At 0 the boxes hold the values in exact arithmetic. Above 0
they also hold those that a net computes with such errors: a sum of n products, in any order, is off by at most n units
of the sum of their absolute values (Higham 2002, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bench.noise.layer_moments import Map, apply, pair, pull_linear, transposed

TINY = 1e-30  # above what underflow loses in float32
LIBRARY = 64  # units of error of exp, tanh and the like, of which good libraries need one or two
# h falls up to here and rises from here on
MINIMUM_OF_SILU, MINIMUM_OF_GELU, MINIMUM_OF_GELU_TANH = -1.278464542761074, -0.7517915246935645, -0.7524614220710163


class Box(NamedTuple):
    """Bounds of each element, both b ..."""

    low: Tensor
    high: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest absolute value of each element."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def widened(self, by: Tensor) -> Box:
        return Box(self.low - by, self.high + by)


# rows A (r b out...) -> rows B at each input (r b in...) and c (r b), with A layer(z) >= B z + c for all z in the box
Back = Callable[[Tensor], tuple[tuple[Tensor | None, ...], Tensor]]


class Hull(NamedTuple):
    """What a layer makes of a box. `linear`: its linear bounds are the layer itself."""

    out: Box
    back: Back
    linear: bool = False


def along(rows: Tensor, values: Tensor) -> Tensor:
    """The product of each row (r b ...) with `values` (b ...), shape r b."""
    return (rows * values).flatten(2).sum(2)


def least(rows: Tensor, box: Box) -> Tensor:
    """The minimum of each row (r b ...) over the box, shape r b."""
    center, radius = (box.high + box.low) / 2, (box.high - box.low) / 2
    return along(rows, center) - along(rows.abs(), radius)


def weighted(x: Box, layer: nn.Linear | nn.Conv2d, unit: float) -> Hull:
    """A linear layer or convolution: W center + b and |W| radius. Raises ValueError for padding other than zeros."""
    if isinstance(layer, nn.Conv2d) and (isinstance(layer.padding, str) or layer.padding_mode != "zeros"):
        raise ValueError(f"bounds need explicit zero padding, got {layer.padding!r} {layer.padding_mode}")
    weight = layer.weight.to(x.low.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.low.dtype)
    terms = weight[0].numel() + 1
    center, radius, size = (x.high + x.low) / 2, (x.high - x.low) / 2, weight.abs()
    middle = apply(center, layer, weight, bias)
    reach, error = apply(radius, layer, size), None
    if unit:
        error = terms * unit * apply(x.largest, layer, size, None if bias is None else bias.abs()) + TINY
        reach = reach + error
    pull = transposed(layer, weight, x.low.shape)

    def back(rows: Tensor) -> tuple[tuple[Tensor], Tensor]:
        if bias is None:
            constant = rows.new_zeros(rows.shape[:2])
        else:
            constant = (rows * bias.view(-1, *[1] * (rows.dim() - 3))).flatten(2).sum(2)
        return (pull(rows),), _less(constant, rows, error)

    return Hull(Box(middle - reach, middle + reach), back, linear=True)


def batch_norm(x: Box, layer: _BatchNorm, unit: float) -> Hull:
    """BatchNorm with its running statistics. Raises ValueError where it has none, or uses those of the batch."""
    if layer.training or layer.running_mean is None or layer.running_var is None:
        raise ValueError("bounds need BatchNorm with fixed statistics")
    dtype, shape = x.low.dtype, (1, -1, *[1] * (x.low.dim() - 2))
    slope = (layer.running_var.to(dtype) + layer.eps).rsqrt()
    slope = slope if layer.weight is None else slope * layer.weight.to(dtype)
    center = layer.running_mean.to(dtype) * slope
    bias = torch.zeros_like(center) if layer.bias is None else layer.bias.to(dtype)
    size = center.abs() + bias.abs()
    return scaled(x, slope.view(shape), unit, (bias - center).view(shape), size.view(shape))


def scaled(x: Box, factor: Any, unit: float, shift: Any = 0.0, size: Tensor | None = None) -> Hull:
    """factor z + shift with constants; `size` bounds what was added up to `shift`."""
    one, other = x.low * factor + shift, x.high * factor + shift
    if one.shape != x.low.shape:
        raise ValueError(f"bounds of a product or sum with constants need the shape {tuple(x.low.shape)} of its box")
    out, error = Box(torch.minimum(one, other), torch.maximum(one, other)), None
    if unit:
        error = 8 * unit * (abs(factor) * x.largest + (abs(shift) if size is None else size)) + TINY
        out = out.widened(error)

    def back(rows: Tensor) -> tuple[tuple[Tensor], Tensor]:
        ones = torch.ones_like(x.low)
        return (rows * factor,), _less(along(rows, ones * shift), rows, error)

    return Hull(out, back, linear=True)


def total(parts: tuple[Any, Any], sign: float, unit: float) -> Hull:
    """a + sign b, each a Box or a constant. Raises ValueError where a box is broadcast."""
    boxes = [isinstance(part, Box) for part in parts]
    if not all(boxes):
        if boxes[0]:
            return scaled(parts[0], 1.0, unit, sign * parts[1])
        return scaled(parts[1], sign, unit, parts[0])
    a, b = parts
    if a.low.shape != b.low.shape:
        raise ValueError(f"bounds of a sum need equal shapes, got {tuple(a.low.shape)} and {tuple(b.low.shape)}")
    out, error = Box(*(a.low + b.low, a.high + b.high) if sign > 0 else (a.low - b.high, a.high - b.low)), None
    if unit:
        error = 2 * unit * (a.largest + b.largest) + TINY
        out = out.widened(error)

    def back(rows: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        return (rows, sign * rows), _less(rows.new_zeros(rows.shape[:2]), rows, error)

    return Hull(out, back, linear=True)


def average(x: Box, function: Map, unit: float, count: int | None = None) -> Hull:
    """A linear map whose outputs are means of at most `count` elements of an image each (None: of disjoint sets)."""
    out, error = Box(function(x.low), function(x.high)), None
    if unit:
        error = ((count or x.low.numel() // out.low.numel()) + 1) * unit * function(x.largest) + TINY
        out = out.widened(error)

    def back(rows: Tensor) -> tuple[tuple[Tensor], Tensor]:
        return (pull_linear(function, x.low.shape, rows),), _less(rows.new_zeros(rows.shape[:2]), rows, error)

    return Hull(out, back, linear=True)


def reshaped(x: Box, low: Tensor) -> Hull:
    """The same elements in the shape of `low` (b ...). Raises ValueError where images do not stay first."""
    if low.shape[:1] != x.low.shape[:1]:
        raise ValueError(f"bounds need the images first, got the shape {tuple(low.shape)}")

    def back(rows: Tensor) -> tuple[tuple[Tensor], Tensor]:
        return (rows.reshape(len(rows), *x.low.shape),), rows.new_zeros(rows.shape[:2])

    return Hull(Box(low, x.high.reshape(low.shape)), back, linear=True)


def moved(x: Box, function: Map) -> Hull:
    """A map that copies elements to other places of the same image, and fills the rest with zeros."""

    def back(rows: Tensor) -> tuple[tuple[Tensor], Tensor]:
        return (pull_linear(function, x.low.shape, rows),), rows.new_zeros(rows.shape[:2])

    return Hull(Box(function(x.low), function(x.high)), back, linear=True)


def relu(x: Box) -> Hull:
    """Where the sign is open: h(z) <= high (z - low) / (high - low), and h(z) >= z or 0, whichever leaves less area."""
    low, high = x

    def back(rows: Tensor) -> tuple[tuple[Tensor], Tensor]:
        open_ = (low < 0) & (high > 0)
        slope = torch.where(open_, high / torch.where(open_, high - low, 1.0), (low >= 0).to(low.dtype))
        below = torch.where(open_, (high > -low).to(low.dtype), slope)
        positive, negative = rows.clamp_min(0), rows.clamp_max(0)
        constant = along(negative, torch.where(open_, -low * slope, 0.0))
        return (positive * below + negative * slope,), constant

    return Hull(Box(low.relu(), high.relu()), back)


def rising(x: Box, function: Map, unit: float) -> Hull:
    """A function that never falls, element by element; its linear bounds are the constants of the box."""
    return _constant(Box(function(x.low), function(x.high)), unit)


def dipping(x: Box, function: Map, at: float, unit: float) -> Hull:
    """A function that falls up to `at` and rises from there on, such as SiLU and GELU."""
    lowest = function(torch.minimum(torch.maximum(x.low, torch.full_like(x.low, at)), x.high))
    return _constant(Box(lowest, torch.maximum(function(x.low), function(x.high))), unit)


def max_pool2d(x: Box, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1) -> Hull:
    """The maximum is at least the element with the largest lower bound, is that element where it exceeds all others,
    and at most the largest upper bound."""
    options = (kernel, stride, padding, dilation)
    low, index = F.max_pool2d(x.low, *options, return_indices=True)
    high = F.max_pool2d(x.high, *options)

    def back(rows: Tensor) -> tuple[tuple[Tensor], Tensor]:
        with torch.no_grad():
            places = index.flatten(2)
            inside = torch.ones_like(x.low).flatten(2).cumsum(2).sub(1).view(x.low.shape)  # the index of each element
            windows = _windows(x.high, *options).masked_fill(
                _windows(inside, *options) == places[:, :, None], -math.inf
            )
            alone = low >= windows.amax(2).view(low.shape)
        positive, negative = rows.clamp_min(0), rows.clamp_max(0)
        kept = (positive + negative * alone).flatten(3)
        before = rows.new_zeros(rows.shape[0], *x.low.shape).flatten(3)
        before = before.scatter_add(3, places.expand(len(rows), *places.shape), kept)
        return (before.unflatten(3, x.low.shape[2:]),), along(negative, torch.where(alone, 0.0, high))

    return Hull(Box(low, high), back)


def _constant(out: Box, unit: float) -> Hull:
    if unit:
        out = out.widened(LIBRARY * unit * (1 + out.largest))

    def back(rows: Tensor) -> tuple[tuple[None], Tensor]:
        return (None,), least(rows, out)

    return Hull(out, back)


def _less(constant: Tensor, rows: Tensor, error: Tensor | None) -> Tensor:
    return constant if error is None else constant - along(rows.abs(), error)


def _windows(t: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Tensor:
    """b c h w -> b c (kh kw) positions, with -inf where a window leaves the image."""
    high, wide = pair(padding)
    padded = F.pad(t, (wide, wide, high, high), value=-math.inf)
    size = pair(kernel)
    flat = F.unfold(padded.flatten(0, 1)[:, None], size, pair(dilation), 0, pair(stride or kernel))
    return flat.unflatten(0, t.shape[:2])
