"""Lines with bands: robust accuracy against eps, certified accuracy against radius."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.core.stats import wilson
from bench.report.canvas import COLOURS, DASHES, MARKERS, MOST, Plot, drawn, slug
from bench.report.captions import best, called, conditions
from bench.report.svg import INK
from bench.report.text import short
from bench.rows import Row
from bench.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Point = tuple[float, float, float, float]  # x, share, low, high
STEPS = 60


def eps_curves(rows: list[Row]) -> list[Plot]:
    """Worst case against the budget, one figure for each data set and norm; clean is the worst case at 0."""
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.norm and row.worst.values:
            groups.setdefault((row.dataset, row.norm), {}).setdefault(row.config, []).append(row)
    return [_eps_figure(dataset, norm, by) for (dataset, norm), by in sorted(groups.items())]


def _eps_figure(dataset: str, norm: str, by_config: dict[str, list[Row]]) -> Plot:
    curves = {config: _eps_points(rows) for config, rows in by_config.items()}
    chosen = best([min(rows, key=lambda row: row.eps_value) for rows in by_config.values()], MOST)
    named = {row.config: called(row) for rows in by_config.values() for row in rows[:1]}
    figure = _lines(
        [(named[row.config], curves[row.config]) for row in chosen], f"{norm} eps", "Worst-case accuracy (%)"
    )
    members = [row for rows in by_config.values() for row in rows]
    few = f" Drawn are {len(chosen)} of {len(curves)} models: the best at their smallest eps, and standard."
    return Plot(
        slug("eps", dataset, norm),
        f"{dataset}, {norm}",
        f"Line chart of worst-case accuracy against {norm} eps for {len(chosen)} models; the table has its numbers.",
        "Worst case per image over clean and all attacks at this eps; at eps 0 clean accuracy. Bands are 95 % Wilson "
        f"intervals. {conditions(members)}{few if len(chosen) < len(curves) else ''}",
        ["defense", "eps", "accuracy", "low", "high"],
        [[named[c], *(round(v, 4) for v in point)] for c, points in curves.items() for point in points],
        figure,
        dataset,
    )


def _eps_points(rows: list[Row]) -> list[Point]:
    points = {row.eps_value: (row.eps_value, row.worst.mean, *row.worst.interval()) for row in rows}
    clean = rows[0].clean
    if clean.values:
        points.setdefault(0.0, (0.0, clean.mean, *clean.interval()))
    return [points[eps] for eps in sorted(points)]


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
    drawn_ = [(row.method, points) for row, points in list(by_config.values())[:MOST]]
    figure = _lines(drawn_, "certified L2 radius", "Certified accuracy (%)", marked=False)
    members = [row for row, _ in by_config.values()]
    sizes = ", ".join(dict.fromkeys(str(cell.n) for row in members for cell in list(row.certified.values())[:1]))
    few = f" Drawn are the first {MOST} of {len(by_config)}." if len(by_config) > MOST else ""
    return Plot(
        slug("certified", dataset),
        dataset,
        f"Line chart of certified accuracy against L2 radius for {len(drawn_)} models; the table has its numbers.",
        "Share of images that are right and certified at least to the radius: no attack within it can succeed. "
        f"Bands are 95 % Wilson intervals at {sizes} certified images. "
        f"{conditions(members, 'L2 radius on the axis')}{few}",
        ["defense", "radius", "certified accuracy", "low", "high"],
        [[row.method, *(round(v, 4) for v in point)] for row, points in by_config.values() for point in points],
        figure,
        dataset,
    )


def _certified_points(store: Store, row: Row) -> list[Point]:
    """Of the attack label with most seeds done, as in the tables; radii that exist up to the largest."""
    import numpy as np

    certify = [by for _, by in sorted(row.entries.items()) if any(e["attack"] == "certify" for e in by.values())]
    done = [[e["key"] for e in by.values() if e["state"] == "done"] for by in certify]
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
        colour, dash = COLOURS[k % len(COLOURS)], DASHES[k // len(COLOURS) % len(DASHES)]
        marker = MARKERS[k % len(MARKERS)] if marked else None
        axes.fill_between(x, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.09, linewidth=0)
        axes.plot(x, [100 * v for v in y], dash, color=colour, marker=marker, markersize=4, label=short(name, 44))
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    figure.legend(loc="outside right upper", frameon=False, labelcolor=INK, fontsize=9)
    return figure
