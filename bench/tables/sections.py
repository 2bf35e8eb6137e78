"""Rows by table: one for each data set, threat and kind of predictor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bench.data import datasets
from bench.results.grouping import grouped
from bench.results.rows import Row
from bench.tables.columns import natural
from bench.tables.ranking import ranked

KINDS = {"deterministic": "Deterministic", "randomised": "Randomized at test time", "smoothed": "Certified"}


@dataclass(frozen=True)
class Section:
    """One table of the leaderboard. `kind`: of predictor, a key of `KINDS`; `rows`: by method."""

    dataset: str
    threat: str
    kind: str
    rows: list[Row]

    @cached_property
    def ranked(self) -> list[tuple[str, Row]]:
        """Rank and row, best first."""
        return ranked(self.rows)


def sections(rows: Iterable[Row]) -> list[Section]:
    """The tables that have rows: the data set with the most training images first, then by name in natural order; by
    threat, rows that were not attacked last; by kind of predictor."""
    kinds, known = list(KINDS), list(rows)
    sizes: dict[str, int] = {}
    for row in known:
        whole = datasets.KNOWN.get(row.dataset)
        used = [whole.train] if whole else [e.train_images or 0 for e in row.evaluations]
        sizes[row.dataset] = max(sizes.get(row.dataset, 0), *used, 0)

    def place(row: Row) -> tuple[Any, ...]:
        dataset = -sizes[row.dataset], natural(row.dataset)
        return *dataset, row.norm is None, row.norm or "", row.budget, row.eps or "", kinds.index(_kind(row))

    tables = grouped(sorted(known, key=place), lambda row: (row.dataset, _threat(row), _kind(row)))
    return [Section(*table, members) for table, members in tables.items()]


def _kind(row: Row) -> str:
    return row.deploys if row.deploys in KINDS else "deterministic"


def _threat(row: Row) -> str:
    return f"{row.norm} eps = {row.eps}" if row.norm else "no attack"
