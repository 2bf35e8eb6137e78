"""x' = c_k(x; severity), k = 1, ..., 15: noise, blur, weather and digital corruptions

Those of Hendrycks and Dietterich (2019, arXiv 1903.12261) with the constants of their CIFAR-10-C, which is made of
32-pixel images; `s` is the factor by which a length in pixels changes. `attacks.corruption` says how constants scale
and what differs from the released code.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 32  # of the images that the constants are for
GRAY = (0.299, 0.587, 0.114)  # luminance of red, green, blue
ICE = (0.8, 0.93, 1.0)  # the tint of frost


class Draws:
    """Random numbers for the images of a batch, from a generator for each, so that none depends on the others; drawn
    on the CPU, where they are the same for every device. Tensors are `b *shape`, of dtype and device of `like`."""

    def __init__(self, seeds: Sequence[int], like: Tensor) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._like = like

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """U(low, high)."""
        drawn = torch.stack([torch.rand(shape, generator=g) for g in self._generators])
        return low + (high - low) * drawn.to(self._like)

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1)."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators]).to(self._like)

    def poisson(self, rates: Tensor) -> Tensor:
        """Counts at these rates (b ...)."""
        each = zip(rates.cpu(), self._generators, strict=True)
        return torch.stack([torch.poisson(rate, generator=g) for rate, g in each]).to(self._like)


def corrupt(x: Tensor, name: str, severity: int, seeds: Sequence[int]) -> Tensor:
    """Images `x` (b c h w, in [0,1]) under a corruption at severity 1 to 5, in [0,1]; `seeds`: one for each image."""
    operation, constants = CORRUPTIONS[name]
    changed = operation(x, constants[severity - 1], Draws(seeds, x), min(x.shape[-2:]) / SIDE)
    return changed.clamp(0, 1)


def _gaussian_noise(x: Tensor, c: float, draws: Draws, s: float) -> Tensor:
    return x + c * draws.normal(*x.shape[1:])


def _shot_noise(x: Tensor, c: float, draws: Draws, s: float) -> Tensor:
    return draws.poisson(c * x) / c


def _impulse_noise(x: Tensor, c: float, draws: Draws, s: float) -> Tensor:
    """A share c of all values becomes 0 or 1, half of them each."""
    u = draws.uniform(0, 1, *x.shape[1:])
    return x.masked_fill(u < c, 1).masked_fill(u < c / 2, 0)


def _defocus_blur(x: Tensor, c: tuple[float, float], draws: Draws, s: float) -> Tensor:
    kernel = disk(*c, s).to(x)
    padded = F.pad(x, [len(kernel) // 2] * 4, mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None]).view_as(x)


def disk(radius: float, alias: float, s: float) -> Tensor:
    """A disk of sum 1 after a Gaussian of 3 x 3 pixels, resampled to the s-fold size."""
    at = torch.arange(-3.0, 4.0, dtype=torch.float64)
    inside = (at[:, None].square() + at.square() <= radius**2).double()
    gap = (at[:, None] - at).abs()
    soften = torch.where(gap <= 1, (-gap.square() / (2 * alias**2)).exp(), 0.0)
    width = max(s, 1.0)  # of the tent that resamples
    reach = math.ceil(2 * s + width) - 1
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    resample = (1 - (places[:, None] - s * at).abs() / width).clamp_min(0) @ soften
    kernel = resample @ inside @ resample.T
    return kernel / kernel.sum()


def _glass_blur(x: Tensor, c: tuple[float, int, int], draws: Draws, s: float) -> Tensor:
    """Blur, several times a random neighbor's color for every pixel, blur."""
    sigma, reach, rounds = c[0] * s, max(1, round(c[1] * s)), c[2]
    x = _blur(x, sigma, 4)
    for _ in range(rounds):
        moves = draws.uniform(-reach, reach, 2, *x.shape[2:]).floor().long()
        x = _pixels(x, moves[:, 0], moves[:, 1])
    return _blur(x, sigma, 4)


def _motion_blur(x: Tensor, c: tuple[int, float], draws: Draws, s: float) -> Tensor:
    return _smear(x, *c, draws.uniform(-45, 45), s)


def _zoom_blur(x: Tensor, c: int, draws: Draws, s: float) -> Tensor:
    """Mean of the image and of its zooms by 1, 1.01, ..., 1 + c/100."""
    return sum((_zoom(x, 1 + k / 100) for k in range(c + 1)), x) / (c + 2)


class Snow(NamedTuple):
    """Brightness of the layer and its standard deviation, its zoom, the threshold of a flake, radius and sigma of its
    motion, and the share of the image that keeps its color."""

    mean: float
    std: float
    zoom: float
    threshold: float
    radius: int
    sigma: float
    keep: float


