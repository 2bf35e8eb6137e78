"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from bench.records.store import Store
from bench.results.evaluations import evaluations
from bench.results.labels import chosen_by_draws, collapses, different_n, failures, left_out
from bench.results.rows import Row
from bench.results.seed_values import MEDIAN, SeedValues
from bench.soundness.verdicts import judged_rows
from bench.tables import measures
from bench.tables.ranking import UNRANKED, not_made, reasons, titles, verdict_text
from bench.tables.text import decimals, percent

MATRIX_RADII = (0.25, 0.5)


class Summary(NamedTuple):
    """A table as text. `best`: the line and the column of each accuracy that no comparable line exceeds."""

    header: list[str]
    lines: list[list[str]]
    notes: list[str]
    best: frozenset[tuple[int, int]]


def matrix(store: Store, keys: Iterable[str]) -> Summary:
    """The end-of-run table of these jobs, in their order. Percent with half a 95 % interval."""
    store, asked = store.snapshot(), list(keys)
    known = evaluations(store, asked)
    place = {key: k for k, key in enumerate(asked)}
    readable = sorted(known.readable, key=lambda e: place[e.key])
    order = {config: k for k, config in enumerate(dict.fromkeys(e.config for e in readable))}
    found = judged_rows(store, asked, split=None, known=known)
    found.sort(key=lambda row: (order[row.config], row.norm or "", row.eps_value))
    attacking = [e for e in readable if e.norm and e.measures is None and not e.proves and e.state != "missing"]
    attacks = [e.attack_label for e in attacking]
    accuracies = _accuracies(found, list(dict.fromkeys(attacks)))
    columns = _matrix_columns(found, accuracies)
    lines = [[show(row) for show in columns.values()] for row in found]
    held_out = any(e.split == "validation" for e in readable)
    notes = [
        *(["evaluated on validation images: nothing here is a test result"] if held_out else []),
        *_matrix_notes(found, accuracies),
        *left_out(store, readable, found),
        *measures.notes(known, found),
        *(f"{e.key}: unreadable: {e.reason}" for e in known.unreadable),
    ]
    best = {(line, list(columns).index(name)) for name, value in accuracies.items() for line in _best(found, value)}
    return Summary(list(columns), lines, notes, frozenset(best))


def _accuracies(found: list[Row], attacks: list[str]) -> dict[str, Callable[[Row], SeedValues | None]]:
    """The accuracies in the order of their columns."""
    shown: dict[str, Callable[[Row], SeedValues | None]] = {"clean": lambda row: row.accuracy.clean}
    shown["worst case"] = lambda row: row.accuracy.worst
    for name in attacks:
        shown[name] = lambda row, name=name: row.accuracy.attacks.get(name)  # type: ignore[misc]
    for name in dict.fromkeys(name for row in found for name in row.accuracy.proved):
        shown[f"proved by {name}"] = lambda row, name=name: row.accuracy.proved.get(name)  # type: ignore[misc]
    for name in dict.fromkeys(name for row in found for name in row.accuracy.measured):
        shown[f"under {name}"] = lambda row, name=name: row.accuracy.measured.get(name)  # type: ignore[misc]
    for radius in MATRIX_RADII if any(row.accuracy.certified for row in found) else ():
        shown[f"certified {radius:g}"] = lambda row, r=radius: row.accuracy.certified.get(r)  # type: ignore[misc]
    return shown


def _best(found: list[Row], value: Callable[[Row], SeedValues | None]) -> Iterator[int]:
    """Places of the rows with the highest value among two or more under one budget; unsound rows do not compete."""
    groups: dict[object, dict[int, str]] = {}
    for place, row in enumerate(found):
        cell = value(row)
        if cell is not None and cell.values and row.verdict not in UNRANKED:
            groups.setdefault((row.dataset, row.norm, row.eps), {})[place] = percent(cell.mean, 1)
    for shown in groups.values():
        highest = max(shown.values(), key=float)
        yield from (place for place, text in shown.items() if text == highest and len(shown) > 1)


def _budget(row: Row) -> str:
    return f"{row.norm} {row.eps}" if row.norm else "–"


def _one_budget(found: list[Row]) -> str | None:
    """The budget under which all rows were attacked; None where there are several."""
    budgets = {_budget(row) for row in found}
    return next(iter(budgets)) if len(budgets) == 1 else None


