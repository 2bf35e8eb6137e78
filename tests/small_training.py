"""Trainings of a small net on a few digits: their jobs, data, runs and logs."""

import json
from pathlib import Path
from typing import Any

import torch

from bench.data.images import Data, load
from bench.planning.job import Job, TrainJob
from bench.planning.plan import plan
from bench.planning.spec import build
from bench.training.resume import Checkpointer
from bench.training.train import Trained, train

ROOT = Path("no-data-here")
WIDTHS = {"mlp": {"width": 24}, "preact_resnet18": {"width": 4}}
SGD = {"optimizer": "sgd", "lr": 0.05, "batch_size": 16, "epochs": 2, "weight_decay": 1e-3, "schedule": "cosine"}


def jobs_of(
    defense: Any = "standard",
    attack: str = "clean",
    *,
    model: str = "mlp",
    norm: str = "Linf",
    train: int = 96,
    validation: int = 0,
    **recipe: Any,
) -> list[Job]:
    """The jobs of one defense and one attack; `train` includes the validation images."""
    values = {
        "data": {"name": "digits", "test": 16, "train": train, "validation": validation},
        "models": [{"name": model, "set": WIDTHS.get(model, {})}],
        "threat": {"norm": norm, "eps": 0.1},
        "train": {**SGD, **recipe},
        "defenses": [defense],
        "attacks": [attack],
    }
    return plan(build(values), ROOT)


def training_job(*args: Any, **settings: Any) -> TrainJob:
    """The training among `jobs_of`."""
    job = jobs_of(*args, **settings)[0]
    assert isinstance(job, TrainJob)
    return job


def data_of(job: TrainJob) -> Data:
    n = job.data.train
    return load("digits", root=ROOT, device=torch.device("cpu"), train=n, test=16, validation=job.data.validation)


def run(job: TrainJob, data: Data, folder: Path, checkpointer: Checkpointer | None = None) -> Trained:
    return train(job, data, folder / "train.jsonl", lambda values: None, checkpointer)


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of train.jsonl, without times."""
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