def _snow(x: Tensor, c: Snow, draws: Draws, s: float) -> Tensor:
    layer = _zoom(c.mean + c.std * draws.normal(1, *x.shape[2:]), max(1.0, c.zoom * s))
    layer = _smear(layer.where(layer >= c.threshold, 0.0).clamp(0, 1), c.radius, c.sigma, draws.uniform(-135, -45), s)
    whitened = c.keep * x + (1 - c.keep) * x.maximum(1.5 * _gray(x) + 0.5)
    return whitened + layer + layer.flip(2, 3)


def _frost(x: Tensor, c: tuple[float, float], draws: Draws, s: float) -> Tensor:
    return c[0] * x + c[1] * ice(x, draws)


def ice(x: Tensor, draws: Draws) -> Tensor:
    """A texture of frost in [0,1] for each image (b c h w), bluish on colored ones: veins on a milky pane."""
    maps = [_fractal(x, decay, draws) for decay in (2.2, 1.6, 1.6)]
    veins = torch.stack([(1 - (2 * m - 1).abs()) ** 4 for m in maps[1:]]).amax(0)
    texture = (0.25 + 0.45 * maps[0] + 0.5 * veins).clamp(0, 1)
    return texture * texture.new_tensor(ICE).view(3, 1, 1) if x.shape[1] == 3 else texture


def _fog(x: Tensor, c: tuple[float, float], draws: Draws, s: float) -> Tensor:
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + c[0] * _fractal(x, c[1], draws)) * most / (most + c[0])


def _brightness(x: Tensor, c: float, draws: Draws, s: float) -> Tensor:
    """The value of HSV (the largest channel) raised by c at the same hue and saturation."""
    value = x.amax(1, keepdim=True)
    raised = (value + c).clamp_max(1)
    return torch.where(value > 0, x * raised / value, raised)


