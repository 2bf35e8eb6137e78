"""What robustness costs: clean accuracy and training time against the worst case, with the Pareto lines."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.report.board import Board
from bench.report.canvas import COLORS, MARKERS, Plot, drawn, slug
from bench.report.captions import called, conditions, seeds_of
from bench.report.provenance import of_clean, of_training, of_worst
from bench.report.svg import INK
from bench.report.text import joined, short
from bench.results.cost import busy
from bench.results.rows import Row
from bench.tables.pareto import footing, fronts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 16  # points named beside the drawing, those of the Pareto line first; all are in the table


def clean_against_robust(found: list[Board]) -> list[Plot]:
    """One for each table with at least two rows that have both numbers."""
    title, label = "Clean against robust", "Clean accuracy (%)"
    return [plot for board in found if (plot := _scatter(board, "clean", title, label, _clean)) is not None]


def cost_against_robust(found: list[Board]) -> list[Plot]:
    """Training seconds, of all trainings that were timed."""
    title, label = "Cost against robust", "Training time (s)"
    return [plot for board in found if (plot := _scatter(board, "seconds", title, label, _seconds)) is not None]


def _clean(row: Row) -> float:
    return 100 * row.clean.mean


def _seconds(row: Row) -> float:
    return row.train_seconds


def _classes(rows: list[Row], kind: str) -> dict[str, list[Row]]:
    """Rows that may be compared (`bench.tables.pareto`), by what tells their class from the others here."""
    members: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        members.setdefault(footing(row, kind), []).append(row)
    facts = [_facts(each[0], kind) for each in members.values()]
    differ = [k for k in range(len(facts[0])) if len({each[k] for each in facts}) > 1]
    found: dict[str, list[Row]] = {}
    for place, (each, members_) in enumerate(zip(facts, members.values(), strict=True), 1):
        name = ", ".join(each[k] for k in differ) or "all"
        found[f"{name} ({place})" if name in found else name] = members_  # other images, of which no name tells
    return found


def _facts(row: Row, kind: str) -> tuple[str, ...]:
    trainings = [e for by in row.entries.values() for e in by.values()]
    data = joined(sorted({int(e.train_images) for e in trainings}))
    shared = "" if not row.shared else "shared machine" if all(map(busy, trainings)) else "partly shared machine"
    devices = joined(sorted({str(e.train_device) for e in trainings}))
    timed = (f"{data} training images", devices, shared or "machine of its own") if kind == "seconds" else ()
    return row.model, f"n {row.worst.n}", "provisional" if row.provisional else "ranked", *timed


def _logarithmic(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    # not matplotlib's own: that one writes formulas
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _of_x(rows: list[Row], kind: str) -> str:
    """What the numbers along the axis rest on: they may be of more seeds, or images, than the worst case is."""
    if kind == "seconds":
        trainings = [e for row in rows for by in row.entries.values() for e in by.values()]
        seeds = sorted({e.seed for e in trainings if not math.isnan(e.train_seconds)})
        return f" Times are means over seeds {joined(seeds)}."
    sizes = joined(row.clean.n for row in rows)
    return f" Clean accuracy: n {sizes}, mean over seeds {seeds_of(row.clean for row in rows)}."


def _scatter(board: Board, kind: str, title: str, label: str, x_of: Callable[[Row], float]) -> Plot | None:
    rows = [row for row in board.rows if row.worst.values and not math.isnan(x_of(row))]
    if len(rows) < 2:
        return None
    figure, axes = drawn(9.2, 4.4)
    classes, found = _classes(rows, kind), fronts(board.rows)
    on_line = {id(row): found.get(id(row), {}).get(kind) for row in rows}
    for k, (name, members) in enumerate(classes.items()):
        color, marker = COLORS[k % len(COLORS)], MARKERS[k % len(MARKERS)]
        points = [(x_of(row), 100 * row.worst.mean) for row in members]
        low, high = zip(*(row.worst.interval() for row in members), strict=True)
        x, y = zip(*points, strict=True)
        axes.vlines(x, [100 * v for v in low], [100 * v for v in high], color=color, linewidth=1.0, alpha=0.3)
        axes.plot(x, y, marker, color=color, markersize=5, label=short(name, 50))
        front = sorted(point for point, row in zip(points, members, strict=True) if on_line[id(row)])
        if front:
            axes.plot(*zip(*front, strict=True), "-", color=color, linewidth=1.2)
    for place, row in enumerate(rows, 1):
        axes.annotate(
            str(place), (x_of(row), 100 * row.worst.mean), (4, 3), textcoords="offset points", fontsize=7.5, color=INK
        )
    first = [(not on_line[id(row)], place, row) for place, row in enumerate(rows, 1)]
    listed = [f"{place}  {short(called(row), 40)}" for _, place, row in sorted(first, key=lambda t: t[:2])[:NAMED]]
    listed += [f"and {len(rows) - NAMED} more: see the table"] if len(rows) > NAMED else []
    axes.text(1.02, 1.0, "\n".join(listed), transform=axes.transAxes, va="top", fontsize=8.5, color=INK)
    axes.set_xlabel(label)
    axes.set_ylabel("Worst-case accuracy (%)")
    if kind == "seconds" and min(x_of(row) for row in rows) > 0:
        _logarithmic(axes)
    if len(classes) > 1:
        figure.legend(loc="outside lower left", frameon=False, labelcolor=INK, fontsize=9, ncols=2)
    class_of = {id(row): name for name, members in classes.items() for row in members}
    return Plot(
        slug("cost" if kind == "seconds" else kind, board.dataset, board.threat, board.kind),
        f"{title}: {board.dataset}, {board.threat}, {board.kind.lower()}",
        f"Scatter chart of {label} against worst-case accuracy for {len(rows)} models; its numbers are in the table.",
        "A line joins models that none of its color beats in both, the Pareto front of the table (UNSOUND ones are on "
        "none); a color is what may be compared: one architecture, ranked or provisional, on the same images"
        + (", timed alike. " if kind == "seconds" else ". ")
        + "Bars are 95 % Wilson intervals. " + conditions(rows)
        + _of_x(rows, kind),
        ["point", "defense", label, "worst case (%)", "on the Pareto line", "compared among"],
        [
            [
                place, called(row), round(x_of(row), 2), round(100 * row.worst.mean, 2),
                {True: "yes", False: "no", None: "–"}[on_line[id(row)]], class_of[id(row)],
            ]
            for place, row in enumerate(rows, 1)
        ],
        figure,
        board.dataset,
        board.threat,
        [{2: of_training(row) if kind == "seconds" else of_clean(row), 3: of_worst(row)} for row in rows],
    )  # fmt: skip
