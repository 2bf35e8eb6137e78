"""Sweeps and maps as text, lines of CSV and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable

from bench.records.record import train_metrics
from bench.records.store import Store
from bench.results.labels import collapses, failures
from bench.results.seed_values import SeedValues
from bench.tables.equivalence import Match
from bench.tables.ranking import verdict_text
from bench.tables.sweep import Point, Series
from bench.tables.text import aligned, json_text, percent, printed

Map = tuple[Series, Series, list[Match]]


def title(series: Series) -> str:
    """`mnist, lenet5, Linf eps 0.1: noisy (structure=diag) against sigma`."""
    fixed = f" ({series.fixed})" if series.fixed else ""
    return f"{series.place}: {series.defense}{fixed} against {series.setting}"


def map_title(a: Series, name: str) -> str:
    """`mnist, lenet5, Linf eps 0.1: noisy (structure=diag) sigma and` what it is matched with."""
    fixed = f" ({a.fixed})" if a.fixed else ""
    return f"{a.place}: {a.defense}{fixed} {a.setting} and {name}"


def table(series: Series) -> list[str]:
    """The table of one series with notes, for a terminal."""
    names = series.columns
    header = [series.setting, *names, "seeds", "verdict"]
    found = [[f"{point.x:g}", *_cells(series, point)] for point in series.points]
    if series.standard is not None and any(point.row.defense != "standard" for point in series.points):
        found.append(["standard", *_cells(series, series.standard)])
    rows = [point.row for point in series.points]
    notes = collapses(rows)
    if any({*row.seeds} - {*series.seeds} for row in rows):
        seeds = ", ".join(map(str, series.seeds))
        notes.append(f"means are over seed {seeds}, which every value has; brackets hold all seeds")
    if series.left_out:
        notes.append(f"not in the worst case, as only some points had them: {', '.join(series.left_out)}")
    return [title(series), "", *aligned([header, *found]), "", *notes, *failures(rows)]


def _cells(series: Series, point: Point) -> list[str]:
    row = point.row
    seeds = f"{len(row.seeds)}" + (f", {len(row.accuracy.collapsed)} collapsed" if row.accuracy.collapsed else "")
    return [*(_shown(series, point.cells.get(name)) for name in series.columns), seeds, verdict_text(row)]


def _shown(series: Series, cell: SeedValues | None) -> str:
    """Mean in percent with half a 95 % interval; of all seeds, where there are several, each and the deviation; n."""
    counted = series.mean(cell) if cell else None
    if cell is None or counted is None or not counted.values:
        return cell.state() if cell else "not run"
    low, high = counted.interval()
    seeds = "/".join(percent(value, 1) for _, value in sorted(cell.values.items()))
    told = f"{seeds}, std {percent(cell.std, 1)}, " if len(cell.values) > 1 else ""
    return f"{percent(counted.mean, 1)} ±{50 * (high - low):.1f} ({told}n={cell.n})"


def lines(series: Series) -> list[dict[str, object]]:
    """Lines of CSV, one per value and column: shares in [0,1], or the state.

    `mean` and its interval `low` to `high` are over the seeds `mean_over`, all else over every seed there is.
    """
    row = series.row
    found: list[dict[str, object]] = []
    about = {"dataset": row.dataset, "model": row.model, "norm": row.norm, "defense": series.defense}
    about |= {"fixed": series.fixed, "setting": series.setting}
    points = [(p.x, p) for p in series.points] + ([("standard", series.standard)] if series.standard else [])
    for x, p in points:
        for name in series.columns:
            cell = p.cells.get(name, SeedValues())
            counted, some = series.mean(cell), cell.values.values()
            low, high = counted.interval()
            keys = [p.picked[name][s].key for s in sorted(cell.values)] if name in p.picked else []
            line = {
                "eps": p.row.eps, "value": x, "column": name, "mean": counted.mean,
                "mean_over": _listed(counted.values), "std": cell.std, "low": low, "high": high,
                "lowest": min(some, default=None),
                "highest": max(some, default=None), "n": cell.n or None,
                "seed_values": " ".join(f"{seed}:{v}" for seed, v in sorted(cell.values.items())),
                "collapsed": _listed(p.row.accuracy.collapsed), "state": "done" if some else cell.state(),
                "verdict": p.row.verdict, "keys": " ".join(keys), "train_key": p.row.provenance.train_key,
            }  # fmt: skip
            found.append({**about, **line})
    return found


def _listed(seeds: Iterable[int]) -> str:
    return " ".join(map(str, sorted(seeds)))


def map_table(store: Store, found: Map) -> list[str]:
    """The table of a map with notes: the value of B for each value of A, for a terminal."""
    a, b, matches = found
    ends = f"{b.points[0].x:g} and {b.points[-1].x:g}"
    name = f"{b.defense} {b.setting}"
    out = [map_title(a, f"the {name} that is as accurate"), ""]
    header = [a.setting, "column", "accuracy %", name, "95 % interval", "n", "seeds", "verdict", *_RATIOS]
    ratios = {p.x: _ratios(store, p) for p in a.points}
    cells = [
        [
            f"{m.a:g}", m.column, percent(m.accuracy, 1), _at(m.b, b), f"{_at(m.low, b)} to {_at(m.high, b)}",
            str(m.n), str(len(m.seeds)), m.verdict, *ratios[m.a],
        ]
        for m in sorted(matches, key=lambda m: (m.a, m.column != "clean"))
    ]  # fmt: skip
    if not any(text != "–" for by in ratios.values() for text in by):
        header, cells = header[: -len(_RATIOS)], [line[: -len(_RATIOS)] for line in cells]
    values = ", ".join(f"{p.x:g}" + (" (standard)" if p.row.defense == "standard" else "") for p in b.points)
    notes = [
        f"{b.defense}{f' ({b.fixed})' if b.fixed else ''} was trained at {b.setting} {values}; between these the fit "
        "is a straight line, and the interval knows of images only, not of other training seeds",
        f"below or above: no {b.setting} between {ends} is as accurate",
    ]
    known = [name for name in a.points[0].picked if all(name in p.picked for p in (*a.points, *b.points))]
    if lacking := [name for name in known if name not in {m.column for m in matches}]:
        moves = "clean accuracy does not fall, or robust accuracy not rise"
        notes.append(f"no map by {', '.join(lacking)}: {moves} with {b.setting}, or too few values have it")
    if unsound := _unsound(b):
        notes.append(f"{b.defense} is unsound at {b.setting} {', '.join(unsound)}: the fit may be too high there")
    return [*out, *aligned([header, *cells]), "", *notes]


def _unsound(series: Series) -> list[str]:
    return [f"{p.x:g}" for p in series.points if p.row.verdict == "UNSOUND"]


def _at(value: float, b: Series) -> str:
    ends = b.points[0].x, b.points[-1].x
    return f"below {ends[0]:g}" if value == -math.inf else f"above {ends[1]:g}" if value == math.inf else f"{value:.3g}"


# of the noise at the first layer's output z = W x: only ratios can carry over to another net
_RATIOS = ("noise / std(z)", "noise / |W|")


def _ratios(store: Store, point: Point) -> list[str]:
    """Noise over the spread of z (of trainings that logged it), and over the Frobenius norm of W; means over seeds."""
    logged = [_logged(store, key) for key in _trainings(point)]
    spread = [1 / m["snr"] for m in logged if "snr" in m]
    norm = [m["sigma"] / m["w1_norm"] for m in logged if {"sigma", "w1_norm"} <= m.keys()]
    return [_mean(spread), _mean(norm)]


def _mean(values: list[float]) -> str:
    finite = [value for value in values if math.isfinite(value)]
    return f"{sum(finite) / len(finite):.3g}" if finite else "–"


def _logged(store: Store, key: str) -> dict[str, float]:
    logged = train_metrics(store.record(key)).defense_metrics or {}
    return {name: float(value) for name, value in logged.items() if value}


def _trainings(point: Point) -> list[str]:
    return sorted({entry.train_key for by in point.picked.values() for entry in by.values()})


def map_lines(found: Map) -> list[dict[str, object]]:
    """Lines of CSV of a map; a value that B never has is `below` or `above` its range."""
    a, b, matches = found
    about = {"dataset": a.row.dataset, "model": a.row.model, "norm": a.row.norm, "eps": a.row.eps}
    about |= {"a": a.defense, "a_setting": a.setting, "a_fixed": a.fixed}
    about |= {"b": b.defense, "b_setting": b.setting, "b_fixed": b.fixed}
    return [
        about | {
            "column": m.column, "a_value": m.a, "accuracy": m.accuracy, "b_value": _finite(m.b),
            "low": _finite(m.low), "high": _finite(m.high), "n": m.n, "seeds": len(m.seeds),
            "verdict": m.verdict, "b_unsound": " ".join(_unsound(b)),
        }
        for m in matches
    ]  # fmt: skip


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else "above" if value > 0 else "below"


def text(store: Store, swept: list[Series], maps: list[Map]) -> str:
    """All tables for a terminal."""
    parts = [table(series) for series in swept] + [map_table(store, found) for found in maps]
    legend = "percent ± half a 95 % Wilson interval of n images; in brackets each seed and their standard deviation"
    return printed([line for part in [*parts, [legend]] for line in [*part, ""]])


def as_json(swept: list[Series], maps: list[Map]) -> str:
    """The same as one JSON object with the lines of both CSV files; null where there is no number."""
    series = [line for each in swept for line in lines(each)]
    return json_text({"sweep": series, "map": [line for each in maps for line in map_lines(each)]})
