"""Rows by table: one for each data set, threat and kind of predictor."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

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
    """The tables that have rows, by data set in natural order, by threat and by kind of predictor."""
    kinds = list(KINDS)

    def place(row: Row) -> tuple[list[tuple[int, int, str]], str, float, str, int]:
        return natural(row.dataset), row.norm or "", row.budget, row.eps or "", kinds.index(_kind(row))

    tables = grouped(sorted(rows, key=place), lambda row: (row.dataset, _threat(row), _kind(row)))
    return [Section(*table, members) for table, members in tables.items()]


def _kind(row: Row) -> str:
    return row.deploys if row.deploys in KINDS else "deterministic"


def _threat(row: Row) -> str:
    return f"{row.norm} eps = {row.eps}" if row.norm else "no attack"
