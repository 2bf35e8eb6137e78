"""matplotlib figures in the style of the page, and a figure with all that a reader needs: `Plot`."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from bench.atomic import write_atomic
from bench.report.svg import INK, MARK, PART, inline
from bench.tables.text import csv_text

GRID = "#8c959f"
# the colors of Okabe and Ito that are visible on white and on black; after six lines the dashes change
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("-", "--", ":")
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}  # and as text
MAX_LINES = 12  # lines of a figure; its table has all
FEWEST = 3  # points: a figure of fewer shows no more than the table and is not drawn
MAX_NAMES, KEY_WIDTH = 16, 3.4  # entries of the legend of a written figure, and inches that it takes
SHADES = 20  # steps of the color of a cell
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.0, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID, "grid.alpha": 0.35, "grid.linewidth": 0.6,
    "path.simplify": True,
}  # fmt: skip


class Entry(NamedTuple):
    """A line of a legend. `style`: color, linestyle and marker; `mark`: of the model that it names."""

    label: str
    style: dict[str, Any]
    mark: str = ""

    @property
    def dashes(self) -> str:
        """Of its line, as SVG has them; empty where it has only a marker."""
        return {"-": "24 0", "--": "6 3", ":": "2 2"}.get(self.style["linestyle"], "")

    @property
    def glyph(self) -> str:
        """Its marker as text."""
        return MARKERS[self.style["marker"]]


@dataclass(frozen=True)
class Plot:
    """One figure, its caption, and its numbers as a table for readers who cannot see it (`alt`: for a screen reader).

    - `behind`: for each line of the table the keys of the evaluations that a cell was computed from, by column; those
      at column 0 belong to the whole line. `marks`: for each line the mark of its model.
    - `data`: lines of the CSV where they differ from the table.
    - `key`: the legend, which the page shows beside the figure or below it.
    - `shades`: shares in [0,1] of the cells after the first of each line. The page then shows the table in colors; its
      figure is only written.
    - `strips`: likewise, for images.
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
    key: Sequence[Entry] = ()
    marks: Sequence[str] = ()
    shades: Sequence[Sequence[float]] = ()
    strips: Any = None

    def svg(self) -> str:
        """SVG for the page, one for each panel."""
        content = _saved(self.drawing, "svg", self.name)
        found = [part.bbox.transformed(self.drawing.transFigure.inverted()) for part in self.drawing.subfigs]
        return inline(content, self.name, self.alt, [(b.x0, 1 - b.y1, b.width, b.height) for b in found])

    def shade(self, line: int, column: int) -> str:
        """The class of a cell's color; empty where it has none."""
        share = self.shades[line][column - 1] if self.shades and column else math.nan
        return "" if math.isnan(share) else f"h{round(SHADES * share)}"

    def write(self, folder: Path) -> list[Path]:
        """SVG, PNG and CSV on white, for papers and slides; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.key and not self.drawing.legends:
            more = len(self.key) - MAX_NAMES
            shown = [Line2D([], [], label=e.label, markersize=4, **e.style) for e in self.key[:MAX_NAMES]]
            shown += [Line2D([], [], label=f"and {more} more", linestyle="none")] if more > 0 else []
            self.drawing.set_figwidth(self.drawing.get_figwidth() + KEY_WIDTH)
            legend(self.drawing, handles=shown)
        lines: list[dict[str, object]] = [dict(zip(self.header, line, strict=True)) for line in self.lines]
        contents = {
            "svg": re.sub(rb' id="(?:mark|part)-\w*"', b"", _saved(self.drawing, "svg", self.name, facecolor="white")),
            "png": _saved(self.drawing, "png", self.name, facecolor="white", dpi=150),
            "csv": csv_text(list(self.data) or lines).encode(),
        }
        for suffix, content in contents.items():
            write_atomic(folder / f"{self.name}.{suffix}", lambda file, content=content: file.write(content))  # type: ignore[misc]
        return [folder / f"{self.name}.{suffix}" for suffix in contents]


def page_style() -> AbstractContextManager[None]:
    """Settings of matplotlib under which figures of the page are created and saved."""
    return matplotlib.rc_context(STYLE)


def panels(marks: Sequence[str], across: int, width: float, height: float) -> tuple[Figure, list[SubFigure]]:
    """A figure with a panel for each mark (empty: of no one model) of this size in inches, `across` in a row, in the
    style of the page, which shows each panel as a drawing of its own."""
    across = min(len(marks), across)
    down = -(-len(marks) // across)
    with page_style():
        figure = Figure(figsize=(width * across, height * down), layout="constrained")
        found = list(figure.subfigures(down, across, squeeze=False).flat)
    for part, mark in zip(found, marks, strict=False):
        part.set_gid(PART + mark)
    return figure, found[: len(marks)]


def axes_of(figure: Figure | SubFigure) -> Axes:
    """The one pair of axes of a figure or of a panel, with a grid behind it."""
    with page_style():
        axes = figure.add_subplot()
    axes.grid(True)
    axes.set_axisbelow(True)
    return axes


def single(width: float = 5.8, height: float = 3.8) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; by default as wide as text that a phone can show."""
    with page_style():
        figure = Figure(figsize=(width, height), layout="constrained")
    return figure, axes_of(figure)


def line_style(k: int) -> dict[str, Any]:
    """Color, dashes and marker of the k-th line of a figure."""
    color, dash = COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)]
    return {"color": color, "linestyle": dash, "marker": list(MARKERS)[k % len(MARKERS)]}


def curve(axes: Axes, points: Sequence[tuple[float, ...]], mark: str, **style: Any) -> None:
    """A line through (x, y, low, high) over a band from low to high, of the model with this mark."""
    x, y, low, high = zip(*points, strict=True)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.09, linewidth=0, gid=MARK + mark)
    axes.plot(x, y, **style, gid=MARK + mark)


def legend(figure: Figure, **options: Any) -> None:
    """The legend to the right of the axes. `options`: of matplotlib's `Figure.legend`."""
    figure.legend(frameon=False, labelcolor=INK, fontsize=9, loc="outside right upper", **options)


def slug(*parts: str) -> str:
    """A file name from names of records: letters, digits and dashes alone."""
    return "-".join(filter(None, (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:40] for part in parts)))


def distinct(names: list[str]) -> list[str]:
    """The same names; where one occurs again, a number is added to it."""
    seen = Counter[str]()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-again{seen[name]}")
    return found


def unique(plots: list[Plot]) -> list[Plot]:
    """The same plots under distinct names."""
    names = distinct([plot.name for plot in plots])
    return [replace(plot, name=name) for plot, name in zip(plots, names, strict=True)]


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
