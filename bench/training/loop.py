"""The steps of one epoch and the checks after it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier, frozen
from bench.core.defense import Batch, Defense
from bench.core.rng import scope, seed
from bench.data.images import Data, batches, to_channels_last, to_float
from bench.planning.job import TrainJob
from bench.planning.spec import TrainSpec
from bench.training import sigterm
from bench.training.averaging import Average, recalibrate
from bench.training.best_epoch import Choice, validation_accuracy
from bench.training.cost import profile_step
from bench.training.divergence import MIN_STEPS, CollapseDetector, Diverged, not_finite
from bench.training.optimizer import autocast_forward, build_updater
from bench.training.resume import random_streams, restore_streams


class Loop:
    """Everything that one training changes: defense, network, optimizer, averages; the steps of an epoch, its
    checks."""

    def __init__(
        self,
        defense: Defense,
        net: nn.Module,
        job: TrainJob,
        data: Data,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.defense, self.net = defense, net
        # a job omits settings that are younger than the first records while they have their default
        self.settings = settings = TrainSpec.model_validate(job.training).model_dump()
        self.seed, self.data, self.report = job.seed, data, report
        self.steps_per_epoch = max(len(data.train.x) // settings["batch_size"], 1)
        self.updater = build_updater(self.defense, self.net, settings, self.steps_per_epoch)
        self.average = None
        if settings["average"] != "none":
            kind, decay, start = (settings[name] for name in ("average", "ema_decay", "swa_start"))
            self.average = Average(self.net, kind, total=self.updater.total, decay=decay, start=start)
            self.updater.on_update = self.average.update
        self.threat = self.defense.threat
        self.watch, self.choice, self.check_seconds = CollapseDetector(data, self.seed), Choice(), 0.0
        self.cost: dict[str, float] = {}
        self.place = 0
        """Steps made in the current epoch."""
        self.on_step: Callable[[], None] = lambda: None
        """Called between two steps of an epoch."""
        self._active, self._counts = Counter[str](), Counter[str]()
        self._sums: dict[str, Tensor] = {}
        self.net.train()

    def epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images, or the rest of it after resuming.

        Returns the mean of each term over the steps that have it. The device is synchronized at its end only.
        """
        settings, sums, first = self.settings, self._sums, self.place
        loader = batches(
            self.data.train,
            min(settings["batch_size"], len(self.data.train.x)),
            shuffle_seed=seed(self.seed, "order", epoch),
            augment=settings["augment"],
            drop_last=True,
            first=first,
        )
        with autocast_forward(self.net, settings["precision"]):
            for place, (x, y, index) in enumerate(loader, first):
                progress = (epoch + place / self.steps_per_epoch) / settings["epochs"]
                batch = Batch(to_channels_last(x), y, index, epoch, progress, settings["label_smoothing"])
                last = epoch + 1 == settings["epochs"] and place + 1 == self.steps_per_epoch
                for name, value in self._step(batch, last).items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
                    self._counts[name] += 1
                self.place = place + 1
                if place % 50 == 0 or place == first:
                    self.report({"epoch": epoch + 1, "epochs": settings["epochs"], "share": progress})
                if self.place < self.steps_per_epoch:
                    self.on_step()
        self.defense.threat = self.threat
        if self.average is not None:
            self.average.end_epoch((epoch + 1) / settings["epochs"])
        terms = {name: float(value) / self._counts[name] for name, value in sums.items()}
        self.place, self._sums, self._counts = 0, {}, Counter()
        return terms

    def state_dict(self) -> dict[str, Any]:
        """All that a step or the end of an epoch changes, random generators included; valid between two steps."""
        parts = {name: part.state_dict() for name, part in self._parts()}
        counts = {"active": dict(self._active), "counts": dict(self._counts), "sums": self._sums, "cost": self.cost}
        streams = random_streams(self.data.train.x.device)
        return {**parts, **counts, "place": self.place, "checks": self.check_seconds, "random": streams}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`: the training continues bit for bit."""
        for name, part in self._parts():
            part.load_state_dict(state[name])
        self._active, self._counts = Counter(state["active"]), Counter(state["counts"])
        self._sums, self.cost = state["sums"], state["cost"]
        self.place, self.check_seconds = state["place"], state["checks"]
        restore_streams(state["random"], self.data.train.x.device)

    def _parts(self) -> list[tuple[str, Any]]:
        parts = {"net": self.net, "defense": self.defense, "updater": self.updater}
        watching = {"watch": self.watch, "choice": self.choice}
        return [*parts.items(), *watching.items(), *([("average", self.average)] if self.average is not None else [])]

    def _step(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """One step of the defense under the current budget of a warm-up, with its bookkeeping.

        The cost is measured at the last step, because warm-ups make the first steps of some methods cheaper.
        """
        warmup, before = self.settings["eps_warmup"], self.updater.steps
        if warmup:
            self.defense.threat = self.threat.scaled(batch.progress / warmup)
        if last:
            terms, self.cost = profile_step(self.defense, self.net, self.updater, batch)
        else:
            terms = self.defense.step(self.net, self.updater, batch)
        self.updater.flush_to_average()
        if self.average is not None and self.defense.restored_older_weights:
            self.average.restart()
        made = self.updater.steps - before
        for name in ("eps_warmup", "lr_warmup"):
            self._active[name] += made * (batch.progress < self.settings[name])
        self._active["label_smoothing"] += made * (batch.smoothing > 0)
        return terms

    def check(self, epoch: int, terms: dict[str, float]) -> tuple[dict[str, float], Diverged | None]:
        """After an epoch: validation accuracy, if the recipe selects epochs by it, and the reason to stop or None.

        Weights, buffers, modes and random generators are unchanged.
        """
        settings, epochs, began = self.settings, self.settings["epochs"], time.perf_counter()
        found = dict[str, float]()
        problem = not_finite(terms, self.net, epoch + 1, epochs)
        share = (epoch + 1) / epochs
        past_warmup = self.updater.steps >= MIN_STEPS and share > max(settings["eps_warmup"], settings["lr_warmup"])
        if problem is None and settings["guard"] and past_warmup:
            problem = self.watch.fallen(self.defense.deploy(self.net), epoch + 1, epochs)
        due = (epoch + 1) % settings["choose_every"] == 0 or epoch + 1 == epochs
        if problem is None and settings["keep"] == "best" and due:
            with self._averaged(), frozen(self.net):
                model = self.defense.deploy(self.net)
                threat = self.threat if self.defense.uses_threat else None
                found["validation"] = validation_accuracy(model, self.data.validation, threat, self.seed)
                self.choice.offer(epoch + 1, found["validation"], self.net.state_dict())
        self.check_seconds += time.perf_counter() - began
        return found, problem

    def deploy(self) -> Classifier:
        """The deployed model. Raises Collapsed if its accuracy is at chance."""
        if self.average is not None:
            self.average.install()
            self._recalibrate()
        model, began = self.defense.deploy(self.net.eval()), time.perf_counter()
        problem = self.watch.failed(model, self.updater.steps) if self.settings["guard"] else None
        self.check_seconds += time.perf_counter() - began
        if problem is not None:
            raise problem
        return model

    def active(self) -> dict[str, int]:
        """Number of optimizer steps (swa: epochs) in which each enabled part of the recipe had an effect."""
        found = {name: self._active[name] for name in ("eps_warmup", "lr_warmup", "label_smoothing")}
        found["grad_clip"] = self.updater.clipped
        on = {name: value for name, value in found.items() if self.settings[name]}
        if self.average is not None:
            on["ema" if self.average.kind == "ema" else "swa_epochs"] = self.average.active
        if self.settings["precision"] != "fp32":
            on[self.settings["precision"]] = self.updater.steps
        if self.settings["precision"] == "fp16":
            on["skipped_for_overflow"] = self.updater.skipped
        return on

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Context in which the network has the weights that would be deployed now: the average, if there is one."""
        if self.average is None:
            yield
            return
        with self.average.installed(self.net):
            self._recalibrate()
            yield

    def _recalibrate(self) -> None:
        """BatchNorm statistics of the averaged weights, from one clean pass; ema by default uses those of training."""
        wanted = self.settings["average_bn"] or ("live" if self.settings["average"] == "ema" else "clean")
        if wanted == "clean":
            with scope(seed(self.seed, "recalibrate")):
                recalibrate(self.defense.deploy(self.net), self._images())

    def _images(self) -> Iterator[Tensor]:
        """All training images in batches, in storage order."""
        x, size = self.data.train.x, self.settings["batch_size"]
        for start in range(0, len(x), size):
            sigterm.point()
            yield to_channels_last(to_float(x[start : start + size]))
