"""What evaluations have in common, computed once: the columns of their training and the labels of plug-ins."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from typing import Any

from bench.core.epsilon import Epsilon
from bench.planning import catalog
from bench.planning.job import ModelJob
from bench.planning.job_fields import DataChoice
from bench.planning.labels import label
from bench.records.record import PeakMemory, Provenance, Record, evaluation_metrics, train_metrics
from bench.records.store import Store

BY_VALIDATION = "epoch by validation]"  # ends the name of a row whose weights were chosen


class DatasetNames:
    """Names of the data sets of a results folder, in which no two image folders share a table.

    `folder:NAME`, with the image size or the first digits of the content hash where those of that name differ in it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @functools.cached_property
    def _choices(self) -> list[DataChoice]:
        return [job.data for job in self._store.jobs().values() if isinstance(job, ModelJob)]

    def name(self, data: DataChoice) -> str:
        """The name of this data set in tables and figures."""
        if not data.name.startswith("folder:"):
            return data.name
        alike = [choice for choice in self._choices if choice.name == data.name]
        sizes, contents = ({getattr(choice, what) for choice in alike} for what in ("size", "content"))
        size = f" {data.size} px" if len(sizes) > 1 else ""
        return data.name + size + (f" {(data.content or 'unknown')[:8]}" if len(contents) > 1 else "")


class TrainingFacts:
    """Cached columns of trainings and labels of plug-ins."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.of_training = functools.cache(self._of_training)
        self._labels: dict[str, str] = {}
        self._dataset_name = functools.cache(DatasetNames(store).name)
        self.value = functools.cache(lambda eps: float(Epsilon(eps)))
        self._constant = functools.cache(_constant)

    def label(self, kind: str, name: str, settings: dict[str, Any]) -> str:
        """The name of a plug-in with the settings that differ from its defaults; `budgets` have a column."""
        settings_key = repr((kind, name, settings))
        found = self._labels.get(settings_key)
        if found is None:
            shown = {k: v for k, v in settings.items() if k != "budgets"}
            found = self._labels[settings_key] = label(kind, name, shown)  # type: ignore[arg-type]
        return found

    def measures(self, attack: str, record: Record | None) -> str | None:
        """What an evaluation measures instead of robustness; read from the record if there is one."""
        if record and record.state == "done":
            return evaluation_metrics(record).metric
        return self._constant("attacks", attack, "metric", "") or None

    def proves(self, attack: str) -> bool:
        """Is the accuracy of this evaluation a lower bound of robust accuracy?"""
        return bool(self._constant("attacks", attack, "proves", False))

    def _of_training(self, key: str, *weights: str) -> dict[str, Any]:
        """Columns that every evaluation of these weights has. `weights`: last, best, ..., and the split if not test.

        Raises LookupError or ValueError where the job of the training cannot be read.
        """
        job, record = self.store.model_job(key), self.store.record(key)
        metrics, origin = train_metrics(record), record.provenance if record else Provenance()
        memory = record.peak_memory_mb if record else PeakMemory()
        config = json.dumps([job.without_seed(), *weights], sort_keys=True)
        # the plug-in's declaration holds for a model that is not trained yet
        deploys = metrics.predictor or self._constant("defenses", job.defense.name, "predictor", "deterministic")
        return {
            "train_key": key,
            "config": hashlib.sha256(config.encode()).hexdigest()[:12],
            "dataset": self._dataset_name(job.data),
            "model": self.label("models", job.model.name, job.model.settings),
            "defense": job.defense.name,
            "defense_label": self.label("defenses", job.defense.name, job.defense.settings)
            + ("" if weights[0] == "last" else f" [{weights[0]} {BY_VALIDATION}"),
            "train_norm": job.threat.norm if job.threat else None,
            "train_eps": job.threat.eps if job.threat else None,
            "train_images": job.data.train,
            "seed": job.seed,
            "recipe": job.recipe,
            "epochs": job.epochs,
            "deploys": deploys,
            "train_state": record.state if record else "missing",
            "train_device": origin.device,
            "workers": origin.workers,
            "train_seconds": float_or_nan(metrics.train_seconds),
            "seconds_per_epoch": float_or_nan(metrics.seconds_per_epoch),
            "work_per_image_f": float_or_nan(metrics.work_per_image_f),
            "inference_ms": float_or_nan(metrics.inference_ms_per_image),
            "peak_memory_mb": float_or_nan(memory.cuda or memory.rss),
            "train_joules": float_or_nan(record.energy_joules if record else None),
        }


def float_or_nan(value: float | None) -> float:
    """A stored number as a float; NaN where none was stored."""
    return math.nan if value is None else float(value)


def _constant(kind: str, name: str, constant: str, default: Any) -> Any:
    """A class constant of a plug-in; the default where the plug-in is gone."""
    plugin = catalog.find(kind, name)  # type: ignore[arg-type]
    return plugin.constant(constant, default) if plugin else default


def draws_of(attack: str, settings: dict[str, Any]) -> int:
    """The most draws of a model's noise that a step of this attack averages over; 0 where it has no such setting."""
    # the attack `eot` tries a list of them, others have a setting of that name
    return max(settings.get("draws") or [0]) if attack == "eot" else int(settings.get("eot") or 0)
