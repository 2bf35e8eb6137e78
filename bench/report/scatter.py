"""Clean accuracy and the cost of training against the worst case, with the Pareto fronts of the tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bench.report.board import Board
from bench.report.canvas import COLORS, FEWEST, MARKERS, Entry, Plot, single
from bench.report.captions import conditions, joined, mark_of, row_label, seeds_of, short
from bench.report.provenance import of_clean, of_training, of_worst
from bench.report.svg import INK, MARK
from bench.results.cost import busy
from bench.results.rows import Row
from bench.tables.pareto import footing, fronts

# name, title and label of each kind of figure, and what it shows of a row
FIGURES: dict[str, tuple[str, str, str, Callable[[Row], float]]] = {
    "clean": ("clean", "Clean", "Clean accuracy (%)", lambda row: 100 * row.accuracy.clean.mean),
    "seconds": ("cost", "Cost", "Training time (s)", lambda row: row.cost.train_seconds),
    "work": ("cost", "Cost", "Work of the training (F per training image)", lambda row: row.cost.train_work),
}


def clean_against_robust(boards: list[Board]) -> list[Plot]:
    """One figure for each table with at least three rows that have both numbers."""
    return [plot for board in boards for plot in _scatter(board, "clean")]


def cost_against_robust(boards: list[Board]) -> list[Plot]:
    """The same with the training time in seconds; with the work of the training where a machine did other jobs too."""
    kinds = [("work" if any(row.cost.shared for row in board.rows) else "seconds", board) for board in boards]
    return [plot for kind, board in kinds for plot in _scatter(board, kind)]


def _scatter(board: Board, kind: str) -> list[Plot]:
    """The figure, if there are enough points for one."""
    name, title, label, x_of = FIGURES[kind]
    points = [(x_of(row), row) for row in board.rows if row.accuracy.worst.values and not math.isnan(x_of(row))]
    if len(points) < FEWEST:
        return []
    rows, cost = [row for _, row in points], name == "cost"
    classes, on_fronts = _classes(rows, kind), fronts(board.rows)
    on_front = [on_fronts.get(id(row), {}).get(kind) for row in rows]  # None: its class has no front
    drawing, key = _drawing(points, on_front, classes, label, cost)
    plot = board.plot(
        name,
        f"Scatter chart of {label} against worst-case accuracy for {len(rows)} models; its numbers are in the table.",
        "Lines are the Pareto fronts of the table: no model of the same color is better in both numbers (UNSOUND "
        "models are on none). Models of one color are comparable: same architecture and images, all ranked or all "
        f"provisional{', timed under the same conditions' if kind == 'seconds' else ''}. Bars are 95 % Wilson "
        f"intervals. {conditions(rows)}{_about_x(rows, kind)}",
        ["point", "defense", label, "worst case (%)", "on the Pareto front", "compared within"],
        [
            [
                k, row_label(row), round(x, 2), round(100 * row.accuracy.worst.mean, 2),
                {True: "yes", False: "no", None: "–"}[on], within,
            ]
            for k, ((x, row), on, within) in enumerate(zip(points, on_front, classes, strict=True), 1)
        ],
        drawing,
        [{2: of_training(row) if cost else of_clean(row), 3: of_worst(row)} for row in rows],
        title=f"{title} against robust: ",
        key=key,
        marks=[mark_of(row) for row in rows],
    )  # fmt: skip
    return [plot]


def _drawing(
    points: list[tuple[float, Row]], on_front: list[bool | None], classes: list[str], label: str, cost: bool
) -> tuple[Figure, list[Entry]]:
    """The chart, and its legend: the classes where there are several, then the models, those on a front first."""
    figure, axes = single()
    at = [(x, 100 * row.accuracy.worst.mean) for x, row in points]
    known = list(dict.fromkeys(classes))
    styles: dict[str, dict[str, Any]] = {
        name: {"color": COLORS[k % len(COLORS)], "marker": list(MARKERS)[k % len(MARKERS)], "linestyle": "none"}
        for k, name in enumerate(known)
    }
    for k, ((_, row), (x, y), name) in enumerate(zip(points, at, classes, strict=True), 1):
        (low, high), of = row.accuracy.worst.interval(), MARK + mark_of(row)
        axes.vlines(x, 100 * low, 100 * high, color=styles[name]["color"], linewidth=1.0, alpha=0.3, zorder=1.5, gid=of)
        axes.plot(x, y, **styles[name], markersize=5, gid=of)
        axes.annotate(str(k), (x, y), (4, 3), textcoords="offset points", fontsize=7.5, color=INK, gid=of)
    for name in known:
        front = sorted(at[i] for i, own in enumerate(classes) if own == name and on_front[i])
        if front:
            axes.plot(*zip(*front, strict=True), "-", color=styles[name]["color"], linewidth=1.2, zorder=1.5)
    key = [Entry(short(name, 50), styles[name]) for name in known if len(known) > 1]
    key += [
        Entry(f"{i + 1}  {short(row_label(points[i][1]), 44)}", styles[classes[i]], mark_of(points[i][1]))
        for i in sorted(range(len(points)), key=lambda i: not on_front[i])
    ]
    axes.set(xlabel=label, ylabel="Worst-case accuracy (%)")
    if cost and min(x for x, _ in points) > 0:
        _logarithmic(axes)
    return figure, key


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # the default one writes formulas
    axes.xaxis.set_minor_formatter(NullFormatter())


def _classes(rows: list[Row], kind: str) -> list[str]:
    """For each row the name of the class of rows that it may be compared with (`bench.tables.pareto`): the facts in
    which the classes of this figure differ."""
    members: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        members.setdefault(footing(row, kind), []).append(row)
    facts = [_facts(each[0], kind) for each in members.values()]
    differ = [k for k in range(len(facts[0])) if len({each[k] for each in facts}) > 1]
    names: dict[tuple[Any, ...], str] = {}
    for number, (key, each) in enumerate(zip(members, facts, strict=True), 1):
        name = ", ".join(each[k] for k in differ) or "all"
        # classes on other images differ in no fact that a name could give
        names[key] = f"{name} ({number})" if name in names.values() else name
    return [names[footing(row, kind)] for row in rows]


def _facts(row: Row, kind: str) -> tuple[str, ...]:
    facts = (row.model, f"n {row.accuracy.worst.n}", "provisional" if row.provisional else "ranked")
    if kind != "seconds":
        return facts
    trainings = row.evaluations
    data = joined(sorted({int(e.train_images) for e in trainings}))
    shared = "" if not row.cost.shared else "shared machine" if all(map(busy, trainings)) else "partly shared machine"
    devices = joined(sorted({str(e.train_device) for e in trainings}))
    return (*facts, f"{data} training images", devices, shared or "exclusive machine")


def _about_x(rows: list[Row], kind: str) -> str:
    """What the numbers along the axis are means of: they may be over more seeds or images than the worst case."""
    if kind != "clean":
        trainings = [e for row in rows for e in row.evaluations]
        seeds = sorted({e.seed for e in trainings if not math.isnan(e.train_seconds)})
        instead = "" if kind == "seconds" else " The machine did other jobs meanwhile: work stands in place of time."
        return f"{instead} {'Times' if kind == 'seconds' else 'Numbers'} are means over seeds {joined(seeds)}."
    cells = [row.accuracy.clean for row in rows]
    return f" Clean accuracy: n {joined(cell.n for cell in cells)}, mean over seeds {joined(seeds_of(cells))}."