def _matrix_columns(
    found: list[Row], accuracies: dict[str, Callable[[Row], SeedValues | None]]
) -> dict[str, Callable[[Row], str]]:
    columns: dict[str, Callable[[Row], str]] = {"defense": lambda row: row.method}
    for name in ("dataset", "model"):
        if len({getattr(row, name) for row in found}) > 1:
            columns[name] = lambda row, name=name: getattr(row, name)  # type: ignore[misc]
    if _one_budget(found) is None:  # else a note says it
        columns["eps"] = _budget
    if any(row.train_eps not in ("–", row.eps) for row in found):
        columns["train eps"] = lambda row: row.train_eps
    for name, value in accuracies.items():
        if name.startswith("certified"):
            columns[name] = lambda row, value=value: _certificate(row, value(row))  # type: ignore[misc]
        else:
            columns[name] = lambda row, value=value: _short(row, value(row))  # type: ignore[misc]
        if name == "worst case":  # what a reader looks for comes first
            columns[name] = lambda row: _short(row, row.accuracy.worst) + ("†" if row.provisional else "")
            columns["verdict"] = verdict_text
    if any(row.accuracy.certified for row in found):
        columns["ACR"] = lambda row: (
            f"{row.accuracy.acr.mean:.3f}"
            if row.accuracy.acr.values
            else _certificate(row, row.accuracy.certified.get(MATRIX_RADII[0]))
        )
    if any(row.cost.train_seconds > 0 for row in found):  # not for models that were trained elsewhere
        columns["train s"] = lambda row: decimals(row.cost.train_seconds, 1)
        columns["× standard"] = lambda row: decimals(row.cost.ratio, 2)
    return columns


def _short(row: Row, cell: SeedValues | None) -> str:
    if cell is None or not cell.values:
        return cell.state() if cell else "not run"
    (low, high), done, planned = cell.interval(), len(cell.values), len(row.seeds)
    seeds = f" ({done}/{planned})" if done < planned else ""
    median = f" ({cell.median()})" if cell.distance else ""
    return f"{percent(cell.mean, 1)} ±{50 * (high - low):.1f}{median}{seeds}"


def _matrix_notes(found: list[Row], accuracies: dict[str, Callable[[Row], SeedValues | None]]) -> list[str]:
    sizes: dict[str, set[int]] = {}
    for name, value in sorted(accuracies.items(), key=lambda each: each[0] == "worst case"):  # stable
        for cell in filter(None, map(value, found)):
            if cell.values:
                # certificates at all radii are over the same images
                sizes.setdefault("certified" if name.startswith("certified ") else name, set()).add(cell.n)
    of = {name: "/".join(map(str, sorted(n))) for name, n in sizes.items()}
    images = (
        ", ".join(map(" ".join, of.items())) if len(set(of.values())) > 1 else f"{next(iter(of.values()), '')} each"
    )
    at = f"{budget}: " if (budget := _one_budget(found)) not in (None, "–") else ""
    notes = [f"{at}percent ± half a 95 % interval; images: {images}"] if of else []
    if any(row.accuracy.acr.values for row in found):
        notes.append("ACR: average certified L2 radius in pixel units, 0 where the vote is wrong or abstains")
    partial = [row for row in found if 0 < len(row.accuracy.worst.values) < len(row.seeds)]
    notes += ["(k/s): k of s seeds; only seeds with every attack count in the worst case"] if partial else []
    notes += (
        ["training times were taken while the machine did other jobs"]
        if any(r.cost.shared and r.cost.train_seconds > 0 for r in found)
        else []
    )
    notes += collapses(found)
    notes += [MEDIAN] if any(cell.distance for row in found for cell in row.accuracy.attacks.values()) else []
    lacking: dict[str, list[str]] = {}
    for row in found:
        for reason in row.provisional:
            lacking.setdefault(reason, []).append(row.name)
    for reason, methods in lacking.items():
        names = "all" if len(methods) == len(found) > 1 else ", ".join(dict.fromkeys(methods))
        notes.append(f"† {reason} ({names})")
    return [
        *notes,
        *different_n(found),
        *chosen_by_draws(found),
        *titles(found),
        *not_made(found),
        *reasons(found),
        *failures(found),
    ]


def _certificate(row: Row, cell: SeedValues | None) -> str:
    """Only smoothed models can certify; elsewhere there is nothing to run."""
    return _short(row, cell) if row.accuracy.certified or row.deploys == "smoothed" else "–"
