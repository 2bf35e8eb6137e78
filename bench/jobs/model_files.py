"""The images and the model of a job: loaded from the data folder and the results folder; weights written to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from bench.atomic import write_hashed
from bench.core.classifier import Classifier
from bench.data import datasets
from bench.data.images import Data, with_validation_as_test
from bench.data.images import load as load_data
from bench.jobs import user_model
from bench.planning.job import AuditJob, EvaluationJob, ImportJob, ModelJob
from bench.planning.user_models import CLEAN_N, ORIGIN, SOURCE
from bench.records.record import Record, TrainRecord, weights_file
from bench.records.store import IMAGES, Store
from bench.training.train import build

Report = Callable[[dict[str, Any]], None]


def load_images(job: ModelJob, test: int | None, root: Path, device: torch.device, report: Report) -> Data:
    """The data set of a training on a device, with `test` test images (None: all).

    Raises ValueError if the images of a folder are not those that the job was planned for.
    """
    data = job.data
    loaded = load_data(
        data.name,
        root=root,
        device=device,
        size=data.size,
        train=data.train,
        test=test,
        validation=data.validation,
        seed=job.seed,
        report=lambda note: report({"share": 0.0, "note": note}),
    )
    if data.content not in (None, loaded.facts.content):
        raise ValueError(
            f"the images of {data.name} have content {loaded.facts.content}, this job was planned for "
            f"{data.content}; put those back, or give the command again, which makes new jobs"
        )
    return loaded


def evaluation_images(
    job: EvaluationJob | AuditJob, trained: ModelJob, root: Path, device: torch.device, report: Report
) -> Data:
    """The data set of a training with the first `job.n` images of the job's split as its test images."""
    if job.split == "validation":
        return with_validation_as_test(load_images(trained, None, root, device, report), job.n)
    return load_images(trained, job.n, root, device, report)


def load_model(store: Store, trained: ModelJob, data: Data, which: str = "last") -> Classifier:
    """The deployed model of a finished training with its `last` or `best` weights, checked against its record.

    Raises ValueError if the weights are missing (records may come from git without them) or damaged.
    """
    record = store.record(trained.key)
    if record is None or record.state != "done":
        raise ValueError(f"training {trained.key} has no finished record")
    state = stored_tensors(store, trained.key, weights_file(which))
    if isinstance(trained, ImportJob):
        return user_model.reloaded(trained, state, data)
    defense, net = build(trained, data, trained=True)
    net.load_state_dict(state, strict=True)
    return defense.deploy(net.eval())


def stored_tensors(store: Store, key: str, name: str) -> dict[str, Tensor]:
    """The weights or images of a job. Raises ValueError if they are absent or not what the record names."""
    if not store.matches(key, name, store.record(key)):
        raise ValueError(f"{name} of {key} is absent or damaged; `bench run` makes it again if a job needs it")
    try:
        return load_file(store.folder(key) / name)
    except SafetensorError as problem:
        raise ValueError(f"{name} of {key} holds no tensors: {problem}") from None


def stored_images(store: Store, key: str) -> Tensor:
    """The adversarial images of an evaluation. Raises what `stored_tensors` raises."""
    tensors = stored_tensors(store, key, IMAGES)
    if "x_adv" not in tensors:
        raise ValueError(f"{IMAGES} of {key} holds no images")
    return tensors["x_adv"]


def import_model(folder: Path, job: ImportJob, root: Path, device: torch.device, report: Report) -> Record:
    """Load a user's model strictly and store its weights like those of a training."""
    available = datasets.facts(job.data.name, root, job.data.size).test
    data = load_images(job, min(CLEAN_N, available), root, device, report)
    net, metrics = user_model.measure(job, data, folder / SOURCE if job.checkpoint else None)
    if (folder / ORIGIN).is_file():
        metrics = replace(metrics, origin=(folder / ORIGIN).read_text(encoding="utf-8"))
    # tied weights share memory, which the format refuses
    state = {name: value.clone() for name, value in net.state_dict().items()}
    return TrainRecord("done", metrics, files=save_weights(folder, "last", state))


def save_weights(folder: Path, which: str, state: dict[str, Tensor]) -> dict[str, str]:
    """Write the `last` or the `best` weights. Returns name and SHA-256 of the file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    name = weights_file(which)
    return {name: write_hashed(folder / name, safetensors_bytes(tensors))}
