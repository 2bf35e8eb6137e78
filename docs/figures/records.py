"""The finished trainings of a spec with their evaluations, read from the records, for pages in docs/."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.core.stats import wilson
from bench.planning import catalog
from bench.planning.job import EvaluateJob, Job, TrainJob
from bench.planning.plan import plan
from bench.planning.spec import load
from bench.records.packs import LOG
from bench.records.record import TrainMetrics, train_metrics
from bench.records.store import Store
from bench.results.significance import Difference, difference
from bench.results.worst_case import minima

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FINDINGS = DOCS / "findings"


class Training:
    """One finished training of a spec with its evaluations."""

    def __init__(self, store: Store, job: TrainJob, jobs: list[Job]) -> None:
        self.settings: dict[str, Any] = job.defense.settings
        self.name = job.label()
        self.defense, self.train = job.defense.name, job.training
        self.metrics = train_metrics(store.record(job.key))
        self.logged = self.metrics.defense_metrics or {}
        log = (store.read(job.key, LOG) or b"").decode()
        self.epochs = [json.loads(line) for line in log.splitlines()]
        self.hits: dict[tuple[str, str], tuple[int, int]] = {}
        self.keys: dict[tuple[str, str], str] = {}
        for other in jobs:
            # the pages do not show weights that were chosen by validation
            if not isinstance(other, EvaluateJob) or other.needs != (job.key,) or other.weights != "last":
                continue
            record = store.record(other.key)
            if record is not None and record.state == "done":
                kind = other.attack.settings["loss"] if other.attack.name == "pgd" else other.attack.name
                eps = other.threat.eps if other.threat else ""
                correct = store.samples(other.key)["correct"]
                self.hits[kind, eps] = int(correct.sum()), len(correct)
                self.keys[kind, eps] = other.key

    def share(self, kind: str, eps: str = "") -> tuple[float, float, float] | None:
        """Accuracy in percent and the ends of its 95 % Wilson interval, None where there is no record."""
        if (kind, eps) not in self.hits:
            return None
        hits, n = self.hits[kind, eps]
        low, high = wilson(hits, n)
        return 100 * hits / n, 100 * low, 100 * high

    def accuracy(self, kind: str, eps: str = "") -> float:
        found = self.share(kind, eps)
        return float("nan") if found is None else found[0]

    def worse(self, kind: str, eps: str = "") -> float:
        """Sort key that puts the best accuracy first, and what has no record last."""
        found = self.share(kind, eps)
        return 1.0 if found is None else -found[0]

    def cell(self, kind: str, eps: str = "") -> str:
        found = self.share(kind, eps)
        return "-" if found is None else "{:.1f} [{:.1f}, {:.1f}], n={}".format(*found, self.hits[kind, eps][1])

    @property
    def work(self) -> str:
        """Work of a step, and of the whole training in forward passes over the training images."""
        step = self.metrics.work_per_image_f
        return "-" if step is None else f"{step:.1f}"

    @property
    def total(self) -> float:
        return (self.metrics.work_per_image_f or math.nan) * float(self.train["epochs"])


def trainings(store: Store, spec: str) -> list[Training]:
    """The finished trainings of a spec on a data set that the project knows, in its order."""
    # of these data sets the planner needs the number of images only, which is built in
    jobs = plan(load(ROOT / "specs" / "earlier" / f"{spec}.yaml"), Path("no-data-needed"))
    planned = [job for job in jobs if isinstance(job, TrainJob)]
    stored = [store.job(key) for key in store.keys()]
    removed = [job for job in stored if isinstance(job, TrainJob) and _has_retired_settings(job, planned)]
    jobs += [job for job in stored if job.needs and job.needs[0] in {training.key for training in removed}]
    found = [Training(store, job, jobs) for job in (*planned, *removed)]
    return [training for training in found if training.metrics != TrainMetrics()]


def _has_retired_settings(job: TrainJob, planned: list[TrainJob]) -> bool:
    """Was it a training of the spec: equal to a planned one except for settings that its plug-in no longer has?"""
    if job in planned or _but_for_settings(job) not in [_but_for_settings(other) for other in planned]:
        return False
    try:
        plugin = catalog.get("defenses", job.defense.name)
        plugin.resolve(plugin.current(job.defense.settings))
    except (LookupError, ValueError):
        return True
    return False


def _but_for_settings(job: TrainJob) -> TrainJob:
    return replace(job, defense=replace(job.defense, settings={}))


def paired(store: Store, keys_a: Sequence[str], keys_b: Sequence[str], eps: float = 0.0) -> Difference:
    """Difference of the worst cases over these evaluations of one seed each, on the images that both share."""
    a, b = minima(store, [keys_a, keys_b], eps)
    found = difference({0: a.robust}, {0: b.robust})
    assert found is not None
    return found
