"""A training job: from initial weights, over all epochs, to the deployed model and the metrics of its record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import plugins
from bench.atomic import appending
from bench.core.classifier import Classifier
from bench.core.defense import Defense
from bench.core.rng import scope, seed
from bench.data.images import Data, to_channels_last, to_float
from bench.models.common import Inputs
from bench.planning.job import TrainJob
from bench.records.training_log import TOTAL
from bench.training import sigterm
from bench.training.best_epoch import content_hash
from bench.training.cost import inference_ms, synchronize
from bench.training.divergence import Diverged
from bench.training.loop import Loop
from bench.training.resume import Checkpointer, Clock

Report = Callable[[dict[str, Any]], None]


class Trained(NamedTuple):
    """Result of a training: the deployed model with the last weights (their average if the recipe averages), the
    network state of the epoch with the best validation accuracy (None if the recipe selects none), and the metrics."""

    model: Classifier
    best: dict[str, Tensor] | None
    metrics: dict[str, Any]


def build(job: TrainJob, data: Data) -> tuple[Defense, nn.Module]:
    """Defense and wrapped, untrained network of a training job, on the data's device.

    The initial weights depend on seed and architecture only, not on the defense, so that runs are paired.
    """
    defense: Defense = plugins.make_chosen("defenses", job.defense, job.threat)
    facts = data.facts
    inputs = Inputs(facts.channels, facts.size, facts.classes, facts.mean, facts.std)
    with scope(seed(job.seed, "init", job.model.name)):
        net = plugins.build_model(job.model.name, job.model.settings, inputs)
        net = defense.wrap(net)
    net = net.to(data.train.x.device)
    if any(isinstance(m, nn.Conv2d) for m in net.modules()):
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return defense, net


class TrainingRun:
    """A training with its checkpoints: completed epochs, their lines of train.jsonl, and the seconds of work.

    With a checkpointer it resumes from the last checkpoint, and writes one at intervals and before it exits on SIGTERM
    (see bench.training.sigterm).
    """

    def __init__(self, loop: Loop, log: Path, checkpointer: Checkpointer | None) -> None:
        self.loop, self.log, self.checkpointer, self.clock = loop, log, checkpointer, Clock()
        self.lines: list[str] = []
        self.seconds: list[float] = []
        self.terms: dict[str, float] = {}
        self.defense_metrics: dict[str, float] = {}
        self.resumed, self.checkpoint_seconds = 0, 0.0
        self._epoch_began: float | None = None  # by the clock; None between two epochs
        self._steps_done = False  # all steps of the epoch are made, and its checks are not
        state = checkpointer.read(loop.data.train.x.device) if checkpointer is not None else None
        if state is not None:
            self._restore(state)
        log.write_text("".join(self.lines), encoding="utf-8")  # drops lines younger than the checkpoint
        loop.on_step = self.checkpoint

    def epoch(self, epoch: int) -> None:
        """One epoch, or the rest of it: steps, checks, a line of train.jsonl. Raises Diverged or Collapsed."""
        loop, clock = self.loop, self.clock
        if not self._steps_done:
            self._epoch_began = clock.now() if self._epoch_began is None else self._epoch_began
            self.terms = loop.epoch(epoch)
            ended = clock.now()
            self.seconds.append(ended - self._epoch_began)
            self._epoch_began, self._steps_done = None, True
            metrics = loop.defense.metrics(loop.net)
            self.defense_metrics = {name: float(value.detach()) for name, value in metrics.items()}
            loop.check_seconds += clock.now() - ended
        found, problem = self._check(epoch)
        self._steps_done = False
        line = {"epoch": epoch + 1, "seconds": round(self.seconds[-1], 4)}
        line |= {**self.terms, **self.defense_metrics, **found, TOTAL: sum(self.terms.values())}
        self.lines.append(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
        with appending(self.log) as lines:
            lines.write(self.lines[-1])
        if problem is not None:
            raise problem
        self.checkpoint()

    def _check(self, epoch: int) -> tuple[dict[str, float], Diverged | None]:
        """The checks at the end of an epoch. If SIGTERM interrupts a validation, it is repeated after resuming."""
        before = self.loop.watch.state_dict()
        try:
            return self.loop.check(epoch, self.terms)
        except SystemExit:
            self.loop.watch.load_state_dict(before)
            self._save_and_tell()
            raise

    def deploy(self) -> Classifier:
        """The deployed model. If SIGTERM interrupts it, it is repeated after resuming: averaged weights and their
        statistics, which the net may hold by then, are installed once more."""
        try:
            return self.loop.deploy()
        except SystemExit:
            self._save_and_tell()
            raise

    def checkpoint(self) -> None:
        """Write a checkpoint if one is due; after SIGTERM write one and exit. Its time does not count as work."""
        if sigterm.asked():
            self._save_and_tell()
            sigterm.point()
        if self.checkpointer is not None and self.checkpointer.due(epoch_over=self._epoch_began is None):
            self._save()

    def _save_and_tell(self) -> None:
        if sigterm.asked():
            self._save()
            print(f"stopped {self._progress()}", flush=True)

    def _save(self) -> None:
        if self.checkpointer is None:
            return
        synchronize(self.loop.data.train.x.device)
        now = self.clock.now()
        own = {name: getattr(self, name) for name in _SAVED}
        self.checkpoint_seconds += self.checkpointer.write({"loop": self.loop.state_dict(), "now": now, **own})
        self.clock.set(now)

    def _progress(self) -> str:
        """Steps and epochs that are done, in words."""
        steps = (len(self.lines) + self._steps_done) * self.loop.steps_per_epoch + self.loop.place
        return f"after {steps} steps, {len(self.lines)} epochs over"

    def _restore(self, state: dict[str, Any]) -> None:
        for name in _SAVED:
            setattr(self, name, state[name])
        self.resumed += 1
        self.loop.load_state_dict(state["loop"])
        self.clock.set(state["now"])
        print(f"resumes {self._progress()}", flush=True)

    def metrics(self) -> dict[str, Any]:
        """Metrics of the training for its record; the job adds what it measures on the deployed model."""
        loop, epochs = self.loop, self.loop.settings["epochs"]
        found = {
            "train_seconds": self.clock.now() - loop.check_seconds,
            "check_seconds": loop.check_seconds,
            "keep_seconds": self.checkpoint_seconds,
            "resumed": self.resumed,
            "seconds_per_epoch": sum(self.seconds) / epochs,
            "epochs": epochs,
            "steps": loop.updater.steps,
            "active_steps": loop.active(),
            "final_terms": self.terms,
            "defense": {name: value for name, value in self.defense_metrics.items() if math.isfinite(value)},
            "parameters": sum(p.numel() for p in loop.net.parameters()),
            "deploys": loop.defense.predictor,
            **loop.cost,
        }
        if loop.choice.state:
            found |= {**loop.choice.metrics(), "validation_hash": content_hash(loop.data.validation)}
        return found


_SAVED = (
    *("lines", "seconds", "terms", "defense_metrics", "resumed", "checkpoint_seconds"),
    *("_epoch_began", "_steps_done"),
)


def train(job: TrainJob, data: Data, log: Path, report: Report, checkpointer: Checkpointer | None = None) -> Trained:
    """Train from scratch, or resume from the last checkpoint: the weights are the same bit for bit.

    Each epoch writes one line of train.jsonl: the terms of the loss (mean over its steps) and their sum, metrics of the
    defense, seconds, and validation accuracy where it is measured. `train_seconds` is the work of all attempts, without
    work lost by a kill, without checks, validation and the defense's metrics (`check_seconds`), and without checkpoints
    (`keep_seconds`). Raises Diverged if the loss or the weights of an epoch are not finite, Collapsed if the accuracy
    falls to chance.
    """
    loop = Loop(*build(job, data), job, data, report)
    epochs = loop.settings["epochs"]
    with scope(seed(job.seed, "inner")):
        run = TrainingRun(loop, log, checkpointer)
        if run.resumed:
            done = len(run.lines)
            share = (done + loop.place / loop.steps_per_epoch) / epochs
            report({"epoch": min(done + 1, epochs), "epochs": epochs, "earlier": run.clock.now(), "share": share})
        sigterm.defer()
        for epoch in range(len(run.lines), epochs):
            run.epoch(epoch)
            share, loss = (epoch + 1) / epochs, sum(run.terms.values())
            report({"epoch": epoch + 1, "epochs": epochs, "share": share, "loss": loss})
    model = run.deploy()
    metrics = run.metrics()
    metrics["inference_ms_per_image"] = inference_ms(model, to_channels_last(to_float(data.test.x[:64])))
    return Trained(model, loop.choice.state or None, metrics)
