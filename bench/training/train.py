"""A training job: from initial weights, over all epochs, to the deployed model and the metrics of its record."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import plugins
from bench.core.classifier import Classifier, frozen
from bench.core.defense import Batch, Defense
from bench.core.rng import scope, seed
from bench.data.images import Data, content_hash, to_channels_last, to_float
from bench.models.common import Inputs
from bench.planning.job import TrainJob
from bench.records.record import TrainMetrics
from bench.training import stop_signals
from bench.training.best_epoch import validation_accuracy
from bench.training.cost import inference_ms, profile_step
from bench.training.divergence import MIN_STEPS, not_finite
from bench.training.optimizer import autocast_forward
from bench.training.resume import Checkpointer
from bench.training.training_run import TrainingRun

Report = Callable[[dict[str, Any]], None]


class Trained(NamedTuple):
    """Result of a training: the deployed model with the last weights (their average if the recipe averages), the
    network state of the epoch with the best validation accuracy (None if the recipe selects none), and the metrics."""

    model: Classifier
    best: dict[str, Tensor] | None
    metrics: TrainMetrics


def train(job: TrainJob, data: Data, log: Path, report: Report, checkpointer: Checkpointer | None = None) -> Trained:
    """Train from scratch, or resume from the last checkpoint: the weights are the same bit for bit.

    Each epoch writes one line of train.jsonl: the terms of the loss (mean over its steps) and their sum, metrics of the
    defense, seconds, and validation accuracy where it is measured. `train_seconds` is the work of all attempts, without
    work lost by a kill, without checks, validation and the defense's metrics (`check_seconds`), and without checkpoints
    (`checkpoint_seconds`). Raises Diverged if the loss or the weights of an epoch are not finite, Collapsed if the
    accuracy falls to chance.
    """
    run = TrainingRun(*build(job, data), job, data, log, checkpointer)
    with scope(seed(job.seed, "inner")):
        if run.resume():
            report({**run.position(), "earlier": run.clock.now()})
        run.choose_precision()
        stop_signals.defer()
        for epoch in range(run.epochs_done, run.recipe.epochs):
            for batch in run.batches(epoch):
                report(run.position())
                _step(run, batch)
                run.checkpoint()
            loss = _end_epoch(run, epoch)
            report({**run.position(), "loss": loss})
    model = _deploy(run)
    return Trained(model, run.best.state or None, _metrics(run, model))


def build(job: TrainJob, data: Data, trained: bool = False) -> tuple[Defense, nn.Module]:
    """Defense and wrapped, untrained network of a training job, on the data's device. `trained`: stored weights follow.

    The initial weights depend on seed and architecture only, not on the defense, so that runs are paired.
    """
    defense: Defense = plugins.make("defenses", job.defense, job.threat)
    facts = data.facts
    inputs = Inputs(facts.channels, facts.size, facts.classes, facts.mean, facts.std)
    with scope(seed(job.seed, "init", job.model.name)):
        net = plugins.build_model(job.model.name, job.model.settings, inputs, trained)
        net = defense.wrap(net)
    net = net.to(data.train.x.device)
    if any(isinstance(m, nn.Conv2d) for m in net.modules()):
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return defense, net


def _step(run: TrainingRun, batch: Batch) -> None:
    """One step of the defense, under the current budget of a warm-up."""
    defense, net, updater, recipe = run.defense, run.net, run.updater, run.recipe
    updates_before = updater.steps
    if recipe.eps_warmup:
        defense.threat = run.threat.scaled(batch.progress / recipe.eps_warmup)
    with autocast_forward(net, run.precision):
        if run.at_measured_step:
            terms, run.progress.cost = profile_step(defense, net, updater, batch)
        else:
            terms = defense.step(net, updater, batch)
    defense.threat = run.threat
    updater.flush_to_average()
    if defense.restored_older_weights:
        run.average.restart()
    run.count(batch, terms, updater.steps - updates_before)


def _end_epoch(run: TrainingRun, epoch: int) -> float:
    """The checks after an epoch and its line of train.jsonl; returns the loss. Raises Diverged or Collapsed.

    Weights, buffers, modes and random generators are unchanged. A validation that SIGTERM interrupts is repeated.
    """
    recipe, defense, net, progress = run.recipe, run.defense, run.net, run.progress
    number, epochs = epoch + 1, recipe.epochs
    found = dict[str, float]()
    with run.saved_on_sigterm():
        began = run.clock.now()
        problem = not_finite(progress.terms, net, number, epochs)
        if problem is None and recipe.keep == "best" and (number % recipe.choose_every == 0 or number == epochs):
            with run.average.installed(net), frozen(net):
                run.recalibrate()
                threat = run.threat if defense.uses_threat else None
                model = defense.deploy(net)
                found["validation"] = validation_accuracy(model, run.data.validation, threat, run.seed)
                run.best.offer(number, found["validation"], net.state_dict())
        past_warmup = number / epochs > max(recipe.eps_warmup, recipe.lr_warmup)
        if problem is None and recipe.guard and past_warmup and run.updater.steps >= MIN_STEPS:
            problem = run.detector.collapse(defense.deploy(net), number, epochs)
        progress.check_seconds += run.clock.now() - began
    run.write_line(found)
    if problem is not None:
        raise problem
    run.checkpoint()
    return sum(progress.terms.values())


def _deploy(run: TrainingRun) -> Classifier:
    """The deployed model. Raises Collapsed if its accuracy is at chance.

    If SIGTERM interrupts it, averaged weights and their statistics are installed once more after resuming.
    """
    with run.saved_on_sigterm():
        run.average.install()
        run.recalibrate()
        model = run.defense.deploy(run.net.eval())
        began = run.clock.now()
        problem = run.detector.chance_level(model, run.updater.steps) if run.recipe.guard else None
        run.progress.check_seconds += run.clock.now() - began
    if problem is not None:
        raise problem
    return model


def _metrics(run: TrainingRun, model: Classifier) -> TrainMetrics:
    """The metrics of the training for its record."""
    progress, epochs = run.progress, run.recipe.epochs
    measured: dict[str, Any] = {**progress.cost}
    if run.best.state:
        measured |= {**run.best.metrics(), "validation_hash": content_hash(run.data.validation)}
    return TrainMetrics(
        train_seconds=run.clock.now() - progress.check_seconds,
        check_seconds=progress.check_seconds,
        checkpoint_seconds=progress.checkpoint_seconds,
        resumed=progress.resumed,
        seconds_per_epoch=sum(progress.epoch_seconds) / epochs,
        epochs=epochs,
        steps=run.updater.steps,
        active_steps=run.active_steps(),
        final_terms=dict(progress.terms),
        defense_metrics={name: value for name, value in progress.defense_metrics.items() if math.isfinite(value)},
        parameters=sum(p.numel() for p in run.net.parameters()),
        predictor=run.defense.predictor,
        precision=run.precision,
        inference_ms_per_image=inference_ms(model, to_channels_last(to_float(run.data.test.x[:64]))),
        **measured,
    )