def _contrast(x: Tensor, c: float, draws: Draws, s: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return mean + c * (x - mean)


def _elastic_transform(x: Tensor, c: tuple[float, float, float], draws: Draws, s: float) -> Tensor:
    """A random affine map, which moves three points by up to c[2] sides, then a smooth random displacement field:
    uniform noise after a Gaussian of c[1] sides, times c[0] sides."""
    height, width = x.shape[2:]
    side = min(height, width)
    middle, arm = x.new_tensor([width // 2, height // 2]), side // 3
    corners = middle + x.new_tensor([[arm, arm], [arm, -arm], [-arm, -arm]])
    moved = corners + draws.uniform(-c[2] * side, c[2] * side, 3, 2)
    back = torch.linalg.solve(F.pad(moved, (0, 1), value=1.0), corners.expand_as(moved))  # b 3 2
    rows, columns = torch.meshgrid(*(torch.arange(n).to(x) for n in (height, width)), indexing="ij")
    source = torch.stack([columns, rows, torch.ones_like(rows)], 2) @ back[:, None]  # b h w 2
    x = _sample(x, source[..., 0], source[..., 1])
    if c[0] == 0:
        return x
    field = c[0] * side * _blur(draws.uniform(-1, 1, 2, height, width), c[1] * side, 3)
    return _sample(x, columns + field[:, 0], rows + field[:, 1])


def _pixelate(x: Tensor, c: float, draws: Draws, s: float) -> Tensor:
    rows, columns = (_blocks(n, int(n * c)).to(x) for n in x.shape[2:])
    return rows @ x @ columns.T


def _blocks(n: int, m: int) -> Tensor:
    """n x n: the mean of the pixels with their center in each of m cells, given to the pixels nearest to that cell."""
    center, cell = (torch.arange(n, dtype=torch.float64) + 0.5) * m / n, torch.arange(m)  # in units of a cell
    offset = center - cell[:, None] - 0.5
    inside = ((offset > -0.5) & (offset <= 0.5)).double()
    return (inside / inside.sum(1, keepdim=True))[center.long()]


def _jpeg_compression(x: Tensor, c: int, draws: Draws, s: float) -> Tensor:
    """Through an encoder on the CPU."""
    grouped = x if x.shape[1] == 3 else x.flatten(0, 1)[:, None]
    pictures = (255 * grouped).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    decoded = np.stack([_through_jpeg(picture, c) for picture in pictures])
    return torch.from_numpy(decoded).to(x).permute(0, 3, 1, 2).div(255).reshape(x.shape)


def _through_jpeg(picture: np.ndarray[Any, Any], quality: int) -> np.ndarray[Any, Any]:
    """A picture (h w c, 8 bits, one channel or three), encoded and decoded."""
    file = io.BytesIO()
    Image.fromarray(picture if picture.shape[2] == 3 else picture[:, :, 0]).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(picture.shape)


def _gray(x: Tensor) -> Tensor:
    """Luminance, b 1 h w."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(GRAY).view(3, 1, 1)).sum(1, keepdim=True)


def _blur(x: Tensor, sigma: float, truncate: float) -> Tensor:
    """A Gaussian, cut off at `truncate` sigma; images are continued by reflection."""
    rows, columns = (_gaussian(n, sigma, int(truncate * sigma + 0.5)).to(x) for n in x.shape[2:])
    return rows @ x @ columns.T


def _gaussian(n: int, sigma: float, reach: int) -> Tensor:
    taps = torch.arange(-reach, reach + 1)
    weights = (-taps.double().square() / (2 * sigma**2)).exp()
    source = (torch.arange(n)[:, None] + taps) % (2 * n)
    source = source.minimum(2 * n - 1 - source)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, source, (weights / weights.sum()).expand(n, -1))


def _zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarged about the center, linearly interpolated."""
    rows, columns = (_enlarge(n, factor).to(x) for n in x.shape[2:])
    return rows @ x @ columns.T


def _enlarge(n: int, factor: float) -> Tensor:
    at = torch.arange(n, dtype=torch.float64)
    source = (at - (n - 1) / 2) / factor + (n - 1) / 2
    return (1 - (source[:, None] - at).abs()).clamp_min(0)


def _smear(x: Tensor, radius: int, sigma: float, angle: Tensor, s: float) -> Tensor:
    """Half a Gaussian along a direction (degrees, shape b), in steps of a pixel, each rounded to whole pixels."""
    steps = 2 * math.ceil(radius * s) + 1
    weights = [math.exp(-(k**2) / (2 * (sigma * s) ** 2)) for k in range(steps)]
    right, down = angle.deg2rad().cos()[:, None, None], angle.deg2rad().sin()[:, None, None]
    found = torch.zeros_like(x)
    for k, weight in enumerate(weights):
        found += weight / sum(weights) * _pixels(x, (k * down).round().long(), (k * right).round().long())
    return found


def _pixels(x: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """The pixel at these whole distances from each (broadcast to b h w); the border's continue beyond it."""
    height, width = x.shape[2:]
    rows = (torch.arange(height, device=x.device)[:, None] + down).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) + right).clamp(0, width - 1)
    places = (rows * width + columns)[:, None].expand(-1, x.shape[1], -1, -1)
    return x.flatten(2).gather(2, places.flatten(2)).view_as(x)


def _sample(x: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Linearly interpolated at these places (b h w, in pixels); images are continued by reflection."""
    height, width = x.shape[2:]
    grid = torch.stack([2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1], 3)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=True)


def _fractal(x: Tensor, decay: float, draws: Draws) -> Tensor:
    """A plasma fractal for each image, from 0 to 1, b 1 h w."""
    height, width = x.shape[2:]
    side = 2 ** math.ceil(math.log2(max(height, width)))
    return plasma(draws.uniform(-1, 1, side, side), decay)[:, None, :height, :width]


def plasma(noise: Tensor, decay: float) -> Tensor:
    """Diamond-square on a torus (b n n, n a power of 2): midpoints are the mean of four neighbors plus the noise of
    their place, whose size falls by the factor decay^2 from level to level. The result runs from 0 to 1."""
    size, level, step = noise.shape[-1], torch.zeros_like(noise), noise.shape[-1]
    wibble = 1.0
    while step >= 2:
        half = step // 2
        corner = level[:, ::step, ::step]
        pair = corner + corner.roll(-1, 1)
        center = (pair + pair.roll(-1, 2)) / 4 + wibble * noise[:, half::step, half::step]
        for of, (row, column), axis in ((corner, (0, half), 2), (corner, (half, 0), 1)):
            four = of + of.roll(-1, axis) + center + center.roll(1, 3 - axis)
            level[:, row::step, column::step] = four / 4 + wibble * noise[:, row::step, column::step]
        level[:, half::step, half::step] = center
        step, wibble = half, wibble / decay**2
    low, high = level.amin((1, 2), keepdim=True), level.amax((1, 2), keepdim=True)
    return (level - low) / (high - low) if size > 1 else level


Operation = tuple[Callable[[Tensor, Any, Draws, float], Tensor], tuple[Any, Any, Any, Any, Any]]

# the operation, and its constants at severity 1 to 5
CORRUPTIONS: dict[str, Operation] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (_glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (6, 11, 15, 20, 25)),
    "snow": (
        _snow,
        (
            Snow(0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            Snow(0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            Snow(0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            Snow(0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            Snow(0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        _elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg_compression, (80, 65, 58, 50, 40)),
}
