"""A probe of an evaluation or audit: its work on ever more images, and from them on all (see probing)."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import plugins
from bench.core.attack import Context, Evaluation
from bench.core.classifier import Classifier, frozen
from bench.core.epsilon import Epsilon
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.data.images import judged_by_validation, test_block
from bench.jobs import worker
from bench.planning.job import Job
from bench.progress.probe import Probe, Task
from bench.records.store import Store
from bench.training.cost import synchronise
from bench.training.train import build

SHRUNK = 1000.0  # budgets of an untrained model are divided by it
GROWTH, LEAP = 4, 16  # each try on so many times as many images; the one after a long first one
MOST_WARM = 5.0  # times the cap: after a first try that took longer there is no other


class _Case(NamedTuple):
    """What an evaluation is probed on. `real`: the trained model, with its own images, labels and budget."""

    model: Classifier
    x: Tensor
    y: Tensor
    real: bool


def evaluation(task: Task, device: torch.device, began: float) -> Probe:
    """What it costs; `began`: when its process did."""
    job, trained = task.job, task.trained
    if trained is None or trained.kind != "train":
        raise ValueError("its model is not there yet")
    case = _case(task, trained, device)
    first, last = job.what.get("images", (0, job.what["n"]))
    unit, work = _work(job, case)
    unit = min(unit, last - first)
    beside = time.perf_counter() - began
    if work is None:
        return Probe(job, 0.0, 0.0, 0.0, beside, {}, 0, "no cell: this model cannot be judged so")
    with scope(seed(job.what["seed"], "probe")):
        tries = list(_grow(work, _Passes(case.model.net), unit, task.cap))
    with scope(0), frozen(case.model):
        cost = _cost(case, device)
        least = tries[-1].stretched(unit, cost)
        likely = least + (unit - tries[-1].images) * _growth(tries, cost)
    blocks = (last - first) / unit
    on = "trained weights" if case.real else "an untrained net, all images standing"
    how = f"{tries[-1].images} of {unit} images at a time in {tries[-1].seconds:.1f} s, on {on}"
    kept = int(tries[-1].made / tries[-1].images * (last - first))
    return Probe(job, blocks * likely, blocks * least, blocks * likely, beside, {}, kept, how)


def _case(task: Task, trained: Job, device: torch.device) -> _Case:
    what = task.job.what
    if what.get("split") == "validation":
        data = judged_by_validation(worker.load_images(trained.what, None, task.root, device, _silent), what["n"])
    else:
        data = worker.load_images(trained.what, what["n"], task.root, device, _silent)
    first, last = what.get("images", (0, what["n"]))
    x, y = test_block(data, first, min(last, first + 500))
    try:
        model = worker.load_model(Store(task.store), trained, data, what.get("weights", "last"))
        return _Case(model, x, y, True)
    except ValueError:
        defense, net = build(trained.what, data)
        model = defense.deploy(net.eval())
    with torch.no_grad(), scope(0):
        said = model.predict(x)
    return _Case(model, x, torch.where(said < 0, y, said), False)  # a vote may abstain


def _work(job: Job, case: _Case) -> tuple[int, Callable[[int], int] | None]:
    """How many images go together, and a function that does the job's work on the first m and gives the bytes it would
    keep; None where this model is not judged so, which takes no time."""
    model, x, y, real = case
    if job.kind == "audit":
        return _audit(job, case)
    threat, settings = job.what["threat"], dict(job.what["attack"]["set"])
    if not real and threat is not None:
        threat = {**threat, "eps": _shrunk(threat["eps"])}
        if settings.get("budgets"):
            settings["budgets"] = [_shrunk(eps) for eps in settings["budgets"]]
    judge: Evaluation = plugins.make("attacks", job.what["attack"]["name"], settings, threat)
    if judge.unsupported_reason(model):
        return 1, None

    def work(m: int) -> int:
        others = tuple((key, x[:m]) for key in job.needs[1:])
        outcome = judge.evaluate(model, x[:m], y[:m], Context(0, others=others))
        tensors = [*outcome.columns.values(), *([outcome.x_adv] if outcome.x_adv is not None else [])]
        return sum(values.numel() * values.element_size() for values in tensors)

    block = getattr(judge, "block_size", judge.block)
    return min(block, settings.get("batch_size", block)), work


def _audit(job: Job, case: _Case) -> tuple[int, Callable[[int], int] | None]:
    from bench.soundness import audit_model as soundness

    model, x, y, _ = case

    def images(m: int) -> int:
        for _ in job.needs[1:]:
            with frozen(model), torch.no_grad():
                model.predict(x[:m])
                model.predict(x[:m])
        return 0

    def checks(m: int) -> int:
        threats = [Threat(threat["norm"], Epsilon(threat["eps"])) for threat in job.what["threats"]]
        soundness.audit(model, x[:m], y[:m], threats, job.what["level"], seed=0, claimed=None, report=_ignored)
        return 0

    return job.what["n"], images if job.what["part"] == "images" else checks


def _shrunk(eps: str) -> str:
    return str(float(Epsilon(eps)) / SHRUNK)


class _Passes:
    """Counts calls of a net and the images in them, with and without gradients."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.calls, self.back, self.rows = net, 0, 0, 0

    def __enter__(self) -> _Passes:
        self.calls = self.back = self.rows = 0
        self._handle = self.net.register_forward_hook(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _note(self, module: nn.Module, given: Any, logits: Any) -> None:
        self.calls, self.rows = self.calls + 1, self.rows + len(given[0])
        self.back += isinstance(logits, Tensor) and logits.requires_grad


class _Try(NamedTuple):
    """An attack on the first images of a block: how long it took, and which passes through the net it made."""

    images: int
    seconds: float
    made: int
    calls: int
    back: int
    rows: int

    def own(self, cost: Callable[[int, bool], float]) -> float:
        """Seconds of the attack itself, beside its passes."""
        width = max(round(self.rows / self.calls), 1) if self.calls else 1
        return self.seconds - (self.calls - self.back) * cost(width, False) - self.back * cost(width, True)

    def stretched(self, images: int, cost: Callable[[int, bool], float]) -> float:
        """Seconds for more images at a time. Passes get longer, each by what a pass with so many images takes; what
        the attack does beside them is dispatch. Where a pass holds draws of few images, there are more passes."""
        if not self.calls or images == self.images:
            return self.seconds * images / self.images
        width = self.rows / self.calls
        if width > self.images:
            return self.seconds * images / self.images
        here, there = (max(round(width * one / self.images), 1) for one in (self.images, images))
        forward = cost(there, False) - cost(here, False)
        backward = cost(there, True) - cost(here, True)
        return self.seconds + (self.calls - self.back) * max(forward, 0.0) + self.back * max(backward, 0.0)


def _growth(tries: list[_Try], cost: Callable[[int, bool], float]) -> float:
    """Seconds by which what an attack does beside its passes grows with each image, from the last two tries."""
    if len(tries) < 2 or tries[-1].rows > tries[-1].calls * tries[-1].images:
        return 0.0  # each pass holds draws of few images: all of it grows with the images as it is
    before, after = tries[-2:]
    return max(after.own(cost) - before.own(cost), 0.0) / (after.images - before.images)


def _grow(work: Callable[[int], int], passes: _Passes, unit: int, cap: float) -> Iterator[_Try]:
    """Ever more images, until the next ones could exceed the cap. The first try warms up, however long it takes; one
    that took long is followed by one more, which is not much longer where calls cost more than images."""
    m, spent, long = 1, 0.0, False
    for count in itertools.count():
        began = time.perf_counter()
        with passes:
            made = work(m)
        took = time.perf_counter() - began
        if count == 0:
            long = GROWTH * took > cap
        if count > 0 or long:
            yield _Try(m, took, made, passes.calls, passes.back, passes.rows)
        spent += took if count else 0.0
        following = min(m * (LEAP if long else GROWTH), unit)
        if long and (count or took > MOST_WARM * cap or passes.rows > passes.calls):
            return
        if count and (following == m or spent + took * following / m > cap):
            return
        m = m if count == 0 and not long else following


def _cost(case: _Case, device: torch.device) -> Callable[[int, bool], float]:
    """Seconds of a pass over m images, with the gradient for them or without: the least of a few."""

    def once(m: int, back: bool) -> float:
        x = case.x[torch.arange(m) % len(case.x)].requires_grad_(back)
        synchronise(device)
        began = time.perf_counter()
        with torch.set_grad_enabled(back):
            logits = case.model.net(x)
        if back:
            torch.autograd.grad(logits.sum(), x)
        synchronise(device)
        return time.perf_counter() - began

    @functools.cache
    def cost(m: int, back: bool) -> float:
        first = once(m, back)
        return min(once(m, back) for _ in range(7 if first < 0.2 else 1))

    return cost


def _ignored(done: int, total: int, note: str) -> None:
    pass


def _silent(values: dict[str, Any]) -> None:
    pass
