"""A killed training goes on where it was kept, and gives in the end the bits that an uninterrupted one gives."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Bench, outcomes
from torch import Tensor, nn
from worker_process import WorkerProcess, work_and_save_often

from bench.atomic import file_hash
from bench.core.classifier import Classifier
from bench.core.rng import scope
from bench.data.images import Data, load
from bench.jobs import worker
from bench.planning.job import Job
from bench.planning.plan import plan
from bench.planning.spec import build
from bench.records.store import Store
from bench.training import checkpoint
from bench.training.divergence import CollapseDetector
from bench.training.resume import PLACE, Checkpointer, Clock, origin_of, pack, random_streams, restore_streams, unpack
from bench.training.train import Trained, train

RESULTS, ROOT = Path("results"), Path("no-data-here")
CPU = torch.device("cpu")
SGD = {"optimizer": "sgd", "lr": 0.05, "batch_size": 16, "epochs": 3, "weight_decay": 1e-3, "schedule": "cosine"}
WARM = {"schedule": "one_cycle", "eps_warmup": 0.4, "lr_warmup": 0.3, "label_smoothing": 0.1, "grad_clip": 0.1}
STEPS = 4  # in an epoch
STEP_KILLS = 20  # docs/reliability.md shows it
TIMES = {"now", "epoch_seconds", "checkpoint_seconds", "check_seconds", "epoch_began", "resumed", "lines"}
pytestmark = pytest.mark.usefixtures("fresh_catalog")


class Killed(Exception):
    """Stands for a kill between two steps."""


def job_of(
    defense: Any, model: str = "mlp", norm: str = "Linf", train_n: int = 16 * STEPS, test: int = 16, **recipe: Any
) -> Job:
    validation = recipe.pop("validation", 0)
    values = {
        "data": {"name": "digits", "test": test, "train": train_n + validation, "validation": validation},
        "models": [{"name": model, "set": {"width": 24} if model == "mlp" else {}}],
        "threat": {"norm": norm, "eps": 0.1},
        "train": {**SGD, **recipe},
        "defenses": [defense],
        "attacks": ["clean"],
    }
    return plan(build(values), ROOT)[0]


def data_of(job: Job) -> Data:
    chosen = job.data
    return load("digits", root=ROOT, device=CPU, train=chosen.train, test=16, validation=chosen.validation, seed=0)


def always(path: Path, *, within: bool = True) -> Checkpointer:
    """At every step, or at the end of every epoch."""
    return Checkpointer(path, lambda: "me", every=0.0 if within else math.inf, at_end=0.0, share=math.inf)


def run(job: Job, data: Data, folder: Path, kept: Checkpointer | None = None) -> Trained:
    return train(job, data, folder / "train.jsonl", lambda values: None, kept)


def log_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def told(done: Trained) -> dict[str, Any]:
    """The metrics that are no times."""
    times = (
        "train_seconds",
        "check_seconds",
        "checkpoint_seconds",
        "seconds_per_epoch",
        "inference_ms_per_image",
        "resumed",
    )
    return {name: value for name, value in vars(done.metrics).items() if name not in times}


def timeless(path: Path) -> tuple[dict[str, Tensor], Any]:
    """What a file keeps, without what differs from attempt to attempt."""
    found = checkpoint.read(path)
    assert found is not None
    tensors, facts = found

    def without(value: Any) -> Any:
        return {n: without(v) for n, v in value.items() if n not in TIMES} if isinstance(value, dict) else value

    return tensors, without(json.loads(facts["state"]))


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


AWP = {"name": "awp", "set": {"base": {"name": "pgd_at", "set": {"steps": 2, "rel_step_size": 0.5}}, "warmup": 0.3}}
FAST = {"name": "fast_at", "set": {"max_drop": 0.01}}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "standard-adam": ("standard", {"optimizer": "adam", "lr": 1e-3}),
    "noisy": ({"name": "noisy", "set": {"learn_sigma": True}}, {"lr": 1e-3}),
    "noisy_sampled": ("noisy_sampled", {"model": "small_cnn", "augment": True}),
    "pni-ema": ("pni", {"average": "ema", "ema_decay": 0.9}),
    "rse": ("rse", {"model": "small_cnn"}),
    "free_at-bf16": ({"name": "free_at", "set": {"replays": 2}}, {"precision": "bf16"}),
    "awp": (AWP, {}),
    "smoothadv": ("smoothadv", {"norm": "L2"}),
    "fast_at-ema": (FAST, {"lr": 0.6, "epochs": 6, "average": "ema", "schedule": "constant", "guard": False}),
    "trades-warm": ({"name": "trades", "set": {"steps": 2, "rel_step_size": 0.5}}, WARM),
    "pgd_at-best-swa": ("pgd_at", {"keep": "best", "validation": 32, "average": "swa", "swa_start": 0.2}),
    "pgd_at-best-fp16": ("pgd_at", {"keep": "best", "validation": 32, "precision": "fp16", "grad_clip": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_kill_at_any_step_changes_no_bit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defense, settings = CASES[case]
    job = job_of(defense, **settings)
    data, saves, write = data_of(job), [], checkpoint.write
    plain = run(job, data, tmp_path)
    expected, log = plain.model.net.state_dict(), log_of(tmp_path)

    def copy(path: Path, *args: Any) -> None:
        write(path, *args)
        saves.append(shutil.copy(path, tmp_path / f"save-{len(saves)}"))

    monkeypatch.setattr(checkpoint, "write", copy)
    whole = run(job, data, tmp_path, always(tmp_path / "kept" / "whole"))
    monkeypatch.setattr(checkpoint, "write", write)
    assert distance(whole.model.net.state_dict(), expected) == 0
    assert told(whole) == told(plain)
    assert log_of(tmp_path) == log
    assert len(saves) == job.epochs * (STEPS + 1)  # after each step, and after the checks of each epoch
    last = timeless(tmp_path / "kept" / "whole")
    assert {"net", "defense", "updater", "average", "detector", "best", "progress", "random"} <= set(last[1])
    for place, saved in enumerate(saves):
        path = tmp_path / "kept" / "again"
        shutil.copy(saved, path)
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write('{"epoch": 9, "ce"')  # lines of epochs that were not kept, and a torn one
        again = run(job, data, tmp_path, always(path, within=False))
        assert distance(again.model.net.state_dict(), expected) == 0
        assert (again.best is None) == (plain.best is None)
        assert again.best is None or distance(again.best, plain.best or {}) == 0
        assert told(again) == told(plain)
        assert log_of(tmp_path) == log
        assert again.metrics.resumed == 1
        tensors, rest = timeless(path)
        assert rest == last[1]
        assert [n for n in tensors if not torch.equal(tensors[n], last[0][n])] == [], f"save {place}"
    active = plain.metrics.active_steps
    if case != "fast_at-ema":
        assert all(active[name] > 0 for name in active if name != "skipped_for_overflow")
    else:
        guard = plain.metrics.defense_metrics  # it stopped and rolled back: the average began anew
        assert guard["guard_skipped_steps"] == 2 * STEPS


@pytest.mark.parametrize("case", ["pni-ema", "pgd_at-best-swa"])
def test_killed_after_every_step(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt makes one step, and the next one is killed before it made any."""
    defense, settings = CASES[case]
    job = job_of(defense, **settings)
    data, write, kills = data_of(job), checkpoint.write, 0
    plain = run(job, data, tmp_path)
    log = log_of(tmp_path)

    def bomb(*args: Any) -> None:
        nonlocal kills
        kills += 1
        if kills % 2:
            write(*args)
        raise Killed

    monkeypatch.setattr(checkpoint, "write", bomb)
    while kills < 6 * STEPS - 1:
        with pytest.raises(Killed):
            run(job, data, tmp_path, always(tmp_path / "kept" / "one"))
    monkeypatch.setattr(checkpoint, "write", write)
    done = run(job, data, tmp_path, always(tmp_path / "kept" / "one"))
    assert distance(done.model.net.state_dict(), plain.model.net.state_dict()) == 0
    assert told(done) == told(plain)
    assert log_of(tmp_path) == log
    assert done.metrics.resumed == 3 * STEPS


