"""What robustness costs: clean accuracy and training time against the worst case, with the Pareto line."""

from __future__ import annotations

import math
from collections.abc import Callable

from bench.analysis.pareto import pareto
from bench.analysis.rows import Row
from bench.report.board import Board
from bench.report.canvas import COLOURS, MARKERS, Plot, drawn, slug
from bench.report.captions import called, conditions, seeds_of
from bench.report.svg import INK
from bench.report.text import joined, short
from bench.report.where import of_clean, of_training, of_worst

NAMED = 16  # points named beside the drawing, those of the Pareto line first; all are in the table


def clean_against_robust(found: list[Board]) -> list[Plot]:
    """One for each table with at least two rows that have both numbers."""
    title, label = "Clean against robust", "Clean accuracy (%)"
    return [
        plot for board in found if (plot := _scatter(board, "clean", title, label, _clean, lambda row: "")) is not None
    ]


def cost_against_robust(found: list[Board]) -> list[Plot]:
    """Training seconds; times of other devices, or of a machine that did other jobs, are never on one Pareto line."""
    title, label = "Cost against robust", "Training time (s)"
    return [plot for board in found if (plot := _scatter(board, "cost", title, label, _seconds, _timed)) is not None]


def _clean(row: Row) -> float:
    return 100 * row.clean.mean


def _seconds(row: Row) -> float:
    return row.train_seconds


def _timed(row: Row) -> str:
    return f"{row.device}{', shared machine' if row.shared else ''}"


def _of_x(rows: list[Row], kind: str) -> str:
    """What the numbers along the axis rest on: they may be of more seeds, or images, than the worst case is."""
    if kind == "cost":
        trainings = [e for row in rows for by in row.entries.values() for e in by.values()]
        seeds = sorted({e["seed"] for e in trainings if not math.isnan(e["train_seconds"])})
        return f" Times are means over seeds {joined(seeds)}."
    sizes = joined(row.clean.n for row in rows)
    return f" Clean accuracy: n {sizes}, mean over seeds {seeds_of(row.clean for row in rows)}."


def _scatter(
    board: Board, kind: str, title: str, label: str, x_of: Callable[[Row], float], class_of: Callable[[Row], str]
) -> Plot | None:
    rows = [row for row in board.rows if row.worst.values and not math.isnan(x_of(row))]
    if len(rows) < 2:
        return None
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = drawn(9.2, 4.4)
    classes = list(dict.fromkeys(class_of(row) for row in rows))
    sign = -1.0 if kind == "cost" else 1.0  # of a cost the smaller is the better
    fronts: set[int] = set()
    for k, name in enumerate(classes):
        members = [row for row in rows if class_of(row) == name]
        colour = COLOURS[k % len(COLOURS)]
        x, y = [x_of(row) for row in members], [100 * row.worst.mean for row in members]
        low, high = zip(*(row.worst.interval() for row in members), strict=True)
        axes.vlines(x, [100 * v for v in low], [100 * v for v in high], color=colour, linewidth=1.0, alpha=0.3)
        axes.plot(x, y, MARKERS[k % len(MARKERS)], color=colour, markersize=5, label=short(name, 50) or None)
        sound = [row for row in members if row.verdict != "UNSOUND"]
        front = [sound[i] for i in pareto([(sign * x_of(row), row.worst.mean) for row in sound])]
        front.sort(key=x_of)
        fronts |= {id(row) for row in front}
        axes.plot(
            [x_of(row) for row in front], [100 * row.worst.mean for row in front], "-", color=colour, linewidth=1.2
        )
    for place, row in enumerate(rows, 1):
        axes.annotate(
            str(place), (x_of(row), 100 * row.worst.mean), (4, 3), textcoords="offset points", fontsize=7.5, color=INK
        )
    first = [(id(row) not in fronts, place, row) for place, row in enumerate(rows, 1)]
    listed = [f"{place}  {short(called(row), 40)}" for _, place, row in sorted(first, key=lambda t: t[:2])[:NAMED]]
    listed += [f"and {len(rows) - NAMED} more: see the table"] if len(rows) > NAMED else []
    axes.text(1.02, 1.0, "\n".join(listed), transform=axes.transAxes, va="top", fontsize=8.5, color=INK)
    axes.set_xlabel(label)
    axes.set_ylabel("Worst-case accuracy (%)")
    if kind == "cost" and min(x_of(row) for row in rows) > 0:
        axes.set_xscale("log")
        # not matplotlib's own: that one writes formulas
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    if len(classes) > 1:
        figure.legend(loc="outside lower left", frameon=False, labelcolor=INK, fontsize=9, ncols=2)
    return Plot(
        slug(kind, board.dataset, board.threat, board.kind),
        f"{title}: {board.dataset}, {board.threat}, {board.kind.lower()}",
        f"Scatter chart of {label} against worst-case accuracy for {len(rows)} models; its numbers are in the table.",
        "The line joins models that no other beats in both (UNSOUND ones left out); bars are 95 % Wilson intervals. "
        + ("Each device and load has a line of its own. " if kind == "cost" else "") + conditions(rows)
        + _of_x(rows, kind),
        ["point", "defense", label, "worst case (%)", "on the Pareto line", "timed on"],
        [
            [
                place, called(row), round(x_of(row), 2), round(100 * row.worst.mean, 2),
                "yes" if id(row) in fronts else "no", _timed(row),
            ]
            for place, row in enumerate(rows, 1)
        ],
        figure,
        board.dataset,
        board.threat,
        [{2: of_training(row) if kind == "cost" else of_clean(row), 3: of_worst(row)} for row in rows],
    )  # fmt: skip
