"""What trainings and attacks cost, and when two training times may be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from bench.results.evaluations import EvaluationResult
from bench.results.grouping import grouped
from bench.results.worst_case import ByAttack


@dataclass(frozen=True)
class Cost:
    """What a row cost, mean over its seeds; NaN where unknown.

    - `train_seconds`, `peak_memory_mb`: of the training; `train_work`: its steps in forward passes over the training
      images.
    - `attack_seconds`: of all evaluations of a seed together.
    - `ratio`: training time over that of `standard` on the same device, recipe and use of the machine.
    - `shared`: the machine did other jobs during some of the trainings.
    """

    train_seconds: float = math.nan
    train_work: float = math.nan
    attack_seconds: float = math.nan
    peak_memory_mb: float = math.nan
    ratio: float = math.nan
    shared: bool = False


def time_class(entry: EvaluationResult) -> tuple[Any, ...]:
    """Training times are compared within one of these only; papers' own recipes differ in epochs by intent."""
    data = entry.dataset, entry.train_images
    epochs = entry.epochs if entry.recipe == "shared" else None
    return *data, entry.model, entry.train_device, entry.recipe, epochs, busy(entry)


def busy(entry: EvaluationResult) -> bool:
    """Did the machine do other jobs during the training?"""
    return isinstance(entry.workers, int) and entry.workers > 1


def standard_times(entries: list[EvaluationResult]) -> dict[tuple[Any, ...], float]:
    """Mean training seconds of `standard` in each class."""
    trainings = {e.train_key: e for e in entries if e.defense == "standard" and not math.isnan(e.train_seconds)}
    classes = grouped(trainings.values(), time_class)
    return {kind: fmean(e.train_seconds for e in members) for kind, members in classes.items()}


def cost_of(entries: list[EvaluationResult], picked: ByAttack, times: dict[tuple[Any, ...], float]) -> Cost:
    """The cost of a row.

    Args:
        entries: All its evaluations, which know their trainings.
        picked: Those that count, for the seconds of attacks.
        times: As from `standard_times`.
    """
    trainings = {e.train_key: e for e in entries}.values()

    def mean(value: Callable[[EvaluationResult], float]) -> float:
        return mean_known(value(e) for e in trainings)

    return Cost(
        train_seconds=mean(lambda e: e.train_seconds),
        train_work=mean(lambda e: e.work_per_image_f * e.epochs),
        attack_seconds=_attack_seconds(picked),
        peak_memory_mb=mean(lambda e: e.peak_memory_mb),
        ratio=mean(lambda e: e.train_seconds / times.get(time_class(e), math.nan)),
        shared=any(busy(e) for e in entries),
    )


def mean_known(values: Iterable[float]) -> float:
    """Mean of those that are known; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def _attack_seconds(picked: ByAttack) -> float:
    """Seconds of all evaluations of a seed together, mean over seeds; NaN where none was timed."""
    spent: dict[int, dict[str, float]] = {}
    for by in picked.values():
        for seed, e in by.items():
            if e.state == "done" and not math.isnan(e.attack_seconds):
                spent.setdefault(seed, {})[e.key] = e.attack_seconds
    return mean_known(sum(by_key.values()) for by_key in spent.values())
