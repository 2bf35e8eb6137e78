"""Checks before the first training: models, defenses and attacks that cannot work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import ValidationError

from bench import plugins
from bench.core.attack import Evaluation
from bench.core.defense import Defense
from bench.core.rng import scope
from bench.data import datasets
from bench.models.common import Inputs
from bench.planning import catalog
from bench.planning.job import EvaluateJob, Job, TrainJob
from bench.planning.labels import label


def problems(jobs: list[Job], root: Path) -> list[str]:
    """One line per problem that makes some of these jobs impossible. `root`: data folder.

    Parts that jobs share are built once, on the CPU, and no image is loaded. Random generators are not changed. Raises
    only what the data folder raises.
    """
    architectures: dict[str, dict[str, TrainJob]] = {}
    attacks: dict[str, EvaluateJob] = {}
    for job in jobs:
        if isinstance(job, TrainJob):
            place = repr((job.model, job.data.name, job.data.size))
            architectures.setdefault(place, {})[repr((job.defense, job.threat))] = job
        elif isinstance(job, EvaluateJob):
            attacks[repr((job.attack, job.threat))] = job
    found: dict[str, None] = {}  # a problem of a defense with every architecture is listed once
    with scope(0), torch.no_grad():
        for trainings in architectures.values():
            found.update(dict.fromkeys(_of_trainings(list(trainings.values()), root)))
        found.update(dict.fromkeys(line for job in attacks.values() for line in _of_attack(job)))
    return list(found)


def _of_trainings(jobs: list[TrainJob], root: Path) -> Iterator[str]:
    """Problems of trainings that share architecture and data."""
    data, model = jobs[0].data, jobs[0].model
    facts = datasets.facts(data.name, root, data.size)
    inputs = Inputs(facts.channels, facts.size, facts.classes, facts.mean, facts.std)
    x = torch.zeros(1, facts.channels, facts.size, facts.size)
    where = f"{label('models', model.name, model.settings)} on {facts.name}"
    net = None
    try:
        net = plugins.build_model(model.name, model.settings, inputs)
        shape = tuple(net.eval()(x).shape)
        if shape != (1, facts.classes):
            raise ValueError(f"gives logits of shape {shape} for one image; expected {(1, facts.classes)}")
    except Exception as error:
        yield f"model {where}: {_line(error, model.name)}"
    for job in jobs:
        name = job.defense.name
        owner = f"defense {label('defenses', name, job.defense.settings)}"
        try:
            defense: Defense = plugins.make("defenses", job.defense, job.threat)
            if net is not None:
                owner += f" with {where}"
                wrapped = defense.wrap(copy.deepcopy(net).train())
                defense.param_groups(wrapped)
                defense.check(wrapped.eval(), x, facts.classes)
                defense.deploy(wrapped)
        except Exception as error:
            yield f"{owner}: {_line(error, name)}"


def _of_attack(job: EvaluateJob) -> Iterator[str]:
    """Problems of an evaluation. An attack that does not apply to a model is not one: the table shows the reason."""
    name = job.attack.name
    try:
        judge: Evaluation = plugins.make("attacks", job.attack, job.threat)
        norm = job.threat.norm if job.threat else None
        if norm and norm not in judge.norms:  # a setting, such as the method of a package, may narrow its norms
            raise ValueError(f"no {norm} version; norms: {', '.join(judge.norms)}")
    except Exception as error:
        yield f"attack {job.label()}: {_line(error, name)}"


def _line(error: Exception, name: str) -> str:
    """Message of an error in one line, without the plug-in's name and without pydantic's additions."""
    while isinstance(error, ValidationError):
        inner = error.errors()[0].get("ctx", {}).get("error")
        if not isinstance(inner, Exception):
            return catalog.describe(error, name)
        error = inner
    text = " ".join(str(error).split()).removeprefix(f"{name}: ")
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
