"""SIGTERM at any moment of a training: a checkpoint at once, no step twice, the same weights bit for bit."""

import json
import math
import os
import random
import shutil
import signal
import time
import weakref
from pathlib import Path
from signal import SIGINT, Signals
from typing import Any

import pytest
import torch
import yaml
from harness import Bench, outcomes
from worker_process import WorkerProcess

from bench.data.images import load
from bench.planning.plan import plan
from bench.planning.spec import build
from bench.records.store import Store
from bench.terminal import counted
from bench.training import stop_signals as stopping
from bench.training.best_epoch import validation_accuracy
from bench.training.resume import PLACE, Checkpointer
from bench.training.train import train

PLUGIN = '''"""min CE, and a line in a file for each step and each deployment

Nobody (2024).
"""
import os, signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
import torch.nn.functional as F
from torch import nn
from bench.core.classifier import Classifier
from bench.core.defense import Batch, Defense, Losses

HERE = Path(__file__).parent

def note(what):
    """One more of these; SIGTERM to this process where a file says so, in the middle of what is under way."""
    with (HERE / f"{what}.seen").open("a") as file:
        file.write(".")
    asked = HERE / f"{what}.term"
    if asked.exists() and asked.read_text() == str((HERE / f"{what}.seen").stat().st_size):
        asked.unlink()
        os.kill(os.getpid(), signal.SIGTERM)

@dataclass
class Counted(Defense):
    uses_threat: ClassVar[bool] = True
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        note("step")
        return {"ce": F.cross_entropy(net(batch.x + 0.1 * batch.x.new_empty(batch.x.shape).normal_()), batch.y)}
    def wrap(self, net: nn.Module) -> nn.Module:
        return nn.Sequential(net, nn.BatchNorm1d(10))  # the average needs statistics of its own
    def deploy(self, net: nn.Module) -> Classifier:
        note("deploy")
        return Classifier(net)
'''
SPEC = """
data: {name: digits, test: 32, train: 864, validation: 64}
models: [{name: mlp, set: {width: 64}}]
threat: {eps: 0.1}
train: {epochs: 4, lr: 0.05, batch_size: 20, average: swa, swa_start: 0.2, keep: best, optimizer: sgd}
defenses: [counted]
attacks: [clean]
checks: 'off'
"""
EPOCHS, STEPS = 4, 40  # steps in an epoch
SAFE = 25.0  # seconds that a training may take to be safe; Slurm kills after 30


class Training:
    """A training in a results folder, and the outcome of an uninterrupted one."""

    def __init__(self, bench: Bench) -> None:
        self.here = Path.cwd()
        (self.here / "counted.py").write_text(PLUGIN)
        (self.here / "s.yaml").write_text(SPEC)
        words = ("run", "s.yaml", "--plugin", "counted.py", "--executor", "debug", "--device", "cpu", "-q")
        done = bench(*words, "--results-dir", "whole")
        assert done.code == 0, done.err
        shutil.copytree("whole", "stopped")
        self.expected = outcomes(Path("whole"))
        self.store = Store(self.here / "stopped")
        self.key = next(job.key for job in self.store.jobs().values() if job.kind == "train")
        self.log = self.lines("whole")
        self.fresh()
        assert self.attempt()[0] == 0
        self.deploys = self.seen("deploy")
        self.fresh()

    def fresh(self) -> None:
        """From the start."""
        (self.store.folder(self.key) / "record.json").unlink(missing_ok=True)
        shutil.rmtree((self.store.folder(self.key) / PLACE).parent, ignore_errors=True)  # left between record and end
        for name in ("step", "deploy"):
            (self.here / f"{name}.seen").write_text("")

    def seen(self, what: str) -> int:
        return (self.here / f"{what}.seen").stat().st_size

    def lines(self, folder: str) -> list[dict[str, Any]]:
        text = (self.here / folder / self.key / "train.jsonl").read_text()
        return [{**json.loads(line), "seconds": 0} for line in text.splitlines()]

    def attempt(self, steps: int | None = None, after: float = 0.0) -> tuple[int, float]:
        """A worker in a process of its own, asked to stop so many seconds after so many more steps: exit code, and how
        long it took to leave. Counted in steps, since a loaded machine may spend any share of a time on the start."""
        process = WorkerProcess(self.store, self.key, self.here)
        if steps is not None:
            goal = self.seen("step") + steps
            while self.seen("step") < goal and process.alive():
                time.sleep(0.001)
            process.process.join(after)
            process.send(signal.SIGTERM)
        began = time.monotonic()
        code = process.end()
        return code, time.monotonic() - began

    def same(self) -> int:
        """It ended as the uninterrupted one did; how often it was taken up."""
        assert outcomes(self.store.root) == self.expected
        assert self.lines("stopped") == self.log
        assert [line["epoch"] for line in self.log] == list(range(1, EPOCHS + 1))
        record = self.store.record(self.key)
        assert record is not None
        return int(record.metrics.resumed)


@pytest.fixture
def training(bench: Bench) -> Training:
    return Training(bench)


