"""What every figure says under itself: n, eps, seeds, device, and how its rows are called."""

from __future__ import annotations

from collections.abc import Iterable

from bench.report.text import joined
from bench.results.rows import Row
from bench.results.worst_case import Cell
from bench.tables.ranking import FLAG


def called(row: Row) -> str:
    """The name of a row in a figure; what may not be trusted says so there too."""
    budget = f" trained at {row.train_eps}" if row.train_eps not in ("–", row.eps) else ""
    mark = {"FLAG": f" {FLAG}", "UNSOUND": " (unsound)"}.get(row.verdict, "")
    return f"{row.method}{budget}{mark}"


def conditions(rows: Iterable[Row], eps: str = "", cells: Iterable[Cell | None] = ()) -> str:
    """`n 1000; eps 0.1; seeds 0, 1; device CPU x`. `cells`: what is drawn, where it is not the worst case.

    Seeds are those in the numbers: one that was planned, but lacks an attack, is in no worst case.
    """
    listed = list(rows)
    shown = [cell for cell in (cells or [row.worst for row in listed]) if cell is not None and cell.values]
    sizes = joined(cell.n or "" for cell in shown)
    seeds = seeds_of(shown)
    devices = joined(row.device for row in listed)
    budgets = eps or joined(f"{row.norm} {row.eps}" if row.norm else "none" for row in listed)
    return f"n {sizes}; eps {budgets}; seeds {seeds}; device {devices}."


def seeds_of(cells: Iterable[Cell]) -> str:
    """The seeds in these numbers: `0, 1`."""
    return joined(sorted({seed for cell in cells for seed in cell.values}))


def best(rows: list[Row], most: int) -> list[Row]:
    """At most this many rows for a figure: the best worst cases, and `standard`, the baseline, wherever it stands."""
    order = sorted(rows, key=lambda row: (-row.worst.mean if row.worst.values else 1.0, row.method, row.config))
    baseline = [row for row in order if row.defense == "standard"][:1]
    chosen = {id(row) for row in [*baseline, *[row for row in order if row not in baseline]][:most]}
    return [row for row in order if id(row) in chosen]
