"""Pareto fronts: rows that no comparable row beats in robust accuracy and in clean accuracy, seconds or work at once.

Rows are compared within a data set, model, threat, kind of predictor and set of images only; ranked rows with ranked
ones, provisional ones among themselves, since a weaker set of attacks overestimates robustness. Seconds need the same
device, number of training images and load too. UNSOUND and INVALID rows are left out. Fronts are by means; for
significance see the intervals and `bench compare`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.results.cost import busy
from bench.results.grouping import grouped
from bench.results.rows import Row
from bench.tables.ranking import UNRANKED

Fronts = dict[int, dict[str, bool]]  # id of a row -> kind -> on the front?


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (x, y) that no other dominates; larger is better."""
    order = sorted(range(len(points)), key=lambda k: (-points[k][0], -points[k][1]))
    found, best, at = [], -math.inf, math.nan
    for k in order:
        x, y = points[k]
        if y > best or (x, y) == (at, best):
            found.append(k)
            best, at = y, x
    return sorted(found)


def fronts(rows: Iterable[Row]) -> Fronts:
    """For each row and kind (clean, seconds, work) whether it is on the front; a kind is absent where a row has no
    number or nothing to be compared with."""
    listed = [row for row in rows if row.verdict not in UNRANKED and row.accuracy.worst.values]
    found: Fronts = {}
    for kind, (value_of, _) in KINDS.items():
        known = [row for row in listed if not math.isnan(value_of(row))]
        for members in grouped(known, lambda row, kind=kind: footing(row, kind)).values():  # type: ignore[misc]
            front = set(pareto([(value_of(row), row.accuracy.worst.mean) for row in members]))
            for k, row in enumerate(members) if len(members) > 1 else ():
                found.setdefault(id(row), {})[kind] = k in front
    return found


def footing(row: Row, kind: str) -> tuple[Any, ...]:
    """What rows must have in common to be compared in this kind of front."""
    return *_comparable(row), *KINDS[kind][1](row)


def describe_fronts(found: Fronts, row: Row) -> str:
    """`clean, seconds`: the fronts that a row is on; none; or – where there was nothing to compare."""
    kinds = found.get(id(row))
    if not kinds:
        return "–"
    return ", ".join(kind for kind, on in kinds.items() if on) or "none"


def _comparable(row: Row) -> tuple[Any, ...]:
    n = row.accuracy.worst.n
    images = sorted({str(e.test_hash) for e in row.in_worst_case if e.n == n})  # of the worst case, where known
    return row.dataset, row.model, row.norm, row.budget, row.deploys, bool(row.provisional), n, *images


def _timed(row: Row) -> tuple[Any, ...]:
    return tuple(sorted({(str(e.train_device), int(e.train_images), busy(e)) for e in row.evaluations}))


def _trained(row: Row) -> tuple[Any, ...]:
    return tuple(sorted({int(e.train_images) for e in row.evaluations}))


KINDS: dict[str, tuple[Callable[[Row], float], Callable[[Row], tuple[Any, ...]]]] = {
    "clean": (lambda row: row.accuracy.clean.mean, lambda row: ()),
    "seconds": (lambda row: -row.cost.train_seconds, _timed),
    "work": (lambda row: -row.cost.train_work, _trained),
}
