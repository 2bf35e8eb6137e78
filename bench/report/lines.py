"""Lines with bands: robust accuracy against eps, security curves, certified accuracy against radius."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from bench.core.stats import wilson
from bench.records.store import Store
from bench.report.canvas import FEWEST, MAX_LINES, Entry, Plot, curve, line_style, single, slug
from bench.report.captions import best, conditions, joined, mark_of, row_label, short
from bench.report.provenance import of_attack, of_certificate, of_clean, of_worst
from bench.results.rows import Row
from bench.results.seed_values import SeedValues

STEPS, MAX_MARKED = 60, 30  # radii of a curve; points of a line that are marked


class Point(NamedTuple):
    """A share of images at `x` (eps or radius) with its 95 % interval, and the keys of its evaluations."""

    x: float
    share: float
    low: float
    high: float
    keys: list[str]


@dataclass
class PlottedCurve:
    """One model: its row at the smallest budget, its points, and the cells that they show; `clean` at eps 0."""

    row: Row
    points: list[Point] = field(default_factory=list)
    cells: list[SeedValues] = field(default_factory=list)
    clean: SeedValues | None = None


def eps_curves(rows: list[Row]) -> list[Plot]:
    """Worst case against the budget, one figure for each data set and norm; clean is the worst case at 0."""
    about = "Worst case per image over clean and all attacks at this eps; at eps 0 clean accuracy."
    return _by_budget("eps", "Worst-case accuracy", about, [(row, row.accuracy.worst, of_worst(row)) for row in rows])


def security_curves(rows: list[Row]) -> list[Plot]:
    """Accuracy under the one attack that walks through all budgets (`curve`), where it was run."""
    about = (
        "Accuracy under the attack “curve” alone: PGD at increasing budgets, each started from the result of the "
        "previous one, so that a curve never increases. The worst case over all attacks may be lower."
    )
    numbers = []
    for row in rows:
        names = sorted(
            name for name, by in row.provenance.entries.items() if any(e.attack == "curve" for e in by.values())
        )
        numbers += [
            (row, row.accuracy.attacks[name], of_attack(row, name))
            for name in names[:1]
            if name in row.accuracy.attacks
        ]
    return _by_budget("curve", "Accuracy under curve", about, numbers)


def _by_budget(kind: str, label: str, about: str, numbers: list[tuple[Row, SeedValues, list[str]]]) -> list[Plot]:
    """`numbers`: a cell at the budget of its row, and the keys of its evaluations."""
    groups: dict[tuple[str, str], dict[str, PlottedCurve]] = {}
    known = [(row.norm, row, cell, keys) for row, cell, keys in numbers if row.norm and cell.values]
    for norm, row, cell, keys in sorted(known, key=lambda each: each[1].eps_value):
        found = groups.setdefault((row.dataset, norm), {}).setdefault(row.config, PlottedCurve(row))
        clean = row.accuracy.clean.only(cell.values)  # with other seeds at 0 the curve would not be of the same models
        if clean.values and not found.points:
            found.points.append(Point(0.0, clean.mean, *clean.interval(), of_clean(row, cell.values)))
            found.clean = clean
        found.points.append(Point(row.eps_value, cell.mean, *cell.interval(), keys))
        found.cells.append(cell)
    return [
        _figure((kind, dataset, norm), f"{norm} eps", ("eps", "accuracy"), label, about, list(by_config.values()))
        for (dataset, norm), by_config in sorted(groups.items())
        if _enough(by_config)
    ]


def certified_curves(store: Store, rows: list[Row]) -> list[Plot]:
    """Share of images certified at least to a radius, one figure for each data set; seeds are averaged."""
    groups: dict[str, dict[str, PlottedCurve]] = {}
    for row in rows:
        known = groups.setdefault(row.dataset, {})
        if row.accuracy.certified and row.verdict != "INVALID" and row.config not in known:
            points = _certified_points(store, row)
            if points:
                known[row.config] = PlottedCurve(row, points, list(row.accuracy.certified.values())[:1])
    about = "Share of correct images with a certified radius of at least this value: no attack within it can succeed."
    columns = ("radius", "certified accuracy")
    return [
        _figure(("certified", dataset), "L2 radius", columns, "Certified accuracy", about, list(by_config.values()))
        for dataset, by_config in sorted(groups.items())
        if _enough(by_config)
    ]


def _enough(curves: dict[str, PlottedCurve]) -> bool:
    return max((len(found.points) for found in curves.values()), default=0) >= FEWEST


def _certified_points(store: Store, row: Row) -> list[Point]:
    """Certified accuracy at radii up to the largest, of the attack label with most seeds done, as in the tables."""
    certify = [
        by for _, by in sorted(row.provenance.entries.items()) if any(e.attack == "certify" for e in by.values())
    ]
    done = [[e.key for e in by.values() if e.state == "done"] for by in certify]
    samples = [store.samples(key, ("radius", "correct")) for key in max(done, key=len, default=[])]
    radii = [np.where(s["correct"].astype(bool), s["radius"], -1.0) for s in samples if "radius" in s]
    if not radii:
        return []
    top = max(float(r[np.isfinite(r)].max(initial=0.0)) for r in radii)
    n, keys = min(len(r) for r in radii), of_certificate(row)
    points = []
    for at in np.linspace(0.0, top, STEPS + 1) if top > 0 else [0.0]:
        share = float(np.mean([(r >= at).mean() for r in radii]))
        points.append(Point(float(at), share, *wilson(round(share * n), n), keys))
    return points


def _figure(
    place: tuple[str, ...], x: str, columns: tuple[str, str], label: str, about: str, curves: list[PlottedCurve]
) -> Plot:
    """`place`: kind of figure and what it is of; `x`: label of the axis; `label`: of the shares."""
    by_row = {id(found.row): found for found in curves}
    shown = [by_row[id(row)] for row in best([found.row for found in curves], MAX_LINES)]
    figure, axes = single()
    key = []
    for k, found in enumerate(shown):
        marker = {"marker": None} if len(found.points) > MAX_MARKED else {}
        percent = [(at, 100 * share, 100 * low, 100 * high) for at, share, low, high, _ in found.points]
        curve(axes, percent, mark_of(found.row), **line_style(k) | marker, markersize=4)
        key.append(Entry(short(row_label(found.row), 44), line_style(k), mark_of(found.row)))
    axes.set(xlabel=x, ylabel=f"{label} (%)", ylim=(0, 100))
    axes.set_xlim(left=0)
    cells = [cell for found in curves for cell in found.cells]
    caption = f"{about} Bands are 95 % Wilson intervals. {conditions((f.row for f in curves), 'on the axis', cells)}"
    if zero := [found.clean.n for found in curves if found.clean]:
        caption += f" At eps 0: n {joined(zero)}, the seeds of the smallest eps."
    if len(shown) < len(curves):
        caption += f" Shown: {len(shown)} of {len(curves)} models, the best at their smallest eps and standard."
    points = [(found.row, point) for found in curves for point in found.points]
    return Plot(
        slug(*place),
        ", ".join(place[1:]),
        f"Line chart of {label.lower()} against {x} for {len(shown)} models; the table has its numbers.",
        caption,
        ["defense", *columns, "low", "high"],
        [[row_label(row), *(round(v, 4) for v in point[:4])] for row, point in points],
        figure,
        place[1],
        behind=[{2: point.keys} for _, point in points],
        key=key,
        marks=[mark_of(row) for row, _ in points],
    )
