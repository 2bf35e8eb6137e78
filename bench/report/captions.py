"""Texts of figures: n, eps, seeds and device of their numbers, and the names of rows."""

from __future__ import annotations

import math
from collections.abc import Iterable

from bench.results.evaluations import EvaluationResult
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.tables.ranking import FLAG
from bench.terminal import printable

LONGEST = 60


def short(text: str, longest: int = LONGEST) -> str:
    """Printable text, shortened in its middle to the width of a figure's label; the table has all of it."""
    cleaned = printable(text)
    if len(cleaned) <= longest:
        return cleaned
    tail = longest // 3
    return f"{cleaned[: longest - 1 - tail]}…{cleaned[-tail:]}"


def number(value: float | None) -> str:
    """Up to four significant digits; empty where there is no number."""
    return "" if value is None or math.isnan(value) else f"{value:.4g}"


def finite(value: float) -> str:
    """Four significant digits, or `not finite`."""
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def joined(values: Iterable[object]) -> str:
    """Distinct non-empty texts in order of appearance."""
    found = dict.fromkeys(str(value) for value in values if value is not None and value == value)
    return ", ".join(text for text in found if text) or "–"


def setup(n: Iterable[object], eps: Iterable[object], seeds: Iterable[object], device: Iterable[object]) -> str:
    """`n 1000; eps Linf 0.1; seeds 0, 1; device CPU x.`"""
    return f"n {joined(n)}; eps {joined(eps)}; seeds {joined(seeds)}; device {joined(device)}."


def measured_on(entries: list[EvaluationResult]) -> str:
    """The setup of evaluations."""
    budgets = (f"{entry.norm} {entry.eps}" if entry.norm else "none" for entry in entries)
    return setup((e.n for e in entries), budgets, (e.seed for e in entries), (e.device for e in entries))


def conditions(rows: Iterable[Row], eps: str = "", cells: Iterable[SeedValues | None] = ()) -> str:
    """The setup of rows. `cells`: the numbers shown, if not the worst case.

    Seeds are those in the numbers: a planned seed that lacks an attack is in no worst case.
    """
    listed = list(rows)
    shown = [cell for cell in (cells or [row.accuracy.worst for row in listed]) if cell is not None and cell.values]
    budgets = [eps] if eps else [f"{row.norm} {row.eps}" if row.norm else "none" for row in listed]
    return setup((cell.n or "" for cell in shown), budgets, seeds_of(shown), (row.provenance.device for row in listed))


def seeds_of(cells: Iterable[SeedValues]) -> list[int]:
    """The seeds in these numbers."""
    return sorted({seed for cell in cells for seed in cell.values})


def mark_of(model: Row | EvaluationResult) -> str:
    """What stands for one model in every table and figure of the page."""
    return model.config[:8]


def row_label(row: Row) -> str:
    """The name of a row in a figure, with its verdict if that is not OK."""
    budget = f" trained at {row.train_eps}" if row.train_eps not in ("–", row.eps) else ""
    mark = {"FLAG": f" {FLAG}", "UNSOUND": " (unsound)"}.get(row.verdict, "")
    return f"{row.name}{budget}{mark}"


def model_label(entry: EvaluationResult, with_architecture: bool = False) -> str:
    """The name of an evaluated model in a figure that is not made of rows."""
    architecture = f", {entry.model}" if with_architecture else ""
    budget = f" trained at {entry.train_eps}" if entry.train_eps is not None else ""
    return f"{entry.defense_label}{architecture}{budget}"


def by_setting(
    entries: Iterable[EvaluationResult], attack: str
) -> list[tuple[tuple[str, str, str], list[list[EvaluationResult]]]]:
    """Finished evaluations by this attack on test images, grouped by configuration, under the data set, the threat
    (empty without a budget) and the attack's settings that one figure shows."""
    groups: dict[tuple[str, str, str], dict[str, list[EvaluationResult]]] = {}
    for entry in (e for e in entries if (e.attack, e.state, e.split) == (attack, "done", "test")):
        place = (entry.dataset, f"{entry.norm} eps = {entry.eps}" if entry.norm else "", entry.attack_label)
        groups.setdefault(place, {}).setdefault(entry.config, []).append(entry)
    return [(place, list(by_config.values())) for place, by_config in sorted(groups.items())]


def best(rows: list[Row], most: int) -> list[Row]:
    """At most `most` rows for a figure: those with the best worst case, and the undefended baseline `standard`."""
    order = sorted(
        rows, key=lambda row: (-row.accuracy.worst.mean if row.accuracy.worst.values else 1.0, row.method, row.config)
    )
    baseline = [row for row in order if row.defense == "standard"][:1]
    chosen = {id(row) for row in [*baseline, *[row for row in order if row not in baseline]][:most]}
    return [row for row in order if id(row) in chosen]