def moments(deploys: int) -> list[tuple[str, int]]:
    """In the first and last step of an epoch and of all, in one between; at every kind of deployment: for statistics of
    the averaged weights, for validation, by the watch (after 100 steps), and for both at the end."""
    steps = [1, STEPS, STEPS + 1, 2 * STEPS + 7, EPOCHS * STEPS - 1, EPOCHS * STEPS]
    return [*(("step", nth) for nth in steps), *(("deploy", nth) for nth in (1, 2, 5, 6, 7, deploys - 1, deploys))]


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_sigterm_at_any_point_repeats_no_step_and_is_bit_identical(training: Training, every: int) -> None:
    assert training.deploys >= 2 * EPOCHS + 4
    chosen = moments(training.deploys)[3::every] if every > 1 else moments(training.deploys)
    for what, nth in chosen:
        training.fresh()
        (training.here / f"{what}.term").write_text(str(nth))
        code, seconds = training.attempt()
        assert (code, seconds < SAFE) == (143, True), (what, nth)
        assert not (training.here / f"{what}.term").exists()
        late = what == "deploy" and nth == training.deploys  # all is computed: it ends with its record
        assert training.store.done(training.key) == late, (what, nth)
        if not late:
            assert (training.store.folder(training.key) / PLACE).exists()
            made = training.seen("step")
            assert training.attempt()[0] == 0
            assert training.seen("step") == EPOCHS * STEPS, f"steps made twice after SIGTERM in {what} {nth}"
            log = (training.store.folder(training.key) / "log.txt").read_text()
            assert f"stopped after {counted(made, 'step')}" in log
            assert f"resumes after {counted(made, 'step')}" in log
        assert training.same() == (not late)


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_twenty_times_sigterm_at_random_moments(training: Training) -> None:
    """F6, for a worker: while it starts (no step yet) and anywhere in the half of all steps that comes next."""
    dice, asked, slowest, taken_up = random.Random(1), 0, 0.0, 0
    while asked < 20:
        code, seconds = training.attempt(dice.choice((0, dice.randint(1, EPOCHS * STEPS // 2))), dice.uniform(0.0, 0.2))
        asked += code == 143
        slowest = max(slowest, seconds)
        assert code in (0, 143, -signal.SIGTERM)  # the last one: before the worker has installed its handler
        if training.store.done(training.key):
            taken_up += training.same()
            assert training.seen("step") == EPOCHS * STEPS
            training.fresh()
    assert slowest < SAFE
    assert taken_up >= 5
    print(f"20 signals, {taken_up} resumptions in finished trainings, slowest exit {slowest:.2f} s")


def test_an_interrupted_validation_leaves_the_collapse_detector_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights decay to 0: every epoch that is checked (from 100 updates on) predicts one class."""
    values = {**yaml.safe_load(SPEC), "defenses": ["standard"]}
    values["train"] |= {"weight_decay": 20.0, "epochs": 6, "average": "none"}
    del values["train"]["swa_start"]
    job = plan(build(values), tmp_path)[0]
    data = load("digits", root=tmp_path, device=torch.device("cpu"), train=job.data.train, validation=64, seed=0)
    checkpointer = Checkpointer(tmp_path / "checkpoints" / "one", lambda: "me", every=math.inf, at_end=math.inf)
    validations = 0

    def interrupted_in_the_fifth_epoch(*rest: Any) -> float:
        nonlocal validations
        validations += 1
        if validations == 5:
            stopping.handle(signal.SIGTERM, None)
        return validation_accuracy(*rest)

    monkeypatch.setattr("bench.training.train.validation_accuracy", interrupted_in_the_fifth_epoch)
    with pytest.raises(SystemExit), stopping.job():
        train(job, data, tmp_path / "log", lambda values: None, checkpointer)
    state = checkpointer.read(torch.device("cpu"))
    assert state is not None
    assert len(state["progress"]["lines"]) == 4
    assert state["progress"]["step"] == STEPS
    assert state["detector"]["constant"] == 2


@pytest.mark.parametrize("number", stopping.STOPS)
def test_a_signal_is_not_lost_in_a_weak_references_callback(number: Signals) -> None:
    """Where Python drops exceptions. It takes effect once the round of the driver's loop is over; a second at once."""

    class Object:
        pass

    def disturb() -> None:
        thing = Object()
        reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
        del thing
        assert reference() is None
        reached.append("the end of the round")
        stopping.point()

    def disturb_twice() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        reached.append("after the second")

    before = {each: signal.getsignal(each) for each in stopping.STOPS}
    reached: list[str] = []
    error = KeyboardInterrupt if number == SIGINT else SystemExit
    try:
        for each in stopping.STOPS:
            signal.signal(each, signal.default_int_handler)
        stopping.listen()
        with pytest.raises(error), stopping.rounds():
            disturb()
        assert not stopping.insisted()
        with pytest.raises(error), stopping.rounds():
            disturb_twice()
        assert stopping.insisted()
        assert reached == ["the end of the round"]
        stopping.point()  # nothing is left over
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_a_process_that_was_started_deaf_to_a_signal_stays_so() -> None:
    before = {each: signal.getsignal(each) for each in stopping.STOPS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stopping.listen()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_outside_of_a_job_sigterm_takes_effect_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping.defer()
    stopping.point()
    with pytest.raises(SystemExit) as left:
        stopping.handle(signal.SIGTERM, None)
    assert left.value.code == 143
    with pytest.raises(SystemExit) as left, stopping.job():
        stopping.handle(signal.SIGTERM, None)  # an evaluation: its finished blocks lie there already
    assert left.value.code == 143


def test_a_deferred_exit_takes_place_at_the_end_of_the_job() -> None:
    reached = []

    @stopping.job()
    def work() -> None:
        stopping.defer()
        stopping.handle(signal.SIGTERM, None)
        reached.append(True)

    with pytest.raises(SystemExit) as left:
        work()
    assert (left.value.code, reached) == (143, [True])
    with stopping.job():
        stopping.point()
