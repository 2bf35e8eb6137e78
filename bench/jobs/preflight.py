"""Checks before the first training: models, defenses and attacks that cannot work."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bench import plugins
from bench.core.attack import Evaluation
from bench.core.defense import Batch, Defense
from bench.core.rng import scope
from bench.data import datasets
from bench.models.common import Inputs
from bench.planning import catalog
from bench.planning.job import EvaluateJob, Job, TrainJob
from bench.planning.labels import label
from bench.plugins import line_of
from bench.training.first_step import check_first_step

TRIAL_SECONDS = 3.0  # no first step is tried later: with large networks some are left to their trainings
Trials = dict[str, tuple[TrainJob, nn.Module, Tensor, str]]  # a job of each defense, its net, an image, its name


def problems(jobs: list[Job], root: Path, note: Callable[[str], None] = lambda text: None) -> list[str]:
    """One line per problem that makes some of these jobs impossible. `root`: data folder; `note` is called with the
    name of each defense before it is built or takes its first step.

    Parts that jobs share are built once, on the CPU, and no image is loaded. Each defense takes one step at its first
    architecture, as long as TRIAL_SECONDS are not over. Random generators are not changed. Raises only what the data
    folder raises.
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
    trials: Trials = {}
    with scope(0), torch.no_grad():
        for trainings in architectures.values():
            found.update(dict.fromkeys(_of_trainings(list(trainings.values()), root, trials, note)))
        found.update(dict.fromkeys(line for job in attacks.values() for line in _of_attack(job)))
        found.update(dict.fromkeys(_of_first_steps(trials, note)))
    return list(found)


def _of_trainings(jobs: list[TrainJob], root: Path, trials: Trials, note: Callable[[str], None]) -> Iterator[str]:
    """Problems of trainings that share architecture and data. A defense without any is added to `trials`."""
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
        note(owner)
        try:
            defense: Defense = plugins.make("defenses", job.defense, job.threat)
            if net is not None:
                owner += f" with {where}"
                wrapped = defense.wrap(copy.deepcopy(net).train())
                defense.param_groups(wrapped)
                defense.check(wrapped.eval(), x, facts.classes)
                defense.deploy(wrapped)
                trials.setdefault(repr(job.defense), (job, net, x, owner))
        except Exception as error:
            yield f"{owner}: {_line(error, name)}"


def _of_first_steps(trials: Trials, note: Callable[[str], None]) -> Iterator[str]:
    """Problems of one training step on two random images. Defenses whose files were changed last come first."""
    began = time.monotonic()
    changed = {
        name: catalog.get("defenses", job.defense.name).path.stat().st_mtime for name, (job, *_) in trials.items()
    }
    for name in sorted(trials, key=changed.__getitem__, reverse=True):
        job, net, x, owner = trials[name]

        def build(job: TrainJob = job, net: nn.Module = net) -> tuple[Defense, nn.Module]:
            defense: Defense = plugins.make("defenses", job.defense, job.threat)
            return defense, defense.wrap(copy.deepcopy(net).train()).train()

        batch = Batch(torch.rand(2, *x.shape[1:]), torch.arange(2), torch.arange(2), epoch=0, progress=0.0)
        try:
            if time.monotonic() - began < TRIAL_SECONDS:
                note(f"first step of {owner}")
                check_first_step(build, batch)
        except Exception as error:
            yield f"{owner}: {_line(error, job.defense.name)}"


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
    place = line_of(error)
    return text if isinstance(error, ValueError) else f"{place}{place and ': '}{type(error).__name__}: {text}"
