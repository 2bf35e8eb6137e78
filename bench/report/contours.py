"""Filled contours as short paths, without seams between the colors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.path import Path

    Array = np.ndarray[Any, Any]

LEVELS = (10, 6, 3, 2)  # colors; a rough surface gets fewer, as its paths are long
POINTS = 300  # of all paths of one drawing: some 3 kB
STRAY = 0.002  # how far a path may stray from the contour, as a share of the drawing's width


def fill(axes: Axes, at: Array, values: Array) -> None:
    """Color the square of `at` x `at` by `values` (the first axis runs to the right), from the lowest in dark to the
    highest in bright. What varies by less than rounding is one color."""
    from matplotlib import colormaps

    low, high = float(values.min()), float(values.max())
    flat = high - low <= 1e-6 * max(abs(high), 1)
    axes.set_facecolor(colormaps["cividis"](0.0))
    for count in () if flat else LEVELS:
        if _drawn(axes, at, values, low, high, count) <= POINTS:
            break


def _drawn(axes: Axes, at: Array, values: Array, low: float, high: float, count: int) -> int:
    """In place of what was there: where the values are above each level, one on top of the other; gives the points."""
    import numpy as np
    from matplotlib import colormaps

    for old in list(axes.collections):
        old.remove()
    points = 0
    for k, level in enumerate(np.linspace(low, high, count + 1)[1:-1], start=1):
        color = colormaps["cividis"](k / (count - 1))
        region = axes.contourf(at, at, values.T, levels=[level, high], colors=[color])
        for path in region.get_paths():
            shorten(path, STRAY * float(at[-1] - at[0]))
            points += len(np.asarray(path.vertices))
    return points


def shorten(path: Path, stray: float) -> None:
    """Leave out points, in place, so that none of them lies further than this from the path that is left."""
    import numpy as np

    points, codes = np.asarray(path.vertices), np.asarray(path.codes)
    kept = [0]
    for k in range(1, len(points)):
        inner = k + 1 < len(points) and codes[k] == path.LINETO and codes[k + 1] == path.LINETO
        if not inner or _away(points[kept[-1] : k + 2]) > stray:
            kept.append(k)
    path.vertices, path.codes = points[kept], codes[kept]


def _away(points: Array) -> float:
    """How far the points between the first and the last one are from the line through these."""
    import numpy as np

    chord, others = points[-1] - points[0], points[1:-1] - points[0]
    length = float(np.hypot(*chord))
    if length == 0:
        return float(np.hypot(*others.T).max())
    return float(np.abs(chord[0] * others[:, 1] - chord[1] * others[:, 0]).max()) / length
