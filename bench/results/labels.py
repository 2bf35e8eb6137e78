"""Names of rows that would otherwise be equal, and the reasons why numbers are absent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.planning.spec import TrainSpec
from bench.records.store import Store
from bench.results.grouping import flattened, grouped
from bench.terminal import counted

if TYPE_CHECKING:
    from bench.results.evaluations import EvaluationResult
    from bench.results.rows import Row

LONGEST_REASON = 200
SHOWN = 3  # rows that a note names
_SHORT = {"threat.eps": "train_eps", "threat.norm": "train_norm"}


def disambiguate(store: Store, found: list[Row]) -> list[Row]:
    """Rows with equal names get the settings in which they differ appended to the name."""
    alike = grouped(found, lambda row: (row.dataset, row.norm, row.eps, row.method, row.model))
    names = {}
    defaults = {f"train.{name}": TrainSpec.model_fields[name].default for name in TrainSpec.settings_added_later}
    for group in alike.values():
        # a job leaves out settings that were added later while they have their default
        flat = [{**defaults, **flattened(store.job(row.provenance.train_key).without_seed())} for row in group]
        differ = sorted(k for k in set().union(*flat) if len({str(f.get(k)) for f in flat}) > 1)
        for row, facts in zip(group, flat, strict=True):
            if differ:
                names[id(row)] = f"{row.method} [{', '.join(f'{_short(k)}={facts.get(k)}' for k in differ)}]"
    return [replace(row, method=names.get(id(row), row.method)) for row in found]


def named(found: list[Row]) -> list[Row]:
    """The rows with their names filled in."""
    tables = grouped(found, lambda row: (row.dataset, row.norm, row.eps))
    usual = {table: Counter(row.model for row in rows).most_common(1)[0][0] for table, rows in tables.items()}
    return [
        replace(row, name=row.method + (f", {row.model}" if row.model != usual[row.dataset, row.norm, row.eps] else ""))
        for row in found
    ]


def _short(setting: str) -> str:
    return _SHORT.get(setting) or setting.removeprefix("train.")


def lowest_single_attack(row: Row) -> tuple[float, int, str] | None:
    """The lowest accuracy under one attack on more images than the worst case, if it is below the worst case.

    Returns:
        Share, number of images and name of the attack, for the seeds of the worst case. None if no such attack is below
        it; otherwise the images of the worst case were easy ones.
    """
    seeds = row.accuracy.worst.values
    found = [
        (cell.only(seeds).mean, cell.n, name)
        for name, cell in (("clean", row.accuracy.clean), *row.accuracy.attacks.items())
        if seeds and cell.n > row.accuracy.worst.n and seeds.keys() <= cell.values.keys()
    ]
    lowest = min(found, default=None)
    return lowest if lowest and lowest[0] < row.accuracy.worst.mean else None


def different_n(found: Iterable[Row]) -> list[str]:
    """A note, or none, for rows whose attacks saw different numbers of images: what one attack alone leaves on more of
    them, where that is below the worst case; the largest differences first."""
    differ, lower = 0, list[tuple[float, str]]()
    for row in found:
        worst = row.accuracy.worst
        cells = [cell for cell in (row.accuracy.clean, *row.accuracy.attacks.values()) if cell.values]
        differ += bool(worst.values) and any(cell.n != worst.n for cell in cells)
        if below := lowest_single_attack(row):
            share, n, attack = below
            text = f"{row.name} {100 * worst.mean:.2f} on {worst.n}, {100 * share:.2f} by {attack} alone on {n}"
            lower.append((share - worst.mean, text))
    if not differ:
        return []
    shown = "; ".join(text for _, text in sorted(lower)[:SHOWN])
    left = len(lower) - SHOWN
    more = f"; and {counted(left, 'more row')}" if left > 0 else ""
    return [
        "attacks saw different numbers of images, and the worst case is over those that all attacks of a row share"
        + (f"; one attack on more images leaves less: {shown}{more}" if lower else "")
    ]


def chosen_by_draws(found: Iterable[Row]) -> list[str]:
    """A note, or none, for rows whose worst case is above the accuracy under one attack on as many images: a stochastic
    model's, where the draws that choose each image's attack are not those that judge it."""
    told = []
    for row in found:
        worst = row.accuracy.worst
        cells = {name: cell.only(worst.values) for name, cell in row.accuracy.attacks.items() if cell.n == worst.n}
        whole = [(cell.mean, name) for name, cell in cells.items() if cell.values.keys() == worst.values.keys()]
        lowest, attack = min(whole, default=(1.0, ""))
        if worst.values and lowest < worst.mean:
            told.append(f"{row.name} {100 * worst.mean:.2f}, {100 * lowest:.2f} by {attack} alone")
    shown = "; ".join(told[:SHOWN]) + (f"; and {counted(len(told) - SHOWN, 'more row')}" if len(told) > SHOWN else "")
    why = (
        "the worst case chooses each image's attack by some noise draws and judges it by others, so that no luck counts"
    )
    return [f"{why}; one attack alone may leave less: {shown}"] if told else []


def left_out(store: Store, known: Iterable[EvaluationResult], found: Iterable[Row]) -> list[str]:
    """Notes on what is in no row: what is outside of the scope of the store, and evaluations without a record."""
    shown = {entry.key for row in found for entry in row.evaluations}
    count = len({e.key for e in known if e.state == "missing" and e.measures is None} - shown)
    note = f"{counted(count, 'evaluation')} planned but not run: in no table (`bench forget --never-ran` removes them)"
    return [*([f"only {store.scope.about}"] if store.scope else []), *([note] if count else [])]


def collapses(found: Iterable[Row]) -> list[str]:
    """One line per row of which a seed learned nothing, or fell far below the other seeds."""
    lines = []
    for row in found:
        told = [f"seed {seed} did not learn: {shown}" for seed, shown in row.accuracy.unlearned.items()]
        lost = [seed for seed in row.accuracy.collapsed if seed not in row.accuracy.unlearned]
        told += [f"seed {seed} collapsed, far below the other seeds" for seed in lost]
        lines += [f"{row.name}: {'; '.join(told)}"] if told else []
    return list(dict.fromkeys(lines))


def failures(found: Iterable[Row]) -> list[str]:
    """Why numbers are absent, one line per seed, attacks and reason. Missing records need no explanation."""
    lines: dict[tuple[str, int, str], dict[str, None]] = {}
    for row in found:
        cells = [("clean", row.accuracy.clean), *row.accuracy.attacks.items()]
        cells += [*row.accuracy.proved.items(), *row.accuracy.measured.items()]
        cells += [("certified", cell) for cell in list(row.accuracy.certified.values())[:1]]
        cells += [] if row.accuracy.worst.values else [("worst case", row.accuracy.worst)]
        for name, cell in cells:
            for seed, (state, reason) in cell.absent.items():
                # what an incomplete worst case lacks has lines of its own, unless it was never planned
                if reason and (state != "incomplete" or "not planned" in reason):
                    short = reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 1] + "…"
                    lines.setdefault((row.name, seed, f"{state}: {short}"), {})[name] = None
    methods: dict[tuple[int, str, str], list[str]] = {}
    for (method, seed, why), names in lines.items():
        methods.setdefault((seed, ", ".join(names), why), []).append(method)
    return [f"{', '.join(of)}, seed {seed}, {names}: {why}" for (seed, names, why), of in methods.items()]
