"""Lines with bands: robust accuracy against eps, security curves, certified accuracy against radius."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.core.stats import wilson
from bench.records.store import Store
from bench.report.canvas import COLORS, DASHES, MARKERS, MOST, Plot, drawn, slug
from bench.report.captions import best, called, conditions
from bench.report.provenance import of_attack, of_certificate, of_clean, of_worst
from bench.report.svg import INK
from bench.report.text import joined, short
from bench.results.rows import Row
from bench.results.worst_case import Cell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float, float, float]  # x, share, low, high
Placed = tuple[Point, list[str]]  # and the keys of the evaluations that it rests on
STEPS = 60


@dataclass
class PlottedCurve:
    """One model: its row at the smallest budget, its points by budget, and the cells that they show; `clean` at 0."""

    row: Row
    points: dict[float, Placed] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    clean: Cell | None = None


def eps_curves(rows: list[Row]) -> list[Plot]:
    """Worst case against the budget, one figure for each data set and norm; clean is the worst case at 0."""
    about = "Worst case per image over clean and all attacks at this eps; at eps 0 clean accuracy."
    return _by_budget(rows, "eps", "Worst-case accuracy", about, lambda row: row.worst, of_worst)


def security_curves(rows: list[Row]) -> list[Plot]:
    """Accuracy under the one attack that walks through all budgets (`curve`), where it was run."""
    about = (
        "Accuracy under the attack “curve” alone: PGD at rising budgets, each begun where the one before ended, so "
        "that a curve never rises. The worst case over all attacks may lie below it."
    )
    return _by_budget(
        rows,
        "curve",
        "Accuracy under curve",
        about,
        lambda row: row.attacks.get(_walking(row)),
        lambda row: of_attack(row, _walking(row)),
    )


def _walking(row: Row) -> str:
    """The label of the security curve of this row, "" where it has none."""
    names = sorted(name for name, by in row.entries.items() if any(e.attack == "curve" for e in by.values()))
    return names[0] if names else ""


def _by_budget(
    rows: list[Row],
    kind: str,
    label: str,
    about: str,
    cell_of: Callable[[Row], Cell | None],
    keys_of: Callable[[Row], list[str]],
) -> list[Plot]:
    groups: dict[tuple[str, str], dict[str, PlottedCurve]] = {}
    for row in sorted((row for row in rows if row.norm), key=lambda row: row.eps_value):
        cell = cell_of(row)
        if row.norm and cell is not None and cell.values:
            curve = groups.setdefault((row.dataset, row.norm), {}).setdefault(row.config, PlottedCurve(row))
            clean = row.clean.only(cell.values)  # another seed at 0 would bend the curve
            if clean.values and not curve.points:
                curve.points[0.0] = (0.0, clean.mean, *clean.interval()), of_clean(row, cell.values)
                curve.clean = clean
            curve.points[row.eps_value] = (row.eps_value, cell.mean, *cell.interval()), keys_of(row)
            curve.cells.append(cell)
    return [
        _budget_figure((kind, dataset, norm), label, about, list(by.values()))
        for (dataset, norm), by in sorted(groups.items())
    ]


def _budget_figure(place: tuple[str, str, str], label: str, about: str, curves: list[PlottedCurve]) -> Plot:
    (_, dataset, norm), rows = place, [curve.row for curve in curves]
    by_row = {id(curve.row): curve for curve in curves}
    chosen = [by_row[id(row)] for row in best(rows, MOST)]
    lines = [(called(curve.row), [point for point, _ in curve.points.values()]) for curve in chosen]
    said = conditions(rows, f"{norm} on the axis", [cell for curve in curves for cell in curve.cells])
    at_zero = [curve.clean.n for curve in curves if curve.clean]
    said += f" At eps 0: n {joined(at_zero)}, the seeds of the smallest eps." if at_zero else ""
    few = f" Drawn are {len(chosen)} of {len(curves)} models: the best at their smallest eps, and standard."
    told = [(called(curve.row), point, keys) for curve in curves for point, keys in curve.points.values()]
    return Plot(
        slug(*place),
        f"{dataset}, {norm}",
        f"Line chart of {label.lower()} against {norm} eps for {len(chosen)} models; the table has its numbers.",
        f"{about} Bands are 95 % Wilson intervals. {said}{few if len(chosen) < len(curves) else ''}",
        ["defense", "eps", "accuracy", "low", "high"],
        [[name, *(round(v, 4) for v in point)] for name, point, _ in told],
        _lines(lines, f"{norm} eps", f"{label} (%)"),
        dataset,
        behind=[{2: keys} for _, _, keys in told],
    )


def certified_curves(store: Store, rows: list[Row]) -> list[Plot]:
    """Share of images certified at least to a radius, one figure for each data set; seeds are averaged."""
    groups: dict[str, dict[str, tuple[Row, list[Point]]]] = {}
    for row in rows:
        known = groups.setdefault(row.dataset, {})
        if row.certified and row.verdict != "INVALID" and row.config not in known:
            points = _certified_points(store, row)
            if points:
                known[row.config] = row, points
    return [_certified_figure(dataset, by) for dataset, by in sorted(groups.items()) if by]


def _certified_figure(dataset: str, by_config: dict[str, tuple[Row, list[Point]]]) -> Plot:
    drawn_ = [(called(row), points) for row, points in list(by_config.values())[:MOST]]
    figure = _lines(drawn_, "certified L2 radius", "Certified accuracy (%)", marked=False)
    members = [row for row, _ in by_config.values()]
    cells = [cell for row in members for cell in list(row.certified.values())[:1]]
    few = f" Drawn are the first {MOST} of {len(by_config)}." if len(by_config) > MOST else ""
    return Plot(
        slug("certified", dataset),
        dataset,
        f"Line chart of certified accuracy against L2 radius for {len(drawn_)} models; the table has its numbers.",
        "Share of images that are right and certified at least to the radius: no attack within it can succeed. "
        f"Bands are 95 % Wilson intervals. {conditions(members, 'L2 radius on the axis', cells)}{few}",
        ["defense", "radius", "certified accuracy", "low", "high"],
        [[called(row), *(round(v, 4) for v in point)] for row, points in by_config.values() for point in points],
        figure,
        dataset,
        behind=[{2: of_certificate(row)} for row, points in by_config.values() for _ in points],
    )


def _certified_points(store: Store, row: Row) -> list[Point]:
    """Of the attack label with most seeds done, as in the tables; radii that exist up to the largest."""
    import numpy as np

    certify = [by for _, by in sorted(row.entries.items()) if any(e.attack == "certify" for e in by.values())]
    done = [[e.key for e in by.values() if e.state == "done"] for by in certify]
    keys = max(done, key=len, default=[])
    held = [store.samples(key, ("radius", "correct")) for key in keys]
    radii = [np.where(s["correct"].astype(bool), s["radius"], -1.0) for s in held if "radius" in s]
    if not radii:
        return []
    top = max(float(r[np.isfinite(r)].max(initial=0.0)) for r in radii)
    n = min(len(r) for r in radii)
    points = []
    for at in np.linspace(0.0, top, STEPS + 1) if top > 0 else [0.0]:
        share = float(np.mean([(r >= at).mean() for r in radii]))
        points.append((float(at), share, *wilson(round(share * n), n)))
    return points


def _lines(curves: list[tuple[str, list[Point]]], x_label: str, y_label: str, marked: bool = True) -> Figure:
    figure, axes = drawn(8.6, 4.2)
    for k, (name, points) in enumerate(curves):
        x, y, low, high = zip(*points, strict=True)
        color, dash = COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)]
        marker = MARKERS[k % len(MARKERS)] if marked else None
        axes.fill_between(x, [100 * v for v in low], [100 * v for v in high], color=color, alpha=0.09, linewidth=0)
        axes.plot(x, [100 * v for v in y], dash, color=color, marker=marker, markersize=4, label=short(name, 44))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    figure.legend(loc="outside right upper", frameon=False, labelcolor=INK, fontsize=9)
    return figure
