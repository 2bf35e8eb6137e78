"""matplotlib figures in the style of the page, and a figure with all that a reader needs: `Plot`."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench.atomic import write_atomic
from bench.report.svg import INK, inline
from bench.tables.text import csv_text

GRID = "#8c959f"
# the colors of Okabe and Ito that are visible on white and on black; after six lines the dashes change
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MAX_LINES = 12  # lines of a figure; its table has all
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.0, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID, "grid.alpha": 0.35, "grid.linewidth": 0.6,
    "path.simplify": True,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One figure, its caption, and its numbers as a table for readers who cannot see it (`alt`: for a screen reader).

    `behind`: for each line of the table the keys of the evaluations that a cell was computed from, by column; those at
    column 0 belong to the whole line. `data`: lines of the CSV where it holds more than the table.
    """

    name: str
    title: str
    alt: str
    caption: str
    header: Sequence[str]
    lines: Sequence[Sequence[object]]
    drawing: Figure
    dataset: str = ""
    threat: str = ""
    behind: Sequence[Mapping[int, Sequence[str]]] = ()
    data: Sequence[dict[str, object]] = ()

    def svg(self) -> str:
        """SVG for the page."""
        return inline(_saved(self.drawing, "svg", self.name), self.name, self.alt)

    def write(self, folder: Path) -> list[Path]:
        """SVG, PNG and CSV on white, for papers and slides; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        lines: list[dict[str, object]] = [dict(zip(self.header, line, strict=True)) for line in self.lines]
        contents = {
            "svg": _saved(self.drawing, "svg", self.name, facecolor="white"),
            "png": _saved(self.drawing, "png", self.name, facecolor="white", dpi=150),
            "csv": csv_text(list(self.data) or lines).encode(),
        }
        for suffix, content in contents.items():
            write_atomic(folder / f"{self.name}.{suffix}", lambda file, content=content: file.write(content))  # type: ignore[misc]
        return [folder / f"{self.name}.{suffix}" for suffix in contents]


def page_style() -> AbstractContextManager[None]:
    """Settings of matplotlib under which figures of the page are created and saved."""
    return matplotlib.rc_context(STYLE)


def panels(count: int, across: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes of this size in inches, `across` in a row, in the style of the page."""
    across = min(count, across)
    down = -(-count // across)
    with page_style():
        figure = Figure(figsize=(width * across, height * down), layout="constrained")
        found = [figure.add_subplot(down, across, k + 1) for k in range(count)]
    for axes in found:
        axes.grid(True)
        axes.set_axisbelow(True)
    return figure, found


def single(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes."""
    figure, (axes,) = panels(1, 1, width, height)
    return figure, axes


def line_style(k: int) -> dict[str, Any]:
    """Color, dashes and marker of the k-th line of a figure."""
    color, dash = COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)]
    return {"color": color, "linestyle": dash, "marker": MARKERS[k % len(MARKERS)]}


def curve(axes: Axes, points: Sequence[tuple[float, ...]], **style: Any) -> None:
    """A line through (x, y, low, high) over a band from low to high."""
    x, y, low, high = zip(*points, strict=True)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.09, linewidth=0)
    axes.plot(x, y, **style)


def legend(figure: Figure, corner: str, **options: Any) -> None:
    """The legend beside the axes. `options`: of matplotlib's `Figure.legend`."""
    style: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 9, "loc": f"outside {corner}"}
    figure.legend(**style | options)


def slug(*parts: str) -> str:
    """A file name from names of records: letters, digits and dashes alone."""
    return "-".join(filter(None, (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:40] for part in parts)))


def unique(plots: list[Plot]) -> list[Plot]:
    """The same plots; where a name occurs again, a number is added to it."""
    seen: dict[str, int] = {}
    found = []
    for plot in plots:
        seen[plot.name] = count = seen.get(plot.name, 0) + 1
        found.append(plot if count == 1 else replace(plot, name=f"{plot.name}-again{count}"))
    return found


def _saved(figure: Figure, kind: str, salt: str, **options: Any) -> bytes:
    """The figure as bytes that depend only on what it shows."""
    file = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name may contain dollar signs; texts made while saving follow the style below
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with warnings.catch_warnings(), matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        warnings.simplefilter("ignore")  # a character that its font lacks: the browser has others
        figure.savefig(file, format=kind, metadata=metadata, **options)
    content = file.getvalue()
    if kind == "svg":  # matplotlib's ids of clip paths are hashes of unrounded coordinates, which differ between runs
        for k, name in enumerate(re.findall(rb'<clipPath id="(\w+)"', content)):
            content = content.replace(name, b"clip%d" % k)
    return content
