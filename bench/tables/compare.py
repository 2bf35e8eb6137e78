"""Two trained defenses side by side: paired differences on the images that both saw, and what each of them costs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.records.store import Store
from bench.results.cost import busy
from bench.results.evaluations import Evaluation
from bench.results.rows import Row
from bench.results.significance import Difference, Outcomes, difference, same_images
from bench.results.worst_case import minima
from bench.tables.selection import Pair, RowFilter, pairs
from bench.tables.text import aligned, json_text, percent, printed

COSTS = {
    "training work, F an image": "work_per_image_f",
    "training seconds": "train_seconds",
    "inference ms an image": "inference_ms",
    "peak memory MB": "peak_memory_mb",
}
ALONE = "of the trainings that had the machine to themselves"


@dataclass(frozen=True)
class Comparison:
    """One attack, `clean` or the worst case: accuracy of each side on the shared images and how they differ, or why
    there is no difference."""

    what: str
    a: float | None
    b: float | None
    found: Difference | None
    why: str = ""


@dataclass(frozen=True)
class CostRatio:
    """Of each side, None where unknown; `ratio` is a / b, None where the two cannot be compared; `why`: that, or of
    which trainings it is."""

    what: str
    a: float | None
    b: float | None
    ratio: float | None
    why: str = ""


def lines(store: Store, pair: Pair) -> list[Comparison]:
    """The worst case, single draws of stochastic models, clean, and every attack that both have."""
    a, b = pair.a, pair.b
    for row in (a, b):
        if row.verdict == "INVALID":
            return [Comparison("worst case", None, None, None, f"{row.method} is invalid")]
    seen = same_images(a, b)
    found = [_line("worst case", _of(a.accuracy.robust, pair.seeds[0]), _of(b.accuracy.robust, pair.seeds[1]), seen)]
    if found[0].found is None and seen:
        states = [row.accuracy.worst.state() for row in (a, b) if not row.accuracy.robust]
        found = [Comparison("worst case", None, None, None, ", ".join(states) or found[0].why)]
    if a.accuracy.share and b.accuracy.share:
        found.append(
            _line("single draw", _of(a.accuracy.share, pair.seeds[0]), _of(b.accuracy.share, pair.seeds[1]), seen)
        )
    names = sorted(a.provenance.entries.keys() & b.provenance.entries.keys(), key=lambda name: (name != "clean", name))
    return found + [_attack(store, name, pair) for name in names if name == "clean" or name in a.accuracy.attacks]


def _of(found: Outcomes, seed: int | None) -> Outcomes:
    return {s: column for s, column in found.items() if seed in (None, s)}


def _line(what: str, a: Outcomes, b: Outcomes, same: bool) -> Comparison:
    if not same:
        return Comparison(what, None, None, None, "judged on other images")
    found = difference(a, b)
    if found is None:
        return Comparison(what, None, None, None, "not run for this seed" if not a or not b else "no shared images")
    shared = sorted(a.keys() & b.keys())
    means = [fmean(float(by[seed][: found.n].mean()) for seed in shared or by) for by in (a, b)]
    return Comparison(what, means[0], means[1], found)


def _attack(store: Store, name: str, pair: Pair) -> Comparison:
    sides: list[Outcomes] = []
    hashes: dict[int, set[str | None]] = {}
    for row, seed in zip((pair.a, pair.b), pair.seeds, strict=True):
        asked = {s: entry for s, entry in row.provenance.entries[name].items() if seed in (None, s)}
        done = {s: entry for s, entry in asked.items() if entry.state == "done"}
        if asked and not done:
            states = sorted({entry.state for entry in asked.values()})
            return Comparison(name, None, None, None, f"{row.method}: {', '.join(states)}")
        for entry in done.values():
            hashes.setdefault(entry.n, set()).add(entry.test_hash)
        sides.append({s: minima(store, [(entry.key,)], row.budget)[0].robust for s, entry in done.items()})
    return _line(name, sides[0], sides[1], all(len(seen) == 1 for seen in hashes.values()))


def costs(pair: Pair) -> list[CostRatio]:
    """Work, seconds, milliseconds and memory, means over the seeds. Times of other devices have no ratio, and those of
    trainings beside other jobs are left out where each side has some that had the machine to themselves."""
    sides = [_trainings(row, seed) for row, seed in zip((pair.a, pair.b), pair.seeds, strict=True)]
    alone = [[entry for entry in side if not busy(entry)] for side in sides]
    devices = {entry.train_device for side in sides for entry in side}
    crowded = alone != sides
    found = []
    for what, column in COSTS.items():
        timed = column in ("train_seconds", "inference_ms")
        taken = alone if timed and all(alone) else sides
        a, b = (_mean(getattr(entry, column) for entry in side) for side in taken)
        no_ratio = ""
        if a is None or b is None:
            no_ratio = "not measured"
        elif column != "work_per_image_f" and len(devices) > 1:
            no_ratio = f"other devices: {', '.join(sorted(map(str, devices)))}"
        elif timed and crowded and taken is sides:
            no_ratio = "the machine did other jobs meanwhile"
        ratio = a / b if not no_ratio and a is not None and b else None
        found.append(CostRatio(what, a, b, ratio, no_ratio or (ALONE if crowded and taken is alone else "")))
    return found


def _trainings(row: Row, seed: int | None) -> list[Evaluation]:
    """One entry of each training."""
    entries = (entry for by in row.provenance.entries.values() for s, entry in by.items() if seed in (None, s))
    return list({entry.train_key: entry for entry in entries}.values())


def _mean(values: Iterable[float]) -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else None


def show(store: Store, name_a: str, name_b: str, where: RowFilter, as_json: bool) -> str:
    """The comparison at every shared budget as text, or as one JSON list."""
    found = pairs(store, name_a, name_b, where)
    if as_json:
        return json_text([_json(store, pair) for pair in found])
    return "\n\n".join(_text(store, pair) for pair in found)


def _json(store: Store, pair: Pair) -> dict[str, Any]:
    def side(row: Row, on: dict[str, bool]) -> dict[str, Any]:
        names = ("method", "model", "train_eps", "recipe", "epochs", "seeds", "verdict")
        own = {name: getattr(row, name) for name in names}
        own |= {"train_key": row.provenance.train_key, "device": row.provenance.device}
        own |= {"collapsed": list(row.accuracy.collapsed), "provisional": list(row.provisional), "pareto": on}
        return own

    rows = [
        {"what": line.what, "a": line.a, "b": line.b, "why": line.why or None}
        | (line.found._asdict() | {"significant": line.found.significant} if line.found else {})
        for line in lines(store, pair)
    ]
    sides = {"a": side(pair.a, pair.pareto[0]), "b": side(pair.b, pair.pareto[1])}
    about = {"dataset": pair.a.dataset, "norm": pair.a.norm, "eps": pair.a.eps}
    return {**about, **sides, "lines": rows, "costs": [vars(c) for c in costs(pair)]}


def _text(store: Store, pair: Pair) -> str:
    a, b = pair.a, pair.b
    place = f"{a.dataset}, {a.norm} eps {a.eps}" if a.norm else f"{a.dataset}, no attack"
    header = ["", "A %", "B %", "A - B, pp", "95 % interval", "McNemar p", "only A", "only B", "n", "seeds"]
    out = [place, *(f"{sign} = {_about(row, on)}" for sign, row, on in zip("AB", (a, b), pair.pareto, strict=True)), ""]
    out += aligned([header, *(_cells(line) for line in lines(store, pair))])
    spent = costs(pair)
    facts = [[c.what, _number(c.a), _number(c.b), c.why if c.ratio is None else f"{c.ratio:.2f}"] for c in spent]
    out += ["", *aligned([["", "A", "B", "A / B"], *facts])]
    out += [f"{c.what}: {c.why}" for c in spent if c.ratio is not None and c.why]
    return printed(out)


def _about(row: Row, on: dict[str, bool]) -> str:
    why = f"; not ranked: {'; '.join(row.provisional)}" if row.provisional else ""
    trained = f"{row.model}, train eps {row.train_eps}, {row.epochs} epochs ({row.provenance.train_key})"
    lost = f"; collapsed seeds: {', '.join(map(str, row.accuracy.collapsed))}" if row.accuracy.collapsed else ""
    kinds = ", ".join(kind for kind, there in on.items() if there) or "none"
    return f"{row.method}, {trained}, {row.verdict}{why}{lost}" + (f"; Pareto fronts: {kinds}" if on else "")


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
