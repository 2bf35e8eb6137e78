"""What trainings and attacks cost, grouped so that times of different hardware never stand in one table."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.results.cost import busy, standard_times, time_class
from bench.results.evaluations import Evaluation
from bench.results.rows import Row
from bench.tables.compare import aligned
from bench.tables.ranking import UNRANKED
from bench.terminal import plain

SHARED = "‡"


@dataclass(frozen=True)
class Training:
    """One trained configuration, means over its seeds; NaN where nothing was measured.

    `ratio`: training seconds over those of `standard` on the same data, model, device, recipe and use of the machine.
    `work_f`: of a training step per image, in forward passes of the net. `robust`: the worst case in [0,1] over n
    images at `budget`, the one trained at or else the largest attacked, `verdict` is of that row, and `per_hour` is
    percent of it over the hours of training; `collapsed` of the seeds in that are. `predictor`: deterministic,
    randomized or smoothed, and `inference_ms` is of all its draws. `shared`: the machine did other jobs meanwhile.
    """

    dataset: str
    model: str
    images: int
    device: str
    method: str
    predictor: str
    train_eps: str
    recipe: str
    epochs: int
    seeds: int
    seconds: float
    seconds_per_epoch: float
    ratio: float
    work_f: float
    inference_ms: float
    peak_memory_mb: float
    budget: str
    robust: float
    collapsed: int
    n: int
    verdict: str
    per_hour: float
    shared: bool
    config: str


@dataclass(frozen=True)
class Attack:
    """One attack on one kind of model, means over all trained models: milliseconds and passes per image attacked."""

    dataset: str
    model: str
    device: str
    deploys: str
    attack: str
    shared: bool
    models: int
    seconds: float
    ms_per_image: float
    forwards: float
    backwards: float


def trainings(rows: Iterable[Row]) -> list[Training]:
    """One line a trained configuration that was measured, by group (data, model, device) and then by name."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.config, []).append(row)
    entries = {e.train_key: e for row in (r for group in groups.values() for r in group) for e in row.evaluations}
    times = standard_times(list(entries.values()))
    found = [line for group in groups.values() for line in _by_device(group, times)]
    return sorted(found, key=lambda t: (t.dataset, t.model, t.images, t.device, t.shared, t.method, t.config))


def _by_device(group: list[Row], times: dict[tuple[Any, ...], float]) -> list[Training]:
    """A configuration whose seeds were trained on several devices, or some beside other jobs, is a line for each."""
    row = _judged(group)
    entries = {e.train_key: e for r in group for e in r.evaluations if not math.isnan(e.train_seconds)}
    kinds: dict[tuple[Any, ...], list[Evaluation]] = {}
    for entry in entries.values():
        kinds.setdefault(time_class(entry), []).append(entry)
    return [_training(row, seeds, times.get(kind, math.nan)) for kind, seeds in kinds.items()]


def _judged(group: list[Row]) -> Row:
    """The row whose robust accuracy is told: at the budget trained at, or else the largest one."""
    own = [row for row in group if row.norm and row.eps == row.train_eps]
    return max(own or group, key=lambda row: (row.norm or "", row.budget))


def _training(row: Row, seeds: list[Evaluation], standard: float) -> Training:
    seconds = _mean(entry.train_seconds for entry in seeds)
    told = row.accuracy.worst.values and row.verdict != "INVALID"
    robust = row.accuracy.worst.mean if told else math.nan
    return Training(
        dataset=row.dataset,
        model=row.model,
        images=int(seeds[0].train_images),
        device=seeds[0].train_device or "unknown",
        method=row.method,
        predictor=row.deploys,
        train_eps=row.train_eps,
        recipe=row.recipe,
        epochs=int(row.epochs),
        seeds=len(seeds),
        seconds=seconds,
        seconds_per_epoch=_mean(entry.seconds_per_epoch for entry in seeds),
        ratio=seconds / standard,
        work_f=_mean(entry.work_per_image_f for entry in seeds),
        inference_ms=_mean(entry.inference_ms for entry in seeds),
        peak_memory_mb=_mean(entry.peak_memory_mb for entry in seeds),
        budget=f"{row.norm} {row.eps}" if row.norm else "",
        robust=robust,
        collapsed=sum(entry.seed in row.accuracy.collapsed for entry in seeds) if told else 0,
        n=row.accuracy.worst.n if told else 0,
        verdict=row.verdict,
        per_hour=100 * robust / (seconds / 3600) if seconds > 0 and row.verdict not in UNRANKED else math.nan,
        shared=busy(seeds[0]),
        config=row.config,
    )


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def attacks(rows: Iterable[Row]) -> list[Attack]:
    """One line an attack, kind of model and device, from the evaluations that count and are done."""
    groups: dict[tuple[str, str, str, str, str, bool], dict[str, Evaluation]] = {}
    for row in rows:
        for name, by in row.provenance.entries.items():
            for entry in by.values():
                if entry.state == "done":
                    workers, device = entry.attack_workers, str(entry.device or "unknown")
                    many = isinstance(workers, int) and workers > 1
                    kind = row.dataset, row.model, device, row.deploys, name, many
                    # a security curve stands in the row of each of its budgets, once each is enough
                    groups.setdefault(kind, {})[entry.key] = entry
    found = []
    for kind, by_key in sorted(groups.items()):
        entries = list(by_key.values())
        pace = [1000 * entry.attack_seconds / entry.n for entry in entries]
        passes = [_mean(getattr(entry, name) for entry in entries) for name in ("forwards", "backwards")]
        seconds = _mean(entry.attack_seconds for entry in entries)
        found.append(Attack(*kind, len(entries), seconds, _mean(pace), *passes))
    return found


