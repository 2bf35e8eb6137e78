"""Pareto fronts: rows that no comparable row beats in robust accuracy and in clean accuracy, seconds or work at once.

Rows are compared within a data set, model, threat, kind of predictor and set of images only; ranked rows with ranked
ones, provisional ones among themselves, since a weaker attack set flatters. Seconds need the same device, number of
training images and load too. UNSOUND and INVALID rows are on no front and beat nobody. Means decide: how sure a place
is, the intervals and `bench compare` say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.results.cost import busy
from bench.results.rows import Row
from bench.tables.ranking import UNRANKED

Fronts = dict[int, dict[str, bool]]  # id of a row -> kind -> on the front?


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: `x` no worse and `y` no worse, one of them better; larger is better."""
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
        classes: dict[tuple[Any, ...], list[tuple[Row, float]]] = {}
        for row in listed:
            x = value_of(row)
            if not math.isnan(x):
                classes.setdefault(footing(row, kind), []).append((row, x))
        for members in classes.values():
            front = set(pareto([(x, row.accuracy.worst.mean) for row, x in members]))
            for k, (row, _) in enumerate(members) if len(members) > 1 else ():
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
    budget = (row.norm, row.eps_value if row.norm else 0.0)
    return row.dataset, row.model, *budget, row.deploys, bool(row.provisional), row.accuracy.worst.n, *_images(row)


def _images(row: Row) -> tuple[str, ...]:
    """Hashes of the images that its worst case was taken on, as far as some evaluation saw these alone."""
    counted = {key for keys in row.provenance.keys.values() for key in keys}
    entries = [e for by in row.provenance.entries.values() for e in by.values()]
    return tuple(sorted({str(e.test_hash) for e in entries if e.key in counted and e.n == row.accuracy.worst.n}))


def _timed(row: Row) -> tuple[Any, ...]:
    entries = [e for by in row.provenance.entries.values() for e in by.values()]
    return tuple(sorted({(str(e.train_device), int(e.train_images), busy(e)) for e in entries}))


def _trained(row: Row) -> tuple[Any, ...]:
    return tuple(sorted({int(e.train_images) for by in row.provenance.entries.values() for e in by.values()}))


KINDS: dict[str, tuple[Callable[[Row], float], Callable[[Row], tuple[Any, ...]]]] = {
    "clean": (lambda row: row.accuracy.clean.mean, lambda row: ()),
    "seconds": (lambda row: -row.cost.train_seconds, _timed),
    "work": (lambda row: -row.cost.train_work, _trained),
}
