"""Filled contours as short paths, without seams between the colors."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.transforms import Affine2D

Array = np.ndarray[Any, Any]

LEVELS = (10, 6, 3, 2)  # colors; a rough surface gets fewer, as its paths are long
MAX_POINTS = 300  # of all paths of one drawing: some 3 kB
TOLERANCE = 0.002  # how far a path may lie from the contour, as a share of the drawing's width


def fill(axes: Axes, at: Array, values: Array) -> None:
    """Color the square of `at` x `at` by `values` (the first axis runs to the right), from the lowest in dark to the
    highest in bright. What varies by less than rounding is one color."""
    low, high = float(values.min()), float(values.max())
    flat = high - low <= 1e-6 * max(abs(high), 1)
    axes.set_facecolor(colormaps["cividis"](0.0))
    for count in () if flat else LEVELS:
        if _draw(axes, at, values, np.linspace(low, high, count + 1)) <= MAX_POINTS:
            break


def _draw(axes: Axes, at: Array, values: Array, levels: Array) -> int:
    """Replace the contours: where the values are above each level, one on top of the other; returns the points."""
    for old in list(axes.collections):
        old.remove()
    points, colors = 0, colormaps["cividis"](np.linspace(0, 1, len(levels) - 1))
    for level, color in zip(levels[1:-1], colors[1:], strict=True):
        region = axes.contourf(at, at, values.T, levels=[level, levels[-1]], colors=[color])
        region.set_paths([simplified(path, TOLERANCE * float(at[-1] - at[0])) for path in region.get_paths()])
        # one box for all levels is shorter than a clip path for each
        region.set_clip_path(None)
        region.set_clip_box(axes.bbox)
        points += sum(len(np.asarray(path.vertices)) for path in region.get_paths())
    return points


def simplified(path: Path, tolerance: float) -> Path:
    """The path with fewer points, which lies within about this distance of the original."""
    path.simplify_threshold = 1.0  # in units of the scaled path
    found = path.cleaned(Affine2D().scale(1 / tolerance), simplify=True)
    points, codes = np.asarray(found.vertices), np.asarray(found.codes)
    return Path(points[:-1] * tolerance, codes[:-1])  # the last one is a mark of the end
