"""One training: the pass through an epoch, and what is looked at after it. It knows interfaces only."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.averaging import Average, recalibrate
from bench.choice import Choice, validation_accuracy
from bench.core.classifier import Classifier, frozen
from bench.core.defense import Batch, Defense
from bench.core.rng import scope, seed
from bench.cost import counted_step
from bench.data import Data, batches, layout, to_float
from bench.guards import MIN_STEPS, Diverged, Watch, not_finite
from bench.optimise import optimisation, passes_in
from bench.spec import TrainSpec


class Loop:
    """One training: the defense, its net and optimiser, the pass through an epoch, and what is looked at after it."""

    def __init__(
        self,
        defense: Defense,
        net: nn.Module,
        what: dict[str, Any],
        data: Data,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.defense, self.net = defense, net
        # jobs leave out settings that are younger than the first records while at their default
        self.settings = settings = TrainSpec.model_validate(what["train"]).model_dump()
        self.seed, self.data, self.report = what["seed"], data, report
        self.steps_per_epoch = max(len(data.train.x) // settings["batch_size"], 1)
        self.updater = optimisation(self.defense, self.net, settings, self.steps_per_epoch)
        self.average = None
        if settings["average"] != "none":
            kind, decay, start = (settings[name] for name in ("average", "ema_decay", "swa_start"))
            self.average = Average(self.net, kind, total=self.updater.total, decay=decay, start=start)
            self.updater.on_update = self.average.update
        self.threat = self.defense.threat
        self.watch, self.choice, self.check_seconds = Watch(data, self.seed), Choice(), 0.0
        self.cost: dict[str, float] = {}
        self._active = Counter[str]()
        self.net.train()

    def epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images; the mean of each term over the steps that had it. The only host sync is
        at its end."""
        settings, sums, counts = self.settings, dict[str, Tensor](), Counter[str]()
        loader = batches(
            self.data.train,
            min(settings["batch_size"], len(self.data.train.x)),
            shuffle_seed=seed(self.seed, "order", epoch),
            augment=settings["augment"],
            drop_last=True,
        )
        with passes_in(self.net, settings["precision"]):
            for place, (x, y, index) in enumerate(loader):
                progress = (epoch + place / self.steps_per_epoch) / settings["epochs"]
                batch = Batch(layout(x), y, index, epoch, progress, settings["label_smoothing"])
                last = epoch + 1 == settings["epochs"] and place + 1 == self.steps_per_epoch
                for name, value in self._step(batch, last).items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
                    counts[name] += 1
                if place % 50 == 0:
                    self.report({"epoch": epoch + 1, "epochs": settings["epochs"], "share": progress})
        self.defense.threat = self.threat
        if self.average is not None:
            self.average.end_epoch((epoch + 1) / settings["epochs"])
        return {name: float(value) / counts[name] for name, value in sums.items()}

    def _step(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """The defense's step under the budget of this moment, and what has to be told of it.

        The last one is counted: every warm-up is over then, which makes the first steps of some methods cheaper.
        """
        warmup, before = self.settings["eps_warmup"], self.updater.steps
        if warmup:
            self.defense.threat = self.threat.scaled(batch.progress / warmup)
        if last:
            terms, self.cost = counted_step(self.defense, self.net, self.updater, batch)
        else:
            terms = self.defense.step(self.net, self.updater, batch)
        self.updater.settle()
        if self.average is not None and self.defense.rolled_back:
            self.average.restart()
        made = self.updater.steps - before
        for name in ("eps_warmup", "lr_warmup"):
            self._active[name] += made * (batch.progress < self.settings[name])
        self._active["label_smoothing"] += made * (batch.smoothing > 0)
        return terms

    def check(self, epoch: int, terms: dict[str, float]) -> tuple[dict[str, float], Diverged | None]:
        """After an epoch: validation accuracy where the recipe chooses by it, and the reason to stop, if there is one.

        Leaves weights, buffers, modes and random streams as they are.
        """
        settings, epochs, began = self.settings, self.settings["epochs"], time.perf_counter()
        found = dict[str, float]()
        problem = not_finite(terms, self.net, epoch + 1, epochs)
        share = (epoch + 1) / epochs
        judged = self.updater.steps >= MIN_STEPS and share > max(settings["eps_warmup"], settings["lr_warmup"])
        if problem is None and settings["guard"] and judged:
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
        """What is attacked and served. Raises Collapsed where it is at chance."""
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
        """In how many optimiser steps (swa: epochs) each mechanism of the recipe that is on did something."""
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
        """Inside, the net stands as it would be deployed now; without an average, as it is."""
        if self.average is None:
            yield
            return
        with self.average.standing(self.net):
            self._recalibrate()
            yield

    def _recalibrate(self) -> None:
        """Statistics of the averaged weights from one clean pass of what is deployed; ema keeps the live ones."""
        wanted = self.settings["average_bn"] or ("live" if self.settings["average"] == "ema" else "clean")
        if wanted == "clean":
            x, size = self.data.train.x, self.settings["batch_size"]
            with scope(seed(self.seed, "recalibrate")):
                recalibrate(
                    self.defense.deploy(self.net), (layout(to_float(x[i : i + size])) for i in range(0, len(x), size))
                )