def test_an_epoch_goes_on_with_its_number_and_its_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, write, steps = job_of("standard"), checkpoint.write, 0
    data, kept, told_first = data_of(job), always(tmp_path / "kept" / "one"), []

    def bomb(*args: Any) -> None:
        nonlocal steps
        write(*args)
        steps += 1
        if steps == STEPS + 1 + 2:
            raise Killed

    monkeypatch.setattr(checkpoint, "write", bomb)
    with pytest.raises(Killed):
        run(job, data, tmp_path, kept)
    monkeypatch.setattr(checkpoint, "write", write)
    state = kept.read(CPU)
    assert state is not None
    state["progress"]["epoch_began"] -= 300
    kept.write(state)
    done = train(job, data, tmp_path / "train.jsonl", told_first.append, kept)
    assert 100 < done.metrics.seconds_per_epoch < 120
    earlier = told_first[0].pop("earlier")
    assert told_first[0] == {"epoch": 2, "epochs": 3, "share": (1 + 2 / STEPS) / 3}
    assert 0 < earlier < 100  # of the clock, which the change above leaves alone


def test_what_other_code_kept_or_what_is_damaged_is_not_used(tmp_path: Path) -> None:
    job = job_of("standard")
    data, path = data_of(job), tmp_path / "kept" / "one"
    plain = run(job, data, tmp_path, always(path))

    def resumed(kept: Checkpointer) -> int:
        done = run(job, data, tmp_path, kept)
        assert distance(done.model.net.state_dict(), plain.model.net.state_dict()) == 0
        assert len(log_of(tmp_path)) == 3
        return int(done.metrics.resumed)

    never = {"every": math.inf, "at_end": math.inf}
    assert resumed(Checkpointer(path, lambda: "me", **never)) == 1
    assert resumed(Checkpointer(path, lambda: "another", **never)) == 0
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 20)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert Checkpointer(path, lambda: "me").read(CPU) is None
    for size in (0, 7, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert resumed(Checkpointer(path, lambda: "me", **never)) == 0


def test_the_origin_names_job_and_images(tmp_path: Path) -> None:
    jobs = [job_of("standard"), job_of("pgd_at"), job_of("standard", lr=0.06), job_of("standard", model="small_cnn")]
    found = [origin_of(job, data_of(job)) for job in jobs]
    assert len(set(found)) == len(jobs)
    data = data_of(jobs[0])
    assert origin_of(jobs[0], data) == found[0]
    data.train.x[0, 0, 4, 4] += 1
    assert origin_of(jobs[0], data) != found[0]


def test_the_origin_names_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bench.training.resume

    job = job_of("standard")
    data, here = data_of(job), Path(bench.training.resume.__file__).parents[1]
    honest = origin_of(job, data)
    copy = tmp_path / "copy" / "bench"
    shutil.copytree(here, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(here.parent / "defenses", copy.parent / "defenses", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(bench.training.resume, "__file__", str(copy / "training" / "resume.py"))
    assert origin_of(job, data) == honest  # wherever it lies
    (copy / "progress" / "live.py").write_text("# says nothing of numbers\n")
    assert origin_of(job, data) == honest
    for name in ("training/train.py", "core/threat.py", "models/mlp.py", "planning/spec.py", "../defenses/trades.py"):
        text = (copy / name).read_text()
        (copy / name).write_text(text + "\n# another\n")
        assert origin_of(job, data) != honest
        (copy / name).write_text(text)
    assert origin_of(job, data) == honest


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = {
        "images": images,
        "part": images[:, 1:],  # neither whole nor contiguous
        "again": images,  # shares its memory
        "list": [torch.tensor(3), {"a.b": torch.zeros(0), "none": None}, True],
        "floats": [0.1 + 0.2, math.nan, -math.inf],
    }
    kept = always(tmp_path / "kept" / "one")  # through the file, which knows one order in memory only
    kept.write(state)
    back = kept.read(CPU)
    assert back is not None
    assert back["images"].stride() == images.stride()
    assert torch.equal(back["images"], images)
    assert torch.equal(back["again"], images)
    assert torch.equal(back["part"], images[:, 1:])
    assert back["list"][0].dtype == torch.int64
    assert back["list"][0].shape == ()
    assert back["list"][1]["a.b"].shape == (0,)
    assert back["list"][1]["none"] is None
    assert back["list"][2] is True
    assert back["floats"][0] == 0.1 + 0.2
    assert math.isnan(back["floats"][1])
    back["images"].zero_()
    assert bool(images.any())


def test_random_streams_go_on_where_they_stood() -> None:
    def draws() -> list[float]:
        own = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
        return [*own, float(torch.rand(()))]

    with scope(3):
        random.gauss(0, 1), np.random.randn()  # both hold a second value back
        state = random_streams(CPU)
        kept = pack(state)
        expected = draws()
    with scope(4):
        restore_streams(unpack(*kept, CPU), CPU)
        assert draws() == expected


def test_a_training_on_a_gpu_goes_on_where_fewer_gpus_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a job that Slurm puts back. torch's own functions, on generators of the CPU."""

    def visible(count: int) -> list[torch.Generator]:
        found = [torch.Generator().manual_seed(number) for number in range(count)]
        monkeypatch.setattr(torch.cuda, "default_generators", found)
        monkeypatch.setattr(torch.cuda.random, "device_count", lambda: count)
        return found

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.random, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda.random, "_lazy_call", lambda call: call())
    before = visible(8)
    streams, older = random_streams(torch.device("cuda:2")), random_streams(torch.device("cuda:0"))
    older["gpus"] += [before[number].get_state() for number in range(1, 8)]  # all of them, as was kept once
    now = visible(4)
    restore_streams(unpack(*pack(streams), CPU), torch.device("cuda:3"))
    assert torch.equal(now[3].get_state(), before[2].get_state())
    assert torch.equal(now[2].get_state(), torch.Generator().manual_seed(2).get_state())
    restore_streams(unpack(*pack(older), CPU), torch.device("cuda:1"))
    assert torch.equal(now[1].get_state(), before[0].get_state())


def test_how_often_it_is_kept(tmp_path: Path) -> None:
    kept = Checkpointer(tmp_path / "kept" / "one", lambda: "me", every=0.2, at_end=0.05, share=1.0)
    assert not kept.due(epoch_over=True)
    time.sleep(0.06)
    assert kept.due(epoch_over=True)
    assert not kept.due(epoch_over=False)
    time.sleep(0.16)
    assert kept.due(epoch_over=False)
    seconds = kept.write({"x": torch.zeros(10)})
    assert not kept.due(epoch_over=True)
    cheap = Checkpointer(tmp_path / "kept" / "one", lambda: "me", every=0.0, at_end=0.0, share=0.01)
    spent = cheap.write({"x": torch.zeros(10)})
    time.sleep(min(20 * spent, 0.5))
    assert not cheap.due(epoch_over=True)  # a hundred times what it took has not passed
    assert 0 < seconds < 5


def test_short_trainings_keep_nothing_and_do_not_ask_for_an_origin(tmp_path: Path) -> None:
    def fail() -> str:
        raise AssertionError

    job = job_of("standard")
    run(job, data_of(job), tmp_path, Checkpointer(tmp_path / "kept" / "one", fail))
    assert not (tmp_path / "kept").exists()


def test_the_guard_remembers_what_it_saw() -> None:
    data = data_of(job_of("standard"))
    silent = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(silent[1].weight)
    fresh, again = CollapseDetector(data, 0), CollapseDetector(data, 0)
    again.load_state_dict({"learned": True, "constant": 2})
    assert again.state_dict() == {"learned": True, "constant": 2}
    assert fresh.collapse(Classifier(silent), 3, 5) is None
    assert again.collapse(Classifier(silent), 3, 5) is not None  # the third time, after it had learned


def test_seconds_of_all_attempts_count_and_those_of_keeping_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of("standard")
    data, path = data_of(job), tmp_path / "kept" / "one"
    whole = run(job, data, tmp_path, always(path)).metrics
    assert whole.checkpoint_seconds > 0
    kept = Checkpointer(path, lambda: "me", every=math.inf, at_end=math.inf)
    state = kept.read(CPU)
    assert state is not None
    state["now"] += 1000
    kept.write(state)
    found = run(job, data, tmp_path, kept).metrics
    assert 1000 < found.train_seconds + found.check_seconds < 1000 + 10
    assert found.seconds_per_epoch == whole.seconds_per_epoch
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: (time.sleep(0.1), write(*args)))
    began = time.perf_counter()
    slow = run(job, data, tmp_path, always(tmp_path / "kept" / "slow")).metrics
    elapsed = time.perf_counter() - began
    assert slow.checkpoint_seconds >= 3 * STEPS * 0.1
    assert slow.train_seconds + slow.check_seconds < elapsed - 3 * STEPS * 0.1
    assert slow.seconds_per_epoch < (elapsed - 3 * STEPS * 0.1) / 3
    clock = Clock()
    clock.set(5.0)
    assert 5.0 <= clock.now() < 6.0


def test_a_training_that_cannot_be_kept_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of("standard")
    data = data_of(job)
    plain = run(job, data, tmp_path)
    (tmp_path / "file").write_text("no folder")
    done = run(job, data, tmp_path, always(tmp_path / "file" / "one"))
    assert distance(done.model.net.state_dict(), plain.model.net.state_dict()) == 0
    assert "cannot write the checkpoint" in capsys.readouterr().out


SPEC = """
data: {name: digits, test: 32, train: 800}
models: [small_cnn]
threat: {eps: 0.1}
train: {epochs: 3, lr: 0.05, batch_size: 32, average: ema, optimizer: sgd}
defenses: [pni]
attacks: [clean]
checks: 'off'
"""


def _kill(store: Store, key: str, after: float, saves: int) -> bool:
    """Start a real worker, wait until it has saved its work so often, and kill it a moment later, if it still runs."""
    path = store.folder(key) / PLACE
    seen = file_hash(path)
    process = WorkerProcess(store, key, ROOT, work_and_save_often)
    while process.alive() and saves:
        time.sleep(0.005)
        found = file_hash(path)
        seen, saves = found, saves - (found != seen)
    time.sleep(after)
    return process.kill()


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_f08_a_worker_killed_at_random_moments_trains_the_same_weights(bench: Bench) -> None:
    """F8 and F3: kills while training, half of them followed by one while the next attempt reads or starts."""
    Path("s.yaml").write_text(SPEC)
    for folder in ("whole", "killed"):
        assert bench("run", "s.yaml", "--results-dir", folder, "--executor", "debug", "--device", "cpu").code == 0
    expected, store, dice = outcomes(Path("whole")), Store(Path("killed")), random.Random(0)
    assert outcomes(Path("killed")) == expected
    key = next(job.key for job in store.jobs().values() if job.kind == "train")
    log = [{**json.loads(line), "seconds": 0} for line in (Path("whole") / key / "train.jsonl").open()]
    (store.folder(key) / "record.json").unlink()
    kills, early, resumed = 0, 0, 0
    while kills < STEP_KILLS:
        kills += _kill(store, key, dice.uniform(0, 0.1), dice.randint(1, 4))
        if kills % 2 and not store.done(key):  # it may have ended just before the kill
            early += _kill(store, key, dice.uniform(0, 0.3), 0)
        if store.done(key):  # between two kills there was time for the rest: once more from the start
            resumed += _resumed(store, key, expected[key], log)
            (store.folder(key) / "record.json").unlink()
    assert early >= 5
    assert worker.work(store.root, key, ROOT) == "done"
    resumed += _resumed(store, key, expected[key], log)
    assert resumed >= 10


def _resumed(store: Store, key: str, expected: Any, log: list[dict[str, Any]]) -> int:
    """How often the finished training was taken up, once it is found equal to the uninterrupted one."""
    assert outcomes(store.root)[key] == expected
    assert [{**json.loads(line), "seconds": 0} for line in (store.folder(key) / "train.jsonl").open()] == log
    assert not (store.folder(key) / PLACE).parent.exists()
    record = store.record(key)
    assert record is not None
    return int(record.metrics.resumed)
