"""Figures of `bench sweep`: accuracy against a setting, and the setting of another defense that is as accurate."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes

from bench.report.canvas import COLORS, MARKERS, Plot, legend, single, slug
from bench.report.captions import conditions, short
from bench.results.seed_values import SeedValues
from bench.tables.equivalence import Match
from bench.tables.sweep import Series
from bench.tables.sweep_text import Map, lines, map_lines, map_title, title


def sweep_plot(series: Series) -> Plot:
    """A line for each column through the means, with 95 % intervals, each seed, and the range over seeds where every
    value has several. Collapsed seeds are crosses, `standard` is a dotted line."""
    figure, axes = single(8.6, 4.4)
    for k, name in enumerate(series.columns):
        _line(axes, series, name, COLORS[k % len(COLORS)], list(MARKERS)[k % len(MARKERS)])
    axes.set(xlabel=series.setting, ylabel="Accuracy (%)", ylim=(0, 102))
    legend(figure)
    found = lines(series)
    row, budget = series.row, "" if series.setting == "eps" else series.row.eps or ""
    return Plot(
        slug("sweep", series.defense, series.setting, row.dataset, row.model, row.norm or "", budget, series.fixed),
        title(series),
        f"Line chart of accuracy against {series.setting} for {len(series.points)} values; the table has its numbers.",
        f"Lines are means over seeds {', '.join(map(str, series.seeds))}, which all values have; bars are 95 % Wilson "
        "intervals of n images; small points are single seeds, crosses collapsed ones, and bands range from the lowest "
        "seed to the highest; hollow markers are unsound rows, dotted lines `standard`. "
        + conditions((p.row for p in series.points), cells=[c for p in series.points for c in p.cells.values()]),
        list(found[0]),
        [list(line.values()) for line in found],
        figure,
        row.dataset,
    )


def _line(axes: Axes, series: Series, name: str, color: str, marker: str) -> None:
    points = [p for p in series.points if name in p.cells and series.mean(p.cells[name]).values]
    if not points:
        return
    x, cells = [p.x for p in points], [p.cells[name] for p in points]
    means = [series.mean(cell) for cell in cells]
    y = [100 * cell.mean for cell in means]
    low, high = zip(*(cell.interval() for cell in means), strict=True)
    bars = _bars(y, [100 * v for v in low], [100 * v for v in high])
    axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=color, alpha=0.6)
    axes.plot(x, y, "-", color=color, linewidth=1.4)
    for p, m in zip(points, y, strict=True):
        face = "none" if p.row.verdict == "UNSOUND" else color
        axes.plot(p.x, m, marker, color=color, markerfacecolor=face, markersize=5)
    axes.plot([], [], marker, color=color, linestyle="-", markersize=5, label=short(name, 40))
    several = [cell for cell in cells if len(cell.values) > 1]
    if len(several) == len(cells) > 1:
        lowest, highest = ([100 * pick(cell.values.values()) for cell in cells] for pick in (min, max))
        axes.fill_between(x, lowest, highest, color=color, alpha=0.15, linewidth=0)
    for p in points:
        seeds = p.cells[name].values if len(p.cells[name].values) > 1 else {}
        for seed, v in seeds.items():
            lost = seed in p.row.accuracy.collapsed
            axes.plot(p.x, 100 * v, "x" if lost else ".", color=color, markersize=8 if lost else 3.5)
    base = series.mean(series.standard.cells[name]) if series.standard and name in series.standard.cells else None
    if base is not None and base.values:
        axes.axhline(100 * base.mean, color=color, linestyle=":", linewidth=1)


def _bars(y: list[float], low: list[float], high: list[float]) -> list[list[float]]:
    """Lengths of error bars; an end of an interval may lie a rounding error on the other side of its mean."""
    below = [max(m - v, 0) for m, v in zip(y, low, strict=True)]
    return [below, [max(v - m, 0) for m, v in zip(y, high, strict=True)]]


def map_plot(found: Map) -> Plot | None:
    """Matched values with their intervals, a color for each column; None where none lies within the range of B."""
    a, b, matches = found
    inside = [m for m in matches if math.isfinite(m.b)]
    if not inside:
        return None
    figure, axes = single(8.6, 4.4)
    ends = b.points[0].x, b.points[-1].x
    for k, name in enumerate(dict.fromkeys(m.column for m in inside)):
        members = [m for m in inside if m.column == name]
        x, y = [m.a for m in members], [m.b for m in members]
        bars = _bars(y, [max(m.low, ends[0]) for m in members], [min(m.high, ends[1]) for m in members])
        marker, color = list(MARKERS)[k % len(MARKERS)], COLORS[k % len(COLORS)]
        style: dict[str, Any] = {"color": color, "capsize": 2, "markersize": 5, "elinewidth": 0.9}
        axes.errorbar(x, y, yerr=bars, fmt=f"{marker}-", label=short(name, 40), **style)
        for m in (m for m in members if m.verdict == "UNSOUND"):
            axes.plot(m.a, m.b, marker, color=color, markerfacecolor="white", markersize=5, zorder=3)
    axes.set(xlabel=f"{a.defense} {a.setting}", ylabel=f"{b.defense} {b.setting} of the same accuracy")
    axes.set_ylim(bottom=0)
    legend(figure)
    numbers, place = map_lines(found), (a.row.dataset, a.row.norm or "", a.row.eps or "")
    return Plot(
        slug("map", a.defense, a.setting, b.defense, b.setting, *place, a.fixed),
        map_title(a, f"{b.defense} {b.setting}"),
        f"Chart of the {b.setting} of {b.defense} that is as accurate as each {a.setting} of {a.defense}.",
        f"The smallest {b.setting} at which {b.defense} is as accurate, by a monotone fit; bars are 95 % bootstrap "
        "intervals over images, clipped to the trained range; hollow markers are unsound rows. Values outside the "
        "range are in the table. " + conditions([a.row, b.row], cells=_matched(a, inside)),
        list(numbers[0]),
        [list(line.values()) for line in numbers],
        figure,
        a.row.dataset,
    )


def _matched(a: Series, matches: list[Match]) -> list[SeedValues]:
    """The matched accuracies of A, over the seeds and images that both defenses have."""
    cells = {p.x: p.cells for p in a.points}
    return [replace(cells[m.a][m.column].only(m.seeds), n=m.n) for m in matches]
