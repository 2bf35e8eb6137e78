"""Columns of the leaderboard as text: each number with its qualifications."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from bench.planning import catalog
from bench.planning.job import IMPORTED
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.tables.pareto import describe_fronts, fronts
from bench.tables.ranking import flags, unreliable
from bench.tables.text import decimals, percent
from bench.terminal import counted

LONGEST_VENUE = 120


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sort key for natural order: `cifar10` before `cifar100`, 2 before 10."""
    parts = re.findall(r"[0-9]+|[^0-9]+", text)
    return [(0, int(p), "") if p[0] in "0123456789" else (1, 0, p.lower()) for p in parts]


def provisional_letters(rows: list[Row]) -> dict[str, str]:
    """A letter for each reason why a row of this table is provisional."""
    reasons = dict.fromkeys(reason for row in rows for reason in row.provisional)
    return {reason: chr(ord("a") + k) if k < 26 else f"r{k}" for k, reason in enumerate(reasons)}


def shared_times(rows: list[Row]) -> tuple[set[int], str]:
    """Which rows (by id) are the exception, ‡, in whether the machine did other jobs during the training; and what to
    say of it, empty where no row was disturbed."""
    timed = [row for row in rows if not math.isnan(row.cost.train_seconds)]
    shared = {id(row) for row in timed if row.cost.shared}
    alone = {id(row) for row in timed} - shared
    if not shared:
        return set(), ""
    if len(shared) > len(alone):
        return alone, "times are not comparable: the machine did other jobs meanwhile" + (", except ‡" if alone else "")
    return shared, "‡ not comparable with other times: the machine did other jobs meanwhile"


def columns(rows: list[Row], letters: dict[str, str]) -> dict[str, Callable[[Row], str]]:
    """RobustBench's columns in its order, then ours."""
    shown: dict[str, Callable[[Row], str]] = {
        "Method": lambda row: row.method,
        "Standard accuracy": lambda row: cell_text(row, row.accuracy.clean),
        "AutoAttack robust accuracy": lambda row: cell_text(row, row.accuracy.autoattack),
        "Best known robust accuracy": lambda row: cell_text(row, row.accuracy.worst),
        **(
            {"Single draw": lambda row: cell_text(row, row.accuracy.single)}
            if any(r.accuracy.single.values for r in rows)
            else {}
        ),
        "AA eval. potentially unreliable": unreliable,
        "Extra data": lambda row: "unknown" if row.recipe == IMPORTED else "✗",
        "Architecture": lambda row: row.model,
        "Venue": _venue,
        "Verdict": lambda row: row.verdict,
        "Flags": flags,
        "95 % interval": _interval_text,
    }
    # except AutoAttack, which has its own column
    own = {name for row in rows for name, cell in row.accuracy.attacks.items() if cell is not row.accuracy.autoattack}
    for name in sorted(own, key=natural):
        shown[name] = lambda row, name=name: cell_text(row, row.accuracy.attacks.get(name))  # type: ignore[misc]
    for name in sorted({name for row in rows for name in row.accuracy.proved}, key=natural):
        shown[f"proved by {name}"] = lambda row, name=name: cell_text(row, row.accuracy.proved.get(name))  # type: ignore[misc]
    for name in sorted({name for row in rows for name in row.accuracy.measured}, key=natural):
        shown[f"accuracy under {name}"] = lambda row, name=name: cell_text(row, row.accuracy.measured.get(name))  # type: ignore[misc]
    for radius in sorted({radius for row in rows for radius in row.accuracy.certified}):
        shown[f"certified at L2 {radius:g}"] = lambda row, r=radius: cell_text(row, row.accuracy.certified.get(r))  # type: ignore[misc]
    if any(row.accuracy.certified for row in rows):
        shown["average certified L2 radius"] = lambda row: cell_text(row, row.accuracy.acr, "{:.3f}".format)
    if any(row.provenance.draws for row in rows):
        shown["EOT draws"] = lambda row: str(row.provenance.draws or "–")
    on, (odd, _) = fronts(rows), shared_times(rows)
    return shown | {
        "n": lambda row: str(row.accuracy.worst.n) if row.accuracy.worst.values else "–",
        "Seeds": _seeds_text,
        "Train eps": lambda row: row.train_eps,
        "Training s (× standard)": lambda row: _time_text(row) + (" ‡" if id(row) in odd else ""),
        "Attacks s": lambda row: decimals(row.cost.attack_seconds, 1),
        "Peak GB": lambda row: decimals(row.cost.peak_memory_mb / 1000, 2),
        "Pareto front": lambda row: describe_fronts(on, row),
        "Selected on": lambda row: row.provenance.selected,
        "Recipe": recipe_text,
        "Device": lambda row: row.provenance.device,
        "Commit": lambda row: row.provenance.commit,
        "Provisional": lambda row: ", ".join(letters[reason] for reason in row.provisional) or "no",
    }


