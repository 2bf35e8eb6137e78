"""What trainings and attacks cost, and when two training times may be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from bench.results.evaluations import Evaluation


def time_class(entry: Evaluation) -> tuple[Any, ...]:
    """Training times are compared within one of these only; papers' own recipes differ in epochs by intent."""
    epochs = entry.epochs if entry.recipe == "shared" else None
    return (
        *(getattr(entry, name) for name in ("dataset", "train_images", "model", "train_device", "recipe")),
        epochs,
        busy(entry),
    )


def busy(entry: Evaluation) -> bool:
    """Did the machine do other jobs during the training?"""
    return isinstance(entry.workers, int) and entry.workers > 1


def standard_times(entries: list[Evaluation]) -> dict[tuple[Any, ...], float]:
    """Mean training seconds of `standard` in each class."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for e in entries:
        if e.defense == "standard" and not math.isnan(e.train_seconds):
            times.setdefault(time_class(e), {})[e.train_key] = e.train_seconds
    return {kind: fmean(seconds.values()) for kind, seconds in times.items()}


def of_trainings(entries: list[Evaluation], value: Callable[[Evaluation], float]) -> float:
    """Mean over the trainings that know it; NaN without any."""
    known = {e.train_key: v for e in entries if not math.isnan(v := value(e))}
    return fmean(known.values()) if known else math.nan


def over_standard(entries: list[Evaluation], times: Mapping[tuple[Any, ...], float]) -> float:
    """Mean over the trainings of their seconds over those of `standard` in the same class; NaN where it has none."""
    return of_trainings(entries, lambda e: e.train_seconds / times.get(time_class(e), math.nan))


def attack_seconds(picked: Mapping[str, dict[int, Evaluation]]) -> float:
    """Seconds of all evaluations of a seed together, mean over seeds; NaN where none was timed."""
    spent: dict[int, dict[str, float]] = {}
    for by in picked.values():
        for seed, e in by.items():
            if e.state == "done" and not math.isnan(e.attack_seconds):
                spent.setdefault(seed, {})[e.key] = e.attack_seconds
    return fmean(sum(by.values()) for by in spent.values()) if spent else math.nan
