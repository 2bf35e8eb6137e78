"""Stored adversarial images of one evaluation judged once more: the expensive half of `bench verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench import plugins
from bench.data.images import Data, judged_by_validation
from bench.data.images import load as load_data
from bench.jobs import user_model as loading
from bench.jobs.recheck import again
from bench.jobs.worker import load_model
from bench.planning.job import Job
from bench.records.store import Store
from bench.training.train import build


def rescore(store: Store, key: str, root: Path) -> tuple[bool, str]:
    """Is anything other than stored, and what; where it cannot be asked (no such data or code here), why."""
    job = store.job(key)
    trained = store.job(job.needs[0])
    n = job.what["n"]
    try:
        if job.what.get("split") == "validation":
            data = judged_by_validation(_data(trained.what, None, root), n)
        else:
            data = _data(trained.what, n, root)
    except (ValueError, LookupError, OSError) as error:
        return False, f"not judged again: {error}"
    if data.test_hash != (store.record(key) or {"metrics": {}})["metrics"].get("test_hash"):
        return False, "not judged again: the data folder holds other test images"
    try:
        _loaded(job, trained, data)
    except (ValueError, LookupError, ImportError) as error:
        return False, f"not judged again: {error}"
    try:
        found = again(store, key, n, load_model(store, trained, data, job.what["weights"]), data)
    except (ValueError, LookupError, OSError, RuntimeError) as error:
        return True, f"cannot be judged again: {error}"
    return found.level not in ("ok", "n/a"), found.note


def _loaded(job: Job, trained: Job, data: Data) -> None:
    """Attack, defense and net from their files, before any stored byte is read: what fails here is no change of it."""
    attack = job.what["attack"]
    plugins.make("attacks", attack["name"], attack["set"], job.what["threat"])
    if trained.kind == "import":
        loading.build(trained.what, data.facts)
    else:
        build(trained.what, data)


def _data(what: dict[str, Any], test: int | None, root: Path) -> Data:
    """The images that a training saw, on the CPU, with so many test images."""
    data, cpu = what["data"], torch.device("cpu")
    sizes = {"size": data["size"], "train": data["train"], "test": test, "validation": data["validation"]}
    return load_data(data["name"], root=root, device=cpu, seed=what["seed"], report=lambda note: None, **sizes)
