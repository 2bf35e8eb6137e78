"""Cost of trainings and attacks, one table per device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.results.cost import busy, mean_known, standard_times, time_class
from bench.results.evaluations import EvaluationResult
from bench.results.grouping import grouped
from bench.results.rows import Row
from bench.tables.ranking import UNRANKED
from bench.tables.selection import NO_ROW
from bench.tables.text import aligned, decimals, json_text, printed
from bench.terminal import counted

SHARED = "‡"


@dataclass(frozen=True)
class Training:
    """One trained configuration, means over its seeds; NaN where nothing was measured.

    `ratio`: training seconds over those of `standard` on the same data, model, device, recipe and use of the machine.
    `work_f`: of a training step per image, in forward passes of the net. `robust`: the worst case in [0,1] over n
    images at `budget`, the one trained at or else the largest attacked, `verdict` is of that row, and `per_hour` is
    percent of it over the hours of training; `collapsed` of the seeds in that are. `predictor`: deterministic,
    randomized or smoothed, and `inference_ms` is of all its draws. `joules`: that the GPU used for the job. `shared`:
    the machine did other jobs meanwhile.
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
    joules: float
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
    """One line per trained configuration that was measured, by group (data, model, device) and then by name.

    A configuration whose seeds were trained on several devices, or some beside other jobs, has a line for each.
    """
    configs = grouped(rows, lambda row: row.config).values()
    times = standard_times([e for group in configs for row in group for e in row.evaluations])
    found = []
    for group in configs:
        entries = {e.train_key: e for row in group for e in row.evaluations if not math.isnan(e.train_seconds)}
        own = [row for row in group if row.norm and row.eps == row.train_eps]
        shown = max(own or group, key=lambda row: (row.norm or "", row.budget))
        for kind, seeds in grouped(entries.values(), time_class).items():
            found.append(_training(shown, seeds, times.get(kind, math.nan)))
    return sorted(found, key=lambda t: (t.dataset, t.model, t.images, t.device, t.shared, t.method, t.config))


def _training(row: Row, seeds: list[EvaluationResult], standard: float) -> Training:
    seconds, worst = mean_known(entry.train_seconds for entry in seeds), row.accuracy.worst
    evaluated = bool(worst.values) and row.verdict != "INVALID"
    robust = worst.mean if evaluated else math.nan
    return Training(
        **{name: getattr(row, name) for name in ("dataset", "model", "method", "train_eps", "recipe", "epochs")},
        seconds_per_epoch=mean_known(entry.seconds_per_epoch for entry in seeds),
        inference_ms=mean_known(entry.inference_ms for entry in seeds),
        peak_memory_mb=mean_known(entry.peak_memory_mb for entry in seeds),
        joules=mean_known(entry.train_joules for entry in seeds),
        images=seeds[0].train_images,
        device=seeds[0].train_device or "unknown",
        predictor=row.deploys,
        seeds=len(seeds),
        seconds=seconds,
        ratio=seconds / standard,
        work_f=mean_known(entry.work_per_image_f for entry in seeds),
        budget=f"{row.norm} {row.eps}" if row.norm else "",
        robust=robust,
        collapsed=sum(entry.seed in row.accuracy.collapsed for entry in seeds) if evaluated else 0,
        n=worst.n if evaluated else 0,
        verdict=row.verdict,
        per_hour=100 * robust / (seconds / 3600) if seconds > 0 and row.verdict not in UNRANKED else math.nan,
        shared=busy(seeds[0]),
        config=row.config,
    )


def attacks(rows: Iterable[Row]) -> list[Attack]:
    """One line per attack, kind of model and device, from the evaluations that count and are done."""
    # a security curve belongs to the row of each of its budgets and is counted once
    done = {e.key: (row, e) for row in rows for e in row.evaluations if e.state == "done"}
    kinds = grouped(done.values(), lambda pair: _attacked(*pair))
    found = []
    for kind, pairs in sorted(kinds.items()):
        entries = [entry for _, entry in pairs]
        seconds = mean_known(entry.attack_seconds for entry in entries)
        pace = mean_known(1000 * entry.attack_seconds / entry.n for entry in entries)
        forwards, backwards = (mean_known(getattr(e, name) for e in entries) for name in ("forwards", "backwards"))
        found.append(Attack(*kind, len(entries), seconds, pace, forwards, backwards))
    return found


