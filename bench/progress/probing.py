"""A few seconds of a job, and from them all of it: training steps, or an attack on growing numbers of images.

A training is timed by steps at points spread over its whole course, so that warm-ups count as long as they last. An
evaluation runs on the trained model where its weights lie there. Else it runs on an untrained one that is taken to be
right about every image, within a thousandth of the budget, so that all images stand to the end: what the attack costs
at the most. From a few images to a whole block, each of its passes grows as a pass over so many images does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

from bench.core.classifier import frozen
from bench.core.defense import Batch
from bench.core.rng import scope, seed
from bench.data.images import Images, batches, to_channels_last
from bench.jobs import worker
from bench.jobs.provenance import peak_mb
from bench.progress.probe import Probe, Task
from bench.progress.probing_images import evaluation
from bench.training.best_epoch import validation_accuracy
from bench.training.cost import synchronise
from bench.training.loop import Loop
from bench.training.optimizer import autocast_forward
from bench.training.train import build

WARM, LEAST, MOST = 2, 3, 200  # steps before timing starts, and how many are timed
SPREAD = 0.6180339887  # multiples of it modulo 1 fill [0,1) evenly, however many there are


def measure(task: Task) -> Probe:
    """What one kind of job costs. Raises what the job itself would."""
    device, began = torch.device(task.device), time.perf_counter()
    if device.type == "cpu":
        torch.set_num_threads(1)
    training = task.job.kind == "train"
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = training
    found = _training(task, device, began) if training else evaluation(task, device, began)
    peaks = {where: peak for where, peak in peak_mb(task.device).items() if peak is not None}
    return found._replace(peaks=peaks)


def _training(task: Task, device: torch.device, began: float) -> Probe:
    what = task.job.what
    data = worker.load_images(what, None, task.root, device, _silent)
    loop = Loop(*build(what, data), what, data, lambda values: None)
    beside = time.perf_counter() - began
    with scope(seed(what["seed"], "inner")):
        times = list(_timed(_steps(loop, device), loop.updater.total, task.cap))
        checks = _checks(loop)
    epochs, steps = loop.settings["epochs"], loop.steps_per_epoch
    groups = [times[k::5] for k in range(min(5, len(times)))]
    means = [sum(group) / len(group) for group in groups]
    seconds, low, high = (epochs * (steps * one + checks) for one in (sum(times) / len(times), min(means), max(means)))
    kept = sum(value.numel() * value.element_size() for value in loop.net.state_dict().values())
    size = what["train"]["batch_size"]
    how = f"{len(times)} steps of {size} images in {sum(times):.1f} s, {1000 * sum(times) / len(times):.1f} ms each"
    best = 2 if loop.settings["keep"] == "best" else 1
    return Probe(task.job, seconds, low, high, beside, {}, kept * best, how)


def _steps(loop: Loop, device: torch.device) -> Iterator[float]:
    """Make steps for ever, each as at another point of the training, and say how long each took."""
    settings, count, epoch = loop.settings, 0, 0
    size = min(settings["batch_size"], len(loop.data.train.x))
    with autocast_forward(loop.net, settings["precision"]):
        while True:
            order = seed(loop.seed, "order", epoch)
            began = time.perf_counter()
            for x, y, index in batches(
                loop.data.train, size, shuffle_seed=order, augment=settings["augment"], drop_last=True
            ):
                progress = count * SPREAD % 1.0
                loop._step(Batch(to_channels_last(x), y, index, epoch, progress, settings["label_smoothing"]), False)
                synchronise(device)
                now = time.perf_counter()
                yield now - began
                began, count = now, count + 1
            epoch += 1


def _timed(steps: Iterator[float], total: int, cap: float) -> Iterator[float]:
    """The times of steps after the first ones, until they took `cap` seconds; no more steps than the training has."""
    warm, spent, given = 0.0, 0.0, 0
    for made, took in enumerate(steps, start=1):
        warming = made < total and (made == 1 or (made <= WARM and warm < cap))
        if warming:
            warm += took
        else:
            yield took
            spent, given = spent + took, given + 1
        enough = spent >= cap and (given >= LEAST or spent >= 2 * cap)
        if not warming and (enough or given >= MOST or made >= total):
            return


def _checks(loop: Loop) -> float:
    """Seconds an epoch of what is looked at between epochs: metrics, guard, validation."""
    settings = loop.settings
    for _ in range(2):  # the first time warms up
        began = time.perf_counter()
        loop.defense.metrics(loop.net)
        model = loop.defense.deploy(loop.net)
        if settings["guard"]:
            loop.watch.fallen(model, 1, settings["epochs"])
        looked = time.perf_counter() - began
    if settings["keep"] != "best":
        return looked
    held = loop.data.validation
    part = Images(held.x[: settings["batch_size"]], held.y[: settings["batch_size"]])
    began = time.perf_counter()
    with frozen(loop.net):
        validation_accuracy(model, part, loop.threat if loop.defense.uses_threat else None, loop.seed)
    whole = (time.perf_counter() - began) * len(held.x) / len(part.x)
    return looked + whole / settings["choose_every"]


def _silent(values: dict[str, Any]) -> None:
    pass
