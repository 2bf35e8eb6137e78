"""matplotlib drawings -> SVG that obeys the page: its text color, its content policy, its fonts."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.atomic import write_atomic
from bench.report.svg import INK, inline
from bench.tables.flat import csv_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = "#8c959f"
# Okabe and Ito's colors that are seen on white and on black; dashes tell the second round apart
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("-", "--", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MOST = 12  # lines of a figure; its table has all
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10.0, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID, "grid.alpha": 0.35, "grid.linewidth": 0.6,
    "path.simplify": True,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One figure with all that is needed to read it without seeing it: what it shows, and its numbers as a table."""

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
    """Of each line the keys that its cells rest on, by column; those at 0 are of the line as a whole."""
    data: Sequence[dict[str, object]] = ()
    """What stands in the CSV instead of the table, where a page has no room for all of it."""

    def svg(self) -> str:
        """SVG for the page."""
        return inline(_saved(self.drawing, "svg", self.name), self.name, self.alt)

    def write(self, folder: Path) -> list[Path]:
        """SVG, PNG and CSV on white, for papers and slides."""
        folder.mkdir(parents=True, exist_ok=True)
        lines: list[dict[str, object]] = [dict(zip(self.header, line, strict=True)) for line in self.lines]
        contents = {
            "svg": _saved(self.drawing, "svg", self.name, facecolor="white"),
            "png": _saved(self.drawing, "png", self.name, facecolor="white", dpi=150),
            "csv": csv_text(list(self.data) or lines).encode(),
        }
        written = []
        for suffix, content in contents.items():
            path = folder / f"{self.name}.{suffix}"
            write_atomic(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
            written.append(path)
        return written


def drawn(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty drawing in the style of the page; no window system is asked."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True)
        axes.set_axisbelow(True)
    return figure, axes


def panels(count: int, across: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Small drawings of this size beside and below each other, in the style of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    down = -(-count // across)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * min(count, across), height * down), layout="constrained")
        places = [figure.add_subplot(down, min(count, across), k + 1) for k in range(count)]
    for axes in places:
        axes.grid(True)
        axes.set_axisbelow(True)
    return figure, places


def slug(*parts: str) -> str:
    """A file name from names of records: letters, digits and dashes alone."""
    return "-".join(filter(None, (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:40] for part in parts)))


def unique(plots: list[Plot]) -> list[Plot]:
    """The same plots, those of one name told apart by a number."""
    from dataclasses import replace

    seen: dict[str, int] = {}
    found = []
    for plot in plots:
        seen[plot.name] = count = seen.get(plot.name, 0) + 1
        found.append(plot if count == 1 else replace(plot, name=f"{plot.name}-again{count}"))
    return found


def _saved(figure: Figure, kind: str, salt: str, **options: Any) -> bytes:
    """The drawing as bytes that depend on nothing but what is drawn."""
    import matplotlib
    from matplotlib.text import Text

    file = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name may hold dollars; those made while saving heed the style below
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with warnings.catch_warnings(), matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        warnings.simplefilter("ignore")  # a character that its font lacks: the browser has others
        figure.savefig(file, format=kind, metadata=metadata, **options)
    return file.getvalue()
