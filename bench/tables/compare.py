"""Two trained defenses side by side: paired differences on the images that both saw, and what each of them costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from bench.records.store import Store
from bench.results.cost import busy, mean_known
from bench.results.labels import collapses
from bench.results.rows import Row
from bench.results.significance import Difference, Outcomes, difference, same_images
from bench.results.worst_case import minima
from bench.tables.selection import Pair, RowFilter, pairs
from bench.tables.text import aligned, json_text, percent, printed
from bench.terminal import counted

COSTS = {
    "training work, F an image": "work_per_image_f",
    "training seconds": "train_seconds",
    "inference ms an image": "inference_ms",
    "peak memory MB": "peak_memory_mb",
}
Value = TypeVar("Value")
ALONE = "of the trainings that had the machine to themselves"


@dataclass(frozen=True)
class Comparison:
    """One attack, `clean` or the worst case: accuracy of each side on the shared images and how they differ, or why
    there is no difference."""

    what: str
    a: float | None = None
    b: float | None = None
    found: Difference | None = None
    why: str = ""


@dataclass(frozen=True)
class CostRatio:
    """One cost of each side, None where unknown; `ratio` is a / b, None where the two cannot be compared; `why`: that,
    or of which trainings it is."""

    what: str
    a: float | None
    b: float | None
    ratio: float | None
    why: str = ""


def lines(store: Store, pair: Pair) -> list[Comparison]:
    """The worst case, single draws of stochastic models, clean, and every attack that both have."""
    a, b = pair.rows
    for row in pair.rows:
        if row.verdict == "INVALID":
            return [Comparison("worst case", why=f"{row.name} is invalid")]
    seen = same_images(a, b)
    robust_a, robust_b = (_of(row.accuracy.robust, seed) for row, seed in pair.sides)
    found = [_compared("worst case", robust_a, robust_b, seen)]
    if found[0].found is None and seen:
        states = [row.accuracy.worst.state() for row in pair.rows if not row.accuracy.robust]
        found = [Comparison("worst case", why=", ".join(states) or found[0].why)]
    if a.accuracy.share and b.accuracy.share:
        share_a, share_b = (_of(row.accuracy.share, seed) for row, seed in pair.sides)
        found.append(_compared("single draw", share_a, share_b, seen))
    shared = a.provenance.entries.keys() & b.provenance.entries.keys()
    attacks = sorted(name for name in shared if name in a.accuracy.attacks)
    return found + [_attack(store, name, pair) for name in ["clean", *attacks] if name in shared]


def _of(by_seed: dict[int, Value], seed: int | None) -> dict[int, Value]:
    return {s: value for s, value in by_seed.items() if seed in (None, s)}


def _compared(what: str, a: Outcomes, b: Outcomes, same: bool) -> Comparison:
    if not same:
        return Comparison(what, why="evaluated on other images")
    found = difference(a, b)
    if found is None:
        return Comparison(what, why="not run for this seed" if not a or not b else "no shared images")
    shared = sorted(a.keys() & b.keys())
    mean_a, mean_b = (fmean(float(by[seed][: found.n].mean()) for seed in shared or by) for by in (a, b))
    return Comparison(what, mean_a, mean_b, found)


def _attack(store: Store, name: str, pair: Pair) -> Comparison:
    outcomes: list[Outcomes] = []
    hashes: dict[int, set[str | None]] = {}
    for row, seed in pair.sides:
        planned = _of(row.provenance.entries[name], seed)
        done = {s: entry for s, entry in planned.items() if entry.state == "done"}
        if planned and not done:
            states = sorted({entry.state for entry in planned.values()})
            return Comparison(name, why=f"{row.name}: {', '.join(states)}")
        for entry in done.values():
            hashes.setdefault(entry.n, set()).add(entry.test_hash)
        outcomes.append({s: minima(store, [(entry.key,)], row.budget)[0].robust for s, entry in done.items()})
    return _compared(name, outcomes[0], outcomes[1], all(len(seen) == 1 for seen in hashes.values()))


def costs(pair: Pair) -> list[CostRatio]:
    """Work, seconds, milliseconds and memory, means over the seeds. Times on different devices have no ratio, and those
    of trainings beside other jobs are left out where each side has some that had the machine to themselves."""
    sides = [
        list({e.train_key: e for e in row.evaluations if seed in (None, e.seed)}.values()) for row, seed in pair.sides
    ]
    alone = [[entry for entry in side if not busy(entry)] for side in sides]
    devices = {entry.train_device for side in sides for entry in side}
    crowded = alone != sides
    found = []
    for what, column in COSTS.items():
        timed = column in ("train_seconds", "inference_ms")
        chosen = alone if timed and all(alone) else sides
        a, b = (mean_known(getattr(entry, column) for entry in side) for side in chosen)
        why = ""
        if math.isnan(a) or math.isnan(b):
            why = "not measured"
        elif column != "work_per_image_f" and len(devices) > 1:
            why = f"other devices: {', '.join(sorted(map(str, devices)))}"
        elif timed and crowded and chosen is sides:
            why = "the machine did other jobs meanwhile"
        ratio = a / b if not why and b else None
        known_a, known_b = (None if math.isnan(value) else value for value in (a, b))
        found.append(CostRatio(what, known_a, known_b, ratio, why or (ALONE if crowded and chosen is alone else "")))
    return found


def show(store: Store, name_a: str, name_b: str, where: RowFilter, as_json: bool) -> str:
    """The comparison at every shared budget as text, or as one JSON list."""
    found = pairs(store, name_a, name_b, where)
    if as_json:
        return json_text([_json(store, pair) for pair in found])
    return "\n\n".join(_text(store, pair) for pair in found)


def _json(store: Store, pair: Pair) -> dict[str, Any]:
    def side(row: Row, on: dict[str, bool]) -> dict[str, Any]:
        names = ("method", "model", "train_eps", "recipe", "epochs", "seeds", "verdict", "provisional")
        own = {name: getattr(row, name) for name in names}
        own |= {"train_key": row.provenance.train_key, "device": row.provenance.device}
        return own | {"collapsed": row.accuracy.collapsed, "pareto": on}

    rows = [
        {"what": line.what, "a": line.a, "b": line.b, "why": line.why or None}
        | (line.found._asdict() | {"significant": line.found.significant} if line.found else {})
        for line in lines(store, pair)
    ]
    a, b = pair.rows
    about = {"dataset": a.dataset, "norm": a.norm, "eps": a.eps}
    sides = {"a": side(a, pair.pareto[0]), "b": side(b, pair.pareto[1])}
    return {**about, **sides, "lines": rows, "costs": [vars(c) for c in costs(pair)]}


def _text(store: Store, pair: Pair) -> str:
    a = pair.rows[0]
    out = [f"{a.dataset}, {a.norm} eps {a.eps}" if a.norm else f"{a.dataset}, no attack"]
    out += [f"{sign} = {_about(row, on)}" for sign, row, on in zip("AB", pair.rows, pair.pareto, strict=True)]
    header = ["", "A %", "B %", "A - B, pp", "95 % interval", "McNemar p", "only A", "only B", "n", "seeds"]
    out += ["", *aligned([header, *(_cells(line) for line in lines(store, pair))])]
    spent = costs(pair)
    facts = [[c.what, _number(c.a), _number(c.b), c.why if c.ratio is None else f"{c.ratio:.2f}"] for c in spent]
    out += ["", *aligned([["", "A", "B", "A / B"], *facts])]
    return printed([*out, *(f"{c.what}: {c.why}" for c in spent if c.ratio is not None and c.why)])


def _about(row: Row, on: dict[str, bool]) -> str:
    why = f"; provisional: {'; '.join(row.provisional)}" if row.provisional else ""
    trained = f"{row.model}, train eps {row.train_eps}, {counted(row.epochs, 'epoch')} ({row.provenance.train_key})"
    lost = "".join(f"; {line.removeprefix(f'{row.name}: ')}" for line in collapses([row]))
    kinds = ", ".join(kind for kind, there in on.items() if there) or "none"
    return f"{row.name}, {trained}, {row.verdict}{why}{lost}" + (f"; Pareto fronts: {kinds}" if on else "")


def _cells(line: Comparison) -> list[str]:
    f = line.found
    if f is None or line.a is None or line.b is None:
        return [line.what, "–", "–", line.why]
    p = "–" if f.p is None else f"{f.p:.3f}" if f.p >= 0.001 else "<0.001"
    only = ["–" if count is None else str(count) for count in (f.only_a, f.only_b)]
    seeds = "/".join(map(str, dict.fromkeys(f.seeds)))
    mark = " *" if f.significant else ""
    interval = f"{100 * f.low:+.2f} to {100 * f.high:+.2f}"
    accuracies = [percent(line.a), percent(line.b)]
    return [line.what, *accuracies, f"{100 * f.difference:+.2f}{mark}", interval, p, *only, str(f.n), seeds]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
