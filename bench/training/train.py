"""A training job from the first weights to the deployed model and the metrics of its record."""

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
from bench.training import sigterm as stopping
from bench.training.best_epoch import content_hash
from bench.training.cost import inference_ms, synchronise
from bench.training.divergence import Diverged
from bench.training.loop import Loop
from bench.training.resume import Checkpointer, Clock

Report = Callable[[dict[str, Any]], None]


class Trained(NamedTuple):
    """The deployed model with the last weights (averaged ones where the recipe averages), the state of the net that
    validation chose (None where it chooses none), and the metrics of the run."""

    model: Classifier
    best: dict[str, Tensor] | None
    metrics: dict[str, Any]


def build(job: TrainJob, data: Data) -> tuple[Defense, nn.Module]:
    """Defense and wrapped, untrained net of a training job, on the data's device.

    The initial weights depend on the seed and the architecture only, never on the defense, so runs are paired.
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
    """How far a training is: epochs that are over with their lines of train.jsonl, and the seconds of work.

    With `kept` it goes on where an earlier attempt was kept, and is kept itself from time to time, and before it leaves
    where it is asked to (see bench.training.sigterm).
    """

    def __init__(self, loop: Loop, log: Path, kept: Checkpointer | None) -> None:
        self.loop, self.log, self.kept, self.clock = loop, log, kept, Clock()
        self.lines: list[str] = []
        self.seconds: list[float] = []
        self.terms: dict[str, float] = {}
        self.own: dict[str, float] = {}
        self.resumed, self.keeping = 0, 0.0
        self._began: float | None = None  # of the epoch under way, by the clock
        self._looking = False  # are all steps of the epoch made, and is its end looked at?
        state = kept.read(loop.data.train.x.device) if kept is not None else None
        if state is not None:
            self._restore(state)
        log.write_text("".join(self.lines), encoding="utf-8")  # a line that was not kept will be written once more
        loop.on_step = self.keep

    def epoch(self, epoch: int) -> None:
        """One epoch, or the rest of it, with all that is looked at after it. Raises Diverged or Collapsed."""
        loop, clock = self.loop, self.clock
        if not self._looking:
            self._began = clock.now() if self._began is None else self._began
            self.terms = loop.epoch(epoch)
            looking = clock.now()
            self.seconds.append(looking - self._began)
            self._began, self._looking = None, True
            self.own = {name: float(value.detach()) for name, value in loop.defense.metrics(loop.net).items()}
            loop.check_seconds += clock.now() - looking
        found, problem = self._look(epoch)
        self._looking = False
        line = {"epoch": epoch + 1, "seconds": round(self.seconds[-1], 4), **self.terms, **self.own, **found}
        line[TOTAL] = sum(self.terms.values())
        self.lines.append(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
        with appending(self.log) as lines:
            lines.write(self.lines[-1])
        if problem is not None:
            raise problem
        self.keep()

    def _look(self, epoch: int) -> tuple[dict[str, float], Diverged | None]:
        """The end of an epoch, which may take long where it validates: left in the middle, it is done anew later."""
        seen = self.loop.watch.state_dict()
        try:
            return self.loop.check(epoch, self.terms)
        except SystemExit:
            self.loop.watch.load_state_dict(seen)
            self._stop()
            raise

    def deploy(self) -> Classifier:
        """What is attacked and served. Left in the middle it is done anew later: averaged weights and their statistics,
        which the net may hold by then, are put there once more."""
        try:
            return self.loop.deploy()
        except SystemExit:
            self._stop()
            raise

    def keep(self) -> None:
        """Keep all of it, where it is time to, or to leave. The clock stands still meanwhile."""
        if stopping.asked():
            self._stop()
            stopping.point()
        if self.kept is not None and self.kept.due(epoch_over=self._began is None):
            self._write()

    def _stop(self) -> None:
        if stopping.asked():
            self._write()
            print(f"stopped {self._place()}", flush=True)

    def _write(self) -> None:
        if self.kept is None:
            return
        synchronise(self.loop.data.train.x.device)
        now = self.clock.now()
        own = {name: getattr(self, name) for name in _KEPT}
        self.keeping += self.kept.write({"loop": self.loop.state_dict(), "now": now, **own})
        self.clock.set(now)

    def _place(self) -> str:
        """Where a training stands, in words."""
        made = len(self.lines) * self.loop.steps_per_epoch + self.loop.place
        return f"after {made + self._looking * self.loop.steps_per_epoch} steps, {len(self.lines)} epochs over"

    def _restore(self, state: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, state[name])
        self.resumed += 1
        self.loop.load_state_dict(state["loop"])
        self.clock.set(state["now"])
        print(f"goes on {self._place()}", flush=True)


_KEPT = ("lines", "seconds", "terms", "own", "resumed", "keeping", "_began", "_looking")


def train(job: TrainJob, data: Data, log: Path, report: Report, kept: Checkpointer | None = None) -> Trained:
    """Train from scratch, or from where an earlier attempt was kept: the weights are the same bit for bit.

    One line of train.jsonl an epoch: terms (mean over its steps) and their sum, metrics of the defense, seconds,
    validation accuracy where it is taken. `train_seconds` is the work of all attempts (what a kill lost does not count)
    without what guards, validation and the defense's own metrics took (`check_seconds`), or keeping it
    (`keep_seconds`).
    Raises Diverged when an epoch's loss or weights are not finite, Collapsed when the net fell to chance.
    """
    loop = Loop(*build(job, data), job, data, report)
    epochs = loop.settings["epochs"]
    with scope(seed(job.seed, "inner")):
        course = TrainingRun(loop, log, kept)
        if course.resumed:
            over = len(course.lines)
            about = {"epoch": min(over + 1, epochs), "epochs": epochs, "earlier": course.clock.now()}
            report({**about, "share": (over + loop.place / loop.steps_per_epoch) / epochs})
        stopping.defer()
        for epoch in range(len(course.lines), epochs):
            course.epoch(epoch)
            share, loss = (epoch + 1) / epochs, sum(course.terms.values())
            report({"epoch": epoch + 1, "epochs": epochs, "share": share, "loss": loss})
    model = course.deploy()
    elapsed = course.clock.now() - loop.check_seconds
    return Trained(
        model,
        loop.choice.state or None,
        {
            "train_seconds": elapsed,
            "check_seconds": loop.check_seconds,
            "keep_seconds": course.keeping,
            "resumed": course.resumed,
            "seconds_per_epoch": sum(course.seconds) / epochs,
            "epochs": epochs,
            "steps": loop.updater.steps,
            "active_steps": loop.active(),
            "final_terms": course.terms,
            "defense": {name: value for name, value in course.own.items() if math.isfinite(value)},
            "parameters": sum(p.numel() for p in loop.net.parameters()),
            "inference_ms_per_image": inference_ms(model, to_channels_last(to_float(data.test.x[:64]))),
            "deploys": loop.defense.predictor,
            **loop.cost,
            **(loop.choice.metrics() if loop.choice.state else {}),
            **({"validation_hash": content_hash(data.validation)} if loop.choice.state else {}),
        },
    )