def _attacked(row: Row, entry: EvaluationResult) -> tuple[str, str, str, str, str, bool]:
    shared = (entry.attack_workers or 1) > 1
    return row.dataset, row.model, entry.device or "unknown", row.deploys, entry.attack_label, shared


def lines(found: Iterable[Training] | Iterable[Attack]) -> list[dict[str, object]]:
    """Lines of timing.csv or timing_attacks.csv: every field, in its order."""
    return [dict(vars(each)) for each in found]


def show(rows: list[Row], as_json: bool) -> str:
    """Both as text, a table for each data set, model and device, or as one JSON object."""
    trained, attacked = trainings(rows), attacks(rows)
    if as_json:
        return json_text({"trainings": lines(trained), "attacks": lines(attacked)})
    parts: list[str] = []
    for title, members in grouped(trained, _training_title).items():
        told = {k: v for k, v in _TRAINING.items() if k != "kJ" or not all(math.isnan(t.joules) for t in members)}
        parts += [title, "", *_table(told, members), ""]
    for title, those in grouped(attacked, lambda a: f"attacks on {a.dataset}, {a.model}, {a.device}").items():
        parts += [title, "", *_table(_ATTACK, those), ""]
    if any(t.shared for t in trained) or any(a.shared for a in attacked):
        parts += [f"{SHARED} the machine did other jobs meanwhile: compare such times with each other at most", ""]
    notes = (
        "work F: of a training step per image, in forward passes of the net; robust %/h: worst case over training hours"
    )
    return printed([*parts, notes]) if parts else NO_ROW


def _training_title(t: Training) -> str:
    return f"{t.dataset}, {t.model}, {counted(t.images, 'training image')}, {t.device}"


_TRAINING: dict[str, Callable[[Training], str]] = {
    "method": lambda t: t.method + (f" {SHARED}" if t.shared else ""),
    "train eps": lambda t: t.train_eps,
    "epochs": lambda t: f"{t.epochs}" + ("" if t.recipe == "shared" else f" {t.recipe}"),
    "seeds": lambda t: f"{t.seeds}" + (f", {t.collapsed} collapsed" if t.collapsed else ""),
    "train s": lambda t: decimals(t.seconds, 1),
    "s/epoch": lambda t: decimals(t.seconds_per_epoch, 2),
    "× standard": lambda t: decimals(t.ratio, 2),
    "work F": lambda t: decimals(t.work_f, 1),
    "infer ms": lambda t: decimals(t.inference_ms, 3) + ("" if t.predictor == "deterministic" else f", {t.predictor}"),
    "peak MB": lambda t: decimals(t.peak_memory_mb, 0),
    "kJ": lambda t: decimals(t.joules / 1000, 1),
    "robust %": lambda t: decimals(100 * t.robust, 1),
    "at": lambda t: t.budget or "–",
    "n": lambda t: str(t.n or "–"),
    "verdict": lambda t: t.verdict,
    "robust %/h": lambda t: decimals(t.per_hour, 0),
}
_ATTACK: dict[str, Callable[[Attack], str]] = {
    "attack": lambda a: (
        a.attack + (f" {SHARED}" if a.shared else "") + ("" if a.deploys == "deterministic" else f", {a.deploys} model")
    ),
    "models": lambda a: str(a.models),
    "s": lambda a: decimals(a.seconds, 1),
    "ms/image": lambda a: decimals(a.ms_per_image, 2),
    "forwards": lambda a: decimals(a.forwards, 1),
    "backwards": lambda a: decimals(a.backwards, 1),
}


def _table(columns: dict[str, Callable[[Any], str]], members: Iterable[Any]) -> list[str]:
    return aligned([[*columns], *([show(member) for show in columns.values()] for member in members)])