def recipe_text(row: Row) -> str:
    """`shared, 4 epochs`, or that the model was imported."""
    return row.recipe if row.recipe == IMPORTED else f"{row.recipe}, {counted(row.epochs, 'epoch')}"


def paper(defense: str) -> str | None:
    """The paper a defense comes from; empty where its file names none, None where there is no such file anymore."""
    plugin = catalog.find("defenses", defense)
    return plugin.source.partition(":")[0] if plugin else None


def _venue(row: Row) -> str:
    found = paper(row.defense)
    return "unknown" if found is None else found[:LONGEST_VENUE] or "–"


def cell_text(row: Row, cell: SeedValues | None, show: Callable[[float], str] = percent) -> str:
    """The number with its qualifications, or the reason why it is absent."""
    if cell is None or not cell.values:
        return cell.state() if cell else "not run"
    # AutoAttack always runs its suite `rand` on a stochastic model
    notes = ["rand"] if cell is row.accuracy.autoattack and row.deploys != "deterministic" else []
    notes += [cell.median()] if cell.distance else []
    notes += ["audited"] if cell.unjudged else []
    notes += [f"std {show(cell.std)}"] if len(cell.values) > 1 else []
    if cell.n != row.accuracy.worst.n or not row.accuracy.worst.values:
        notes.append(f"n={cell.n}")
    if cell is not row.accuracy.worst and len(cell.values) < len(row.seeds):
        notes.append(f"{len(cell.values)}/{len(row.seeds)} seeds")
        notes += [cell.state()] if cell.absent else []
    return show(cell.mean) + (f" ({', '.join(notes)})" if notes else "")


def _interval_text(row: Row) -> str:
    low, high = row.accuracy.worst.interval()
    return f"{percent(low)} to {percent(high)}" if row.accuracy.worst.values else "–"


def _seeds_text(row: Row) -> str:
    """Seeds done/planned, the worst case of each of several, the collapsed seeds and the mean without them."""
    if row.verdict == "INVALID":
        return "–"
    text = f"{len(row.accuracy.worst.values)}/{len(row.seeds)}"
    if len(row.accuracy.worst.values) > 1:
        text += (
            " ("
            + ", ".join(f"{seed}: {percent(value)}" for seed, value in sorted(row.accuracy.worst.values.items()))
            + ")"
        )
    collapsed = ", ".join(map(str, row.accuracy.collapsed))
    if not collapsed:
        return text
    others = row.accuracy.worst.without(row.accuracy.collapsed)
    beside = f"; the others {percent(others.mean)} (std {percent(others.std)})" if others.values else ""
    return f"{text}, {len(row.accuracy.collapsed)} collapsed (seed {collapsed}{beside})"


def _time_text(row: Row) -> str:
    if math.isnan(row.cost.train_seconds):
        return "–"
    ratio = "" if math.isnan(row.cost.ratio) else f" ({row.cost.ratio:.2f}×)"
    return f"{row.cost.train_seconds:.1f}{ratio}"
