"""Stored adversarial images of one evaluation judged once more: the expensive half of `bench verify`."""

from __future__ import annotations

from pathlib import Path

import torch

from bench import plugins
from bench.data.images import Data, with_validation_as_test
from bench.data.images import load as load_data
from bench.jobs import user_model as loading
from bench.jobs.recheck import again
from bench.jobs.worker import load_model
from bench.planning.job import EvaluationJob, ImportJob, ModelJob
from bench.records.record import evaluation_metrics
from bench.records.store import Store
from bench.training.train import build


def rescore(store: Store, key: str, root: Path) -> tuple[bool, str]:
    """Is anything other than stored, and what; where it cannot be asked (no such data or code here), why."""
    job = store.evaluation(key)
    trained = store.model_job(job.model_key)
    n = job.n
    try:
        if job.split == "validation":
            data = with_validation_as_test(_data(trained, None, root), n)
        else:
            data = _data(trained, n, root)
    except (ValueError, LookupError, OSError) as error:
        return False, f"not judged again: {error}"
    if data.test_hash != evaluation_metrics(store.record(key)).test_hash:
        return False, "not judged again: the data folder holds other test images"
    try:
        _loaded(job, trained, data)
    except (ValueError, LookupError, ImportError) as error:
        return False, f"not judged again: {error}"
    try:
        found = again(store, key, n, load_model(store, trained, data, job.weights), data)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        return True, f"cannot be judged again: {error}"
    return found.level not in ("ok", "n/a"), found.note


def _loaded(job: EvaluationJob, trained: ModelJob, data: Data) -> None:
    """Attack, defense and net from their files, before any stored byte is read: what fails here is no change of it."""
    plugins.make("attacks", job.attack, job.threat)
    if isinstance(trained, ImportJob):
        loading.build(trained, data.facts)
    else:
        build(trained, data)


def _data(job: ModelJob, test: int | None, root: Path) -> Data:
    """The images that a training saw, on the CPU, with so many test images."""
    data, cpu = job.data, torch.device("cpu")
    return load_data(
        data.name,
        root=root,
        device=cpu,
        size=data.size,
        train=data.train,
        test=test,
        validation=data.validation,
        seed=job.seed,
        report=lambda note: None,
    )