def lines(found: Iterable[Training] | Iterable[Attack]) -> list[dict[str, object]]:
    """For timing.csv and attack_timing.csv: every field, in its order."""
    return [dict(vars(each)) for each in found]


def show(rows: list[Row], as_json: bool) -> str:
    """Both as text, a table for each data set, model and device, or as one JSON object."""
    trained, attacked = trainings(rows), attacks(rows)
    if as_json:
        content = {"trainings": lines(trained), "attacks": lines(attacked)}
        finite = {name: [{k: _finite(v) for k, v in line.items()} for line in part] for name, part in content.items()}
        return json.dumps(finite, indent=1, sort_keys=True, allow_nan=False)
    parts: list[str] = []
    groups: dict[tuple[Any, ...], list[Training]] = {}
    for t in trained:
        groups.setdefault((t.dataset, t.model, t.images, t.device), []).append(t)
    for (dataset, model, images, device), members in groups.items():
        parts += [f"{dataset}, {model}, {images} training images, {device}", ""]
        parts += [*aligned(_table(_TRAINING, members)), ""]
    kinds: dict[tuple[str, str, str], list[Attack]] = {}
    for a in attacked:
        kinds.setdefault((a.dataset, a.model, a.device), []).append(a)
    for (dataset, model, device), those in kinds.items():
        parts += [f"attacks on {dataset}, {model}, {device}", "", *aligned(_table(_ATTACK, those)), ""]
    if any(t.shared for t in trained) or any(a.shared for a in attacked):
        parts += [f"{SHARED} the machine did other jobs meanwhile: compare such times with each other at most", ""]
    notes = (
        "work F: of a training step per image, in forward passes of the net; robust %/h: worst case over training hours"
    )
    return "\n".join(plain(line) for line in [*parts, notes]) if parts else "no training was timed yet"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float, digits: int = 1) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


_TRAINING: dict[str, Callable[[Training], str]] = {
    "method": lambda t: t.method + (f" {SHARED}" if t.shared else ""),
    "train eps": lambda t: t.train_eps,
    "epochs": lambda t: f"{t.epochs}" + ("" if t.recipe == "shared" else f" {t.recipe}"),
    "seeds": lambda t: f"{t.seeds}" + (f", {t.collapsed} collapsed" if t.collapsed else ""),
    "train s": lambda t: _number(t.seconds),
    "s/epoch": lambda t: _number(t.seconds_per_epoch, 2),
    "× standard": lambda t: _number(t.ratio, 2),
    "work F": lambda t: _number(t.work_f),
    "infer ms": lambda t: _number(t.inference_ms, 3) + ("" if t.predictor == "deterministic" else f", {t.predictor}"),
    "peak MB": lambda t: _number(t.peak_memory_mb, 0),
    "robust %": lambda t: _number(100 * t.robust),
    "at": lambda t: t.budget or "–",
    "n": lambda t: str(t.n or "–"),
    "verdict": lambda t: t.verdict,
    "robust %/h": lambda t: _number(t.per_hour, 0),
}
_ATTACK: dict[str, Callable[[Attack], str]] = {
    "attack": lambda a: (
        a.attack + (f" {SHARED}" if a.shared else "") + ("" if a.deploys == "deterministic" else f", {a.deploys} model")
    ),
    "models": lambda a: str(a.models),
    "s": lambda a: _number(a.seconds),
    "ms/image": lambda a: _number(a.ms_per_image, 2),
    "forwards": lambda a: _number(a.forwards),
    "backwards": lambda a: _number(a.backwards),
}


def _table(columns: dict[str, Callable[[Any], str]], members: Iterable[Any]) -> list[list[str]]:
    return [[*columns], *([cell(member) for cell in columns.values()] for member in members)]
