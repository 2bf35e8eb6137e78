"""The state of a training: all that its steps change, the log, and the checkpoints from which it resumes."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bench.atomic import appending
from bench.core.defense import Batch, Defense, Losses
from bench.core.rng import scope, seed
from bench.data.images import Data, batches, to_channels_last, to_float
from bench.planning.job import TrainJob
from bench.records.training_log import TOTAL
from bench.terminal import counted
from bench.training import stop_signals
from bench.training.averaging import Average, recalibrate
from bench.training.best_epoch import BestEpoch
from bench.training.cost import synchronize
from bench.training.divergence import CollapseDetector
from bench.training.optimizer import build_updater
from bench.training.precision import probe
from bench.training.recipe import Recipe
from bench.training.resume import Checkpointer, Clock, random_streams, restore_streams


@dataclass
class Progress:
    """Counters, sums and times of a training; times in seconds of work.

    `lines`: the completed epochs, as lines of train.jsonl. `step`: steps made in the current epoch, all of them while
    only its checks are left. `precision`: the one that a probe chose; empty where the recipe names it. `sums`,
    `counts`: of each term of the loss in this epoch. `terms`: means over the last epoch. `active`: optimizer steps in
    which a part of the recipe had an effect.
    """

    lines: list[str] = field(default_factory=list)
    step: int = 0
    precision: str = ""
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    defense_metrics: dict[str, float] = field(default_factory=dict)
    active: dict[str, int] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    epoch_began: float = 0.0
    epoch_seconds: list[float] = field(default_factory=list)
    check_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    resumed: int = 0


class TrainingRun:
    """Defense, network, optimizer, average, checks and counters of one training.

    With a checkpointer it resumes from the last checkpoint, and writes one at intervals and before it exits on SIGTERM
    (see bench.training.stop_signals).
    """

    def __init__(
        self, defense: Defense, net: nn.Module, job: TrainJob, data: Data, log: Path, checkpointer: Checkpointer | None
    ) -> None:
        self.defense, self.net, self.seed, self.data = defense, net.train(), job.seed, data
        self.log, self.checkpointer, self.clock, self.progress = log, checkpointer, Clock(), Progress()
        self.threat = defense.threat
        self.recipe = Recipe.model_validate(job.training)
        self.batch_size = min(self.recipe.batch_size, len(data.train.x))
        self.steps_per_epoch = len(data.train.x) // self.batch_size
        self.updater = build_updater(defense, net, self.recipe, self.steps_per_epoch)
        kind, decay, start = self.recipe.average, self.recipe.ema_decay, self.recipe.swa_start
        self.average = Average(net, kind, total=self.updater.total, decay=decay, start=start)
        self.updater.on_update = self.average.update
        self.detector, self.best = CollapseDetector(data, self.seed), BestEpoch()

    @property
    def epochs_done(self) -> int:
        """Number of completed epochs."""
        return len(self.progress.lines)

    @property
    def at_measured_step(self) -> bool:
        """True if the next step is the one whose cost is measured: in the middle of the last epoch, since warm-ups make
        the first steps of some methods cheaper, and some check themselves where an epoch begins or ends."""
        return self.epochs_done + 1 == self.recipe.epochs and self.progress.step == self.steps_per_epoch // 2

    @property
    def precision(self) -> str:
        """The precision of training passes: fp32, bf16 or fp16."""
        return self.progress.precision or self.recipe.precision

    def choose_precision(self) -> None:
        """Probe the device, once in a training, if the recipe leaves the precision to it."""
        if self.recipe.precision == "auto" and not self.progress.precision:
            began, images = self.clock.now(), self.data.train
            x = to_channels_last(to_float(images.x[: self.batch_size]))
            self.progress.precision = probe(self.net, x, images.y[: self.batch_size])
            self.progress.check_seconds += self.clock.now() - began
            print(f"trains in {self.precision}, as timed on this device", flush=True)

    def position(self) -> dict[str, float]:
        """The current epoch and step, the numbers of epochs and of steps in one, and the share that is done."""
        epochs, done = self.recipe.epochs, self.epochs_done
        share = (done + self.progress.step / self.steps_per_epoch) / epochs
        steps = {"step": self.progress.step, "steps": self.steps_per_epoch}
        return {"epoch": min(done + 1, epochs), "epochs": epochs, **steps, "share": share}

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The remaining batches of an epoch."""
        first, recipe = self.progress.step, self.recipe
        if first == 0:
            self.progress.epoch_began = self.clock.now()
        order = seed(self.seed, "order", epoch)
        images, size = self.data.train, self.batch_size
        loader = batches(images, size, shuffle_seed=order, augment=recipe.augment, drop_last=True, first=first)
        for step, (x, y, index) in enumerate(loader, first):
            progress = (epoch + step / self.steps_per_epoch) / recipe.epochs
            yield Batch(to_channels_last(x), y, index, epoch, progress, recipe.label_smoothing)

    def count(self, batch: Batch, terms: Losses, updates: int) -> None:
        """Count a step with its terms and its number of optimizer steps; after the last one of an epoch, take means.

        The device is synchronized at the end of an epoch only.
        """
        progress, recipe = self.progress, self.recipe
        for name, value in terms.items():
            progress.sums[name] = progress.sums.get(name, 0) + value.detach()
            progress.counts[name] = progress.counts.get(name, 0) + 1
        for name, end in (("eps_warmup", recipe.eps_warmup), ("lr_warmup", recipe.lr_warmup)):
            if end > 0:
                progress.active[name] = progress.active.get(name, 0) + updates * (batch.progress < end)
        progress.step += 1
        if progress.step < self.steps_per_epoch:
            return
        self.average.end_epoch((batch.epoch + 1) / recipe.epochs)
        progress.terms = {name: float(value) / progress.counts[name] for name, value in progress.sums.items()}
        progress.sums, progress.counts = {}, {}
        ended = self.clock.now()
        progress.epoch_seconds.append(ended - progress.epoch_began)
        metrics = self.defense.metrics(self.net)
        progress.defense_metrics = {name: float(value.detach()) for name, value in metrics.items()}
        progress.check_seconds += self.clock.now() - ended

    def write_line(self, found: dict[str, float]) -> None:
        """End the epoch with its line of train.jsonl, which includes what its checks `found`."""
        progress = self.progress
        line = {"epoch": self.epochs_done + 1, "seconds": round(progress.epoch_seconds[-1], 4)}
        line |= {**progress.terms, **progress.defense_metrics, **found, TOTAL: sum(progress.terms.values())}
        progress.lines.append(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
        progress.step = 0
        with appending(self.log) as lines:
            lines.write(progress.lines[-1])

    def recalibrate(self) -> None:
        """Give averaged weights the BatchNorm statistics of one clean pass in storage order, if the recipe does."""
        if self.recipe.recalibrates:
            parts = self.data.train.x.split(self.recipe.batch_size)
            with scope(seed(self.seed, "recalibrate")):
                recalibrate(self.defense.deploy(self.net), (to_channels_last(to_float(x)) for x in parts))

    def active_steps(self) -> dict[str, int]:
        """Number of optimizer steps (swa: epochs) in which each enabled part of the recipe had an effect."""
        recipe, updater, found = self.recipe, self.updater, dict(self.progress.active)
        if recipe.label_smoothing:
            found["label_smoothing"] = updater.steps
        if recipe.grad_clip:
            found["grad_clip"] = updater.clipped
        if recipe.average != "none":
            found["ema" if recipe.average == "ema" else "swa_epochs"] = self.average.active
        if self.precision != "fp32":
            found[self.precision] = updater.steps
        if self.precision == "fp16":
            found["skipped_for_overflow"] = updater.skipped
        return found

    def resume(self) -> bool:
        """Continue from the last checkpoint, if there is one; lines of the log that are younger are dropped."""
        state = None if self.checkpointer is None else self.checkpointer.read(self.data.train.x.device)
        if state is not None:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            self.progress = Progress(**state["progress"])
            self.progress.resumed += 1
            self.clock.set(state["now"])
            restore_streams(state["random"], self.data.train.x.device)
            self._print("resumes")
        self.log.write_text("".join(self.progress.lines), encoding="utf-8")
        return state is not None

    def checkpoint(self) -> None:
        """Write a checkpoint if one is due; after SIGTERM write one and exit. Its time does not count as work."""
        with self.saved_on_sigterm():
            stop_signals.point()
        if self.checkpointer is not None and self.checkpointer.due(epoch_over=self.progress.step == 0):
            self._save(self.checkpointer)

    @contextmanager
    def saved_on_sigterm(self) -> Iterator[None]:
        """Context that writes a checkpoint if SIGTERM ends it early: the training then resumes at its start."""
        try:
            yield
        except SystemExit:
            if self.checkpointer is not None:
                self._save(self.checkpointer)
            self._print("stopped")
            raise

    def _save(self, checkpointer: Checkpointer) -> None:
        device = self.data.train.x.device
        synchronize(device)
        now = self.clock.now()
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        state = {**parts, "progress": vars(self.progress), "now": now, "random": random_streams(device)}
        self.progress.checkpoint_seconds += checkpointer.write(state)
        self.clock.set(now)

    def _parts(self) -> dict[str, Any]:
        """Objects with a `state_dict`: with progress and generators, all that a step or the checks change."""
        trained = {"net": self.net, "defense": self.defense, "updater": self.updater, "average": self.average}
        return {**trained, "detector": self.detector, "best": self.best}

    def _print(self, verb: str) -> None:
        steps = self.epochs_done * self.steps_per_epoch + self.progress.step
        print(f"{verb} after {counted(steps, 'step')}, {counted(self.epochs_done, 'epoch')} over", flush=True)
