"""A killed training resumes from its checkpoint, and ends bit for bit like an uninterrupted one."""

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
from small_training import ROOT, data_of, log_of, run, training_job
from torch import Tensor, nn
from worker_process import WorkerProcess, work_and_save_often

from bench.atomic import file_hash
from bench.core.classifier import Classifier
from bench.core.rng import scope
from bench.jobs import worker
from bench.planning.job import TrainJob
from bench.records.store import Store
from bench.training import checkpoint
from bench.training.divergence import CollapseDetector
from bench.training.resume import PLACE, Checkpointer, Clock, origin_of, pack, random_streams, restore_streams, unpack
from bench.training.train import Trained, train

CPU = torch.device("cpu")
WARM = {"schedule": "one_cycle", "eps_warmup": 0.4, "lr_warmup": 0.3, "label_smoothing": 0.1, "grad_clip": 0.1}
STEPS = 4  # in an epoch
STEP_KILLS = 20  # docs/reliability.md shows it
TIMES = {"now", "epoch_seconds", "checkpoint_seconds", "check_seconds", "epoch_began", "resumed", "lines"}
pytestmark = pytest.mark.usefixtures("fresh_catalog")


class Killed(Exception):
    """Stands for a kill between two steps."""


def job_of(defense: Any, validation: int = 0, **settings: Any) -> TrainJob:
    train = 16 * STEPS + validation
    return training_job(defense, train=train, validation=validation, **{"epochs": 3, **settings})


def always(path: Path, *, within: bool = True) -> Checkpointer:
    """At every step, or at the end of every epoch."""
    return Checkpointer(path, lambda: "me", every=0.0 if within else math.inf, at_end=0.0, share=math.inf)


def metrics_without_times(done: Trained) -> dict[str, Any]:
    times = {"train_seconds", "check_seconds", "checkpoint_seconds", "seconds_per_epoch", "inference_ms_per_image"}
    return {name: value for name, value in vars(done.metrics).items() if name not in {*times, "resumed"}}


def timeless(path: Path) -> tuple[dict[str, Tensor], Any]:
    """The content of a checkpoint, without times and counts of attempts."""
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
    "rat_sampled": ({"name": "rat_sampled", "set": {"steps": 2, "rel_step_size": 0.5, "noise_on": "network"}}, {}),
    "rse": ("rse", {"model": "small_cnn"}),
    "free_at-bf16": ({"name": "free_at", "set": {"replays": 2}}, {"precision": "bf16"}),
    "fast_at-bf16": (
        {"name": "fast_at", "set": {"variant": "n_fgsm"}},
        {"model": "preact_resnet18", "precision": "bf16"},
    ),
    "awp": (AWP, {}),
    "smoothadv": ("smoothadv", {"norm": "L2"}),
    "fast_at-ema": (FAST, {"lr": 0.6, "epochs": 6, "average": "ema", "schedule": "constant", "guard": False}),
    "trades-warm": ({"name": "trades", "set": {"steps": 2, "rel_step_size": 0.5}}, WARM),
    "fgsm_pgi-warm": ("fgsm_pgi", WARM),
    "nuat": ("nuat", {}),
    "pgd_at-best-swa": ("pgd_at", {"keep": "best", "validation": 32, "average": "swa", "swa_start": 0.2}),
    "pgd_at-best-fp16": ("pgd_at", {"keep": "best", "validation": 32, "precision": "fp16", "grad_clip": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_resuming_from_any_step_is_bit_identical(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defense, settings = CASES[case]
    job = job_of(defense, **settings)
    data, saves, write = data_of(job), [], checkpoint.write
    plain = run(job, data, tmp_path)
    expected, log = plain.model.net.state_dict(), log_of(tmp_path)

    def copy(path: Path, *args: Any) -> None:
        write(path, *args)
        saves.append(shutil.copy(path, tmp_path / f"save-{len(saves)}"))

    monkeypatch.setattr(checkpoint, "write", copy)
    whole = run(job, data, tmp_path, always(tmp_path / "checkpoints" / "whole"))
    monkeypatch.setattr(checkpoint, "write", write)
    assert distance(whole.model.net.state_dict(), expected) == 0
    assert metrics_without_times(whole) == metrics_without_times(plain)
    assert log_of(tmp_path) == log
    assert len(saves) == job.epochs * (STEPS + 1)  # after each step, and after the checks of each epoch
    last = timeless(tmp_path / "checkpoints" / "whole")
    assert {"net", "defense", "updater", "average", "detector", "best", "progress", "random"} <= set(last[1])
    for place, saved in enumerate(saves):
        path = tmp_path / "checkpoints" / "again"
        shutil.copy(saved, path)
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write('{"epoch": 9, "ce"')  # a torn line of an epoch after the checkpoint
        again = run(job, data, tmp_path, always(path, within=False))
        assert distance(again.model.net.state_dict(), expected) == 0
        assert (again.best is None) == (plain.best is None)
        assert again.best is None or distance(again.best, plain.best or {}) == 0
        assert metrics_without_times(again) == metrics_without_times(plain)
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
def test_kills_after_every_step_are_bit_identical(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
            run(job, data, tmp_path, always(tmp_path / "checkpoints" / "one"))
    monkeypatch.setattr(checkpoint, "write", write)
    done = run(job, data, tmp_path, always(tmp_path / "checkpoints" / "one"))
    assert distance(done.model.net.state_dict(), plain.model.net.state_dict()) == 0
    assert metrics_without_times(done) == metrics_without_times(plain)
    assert log_of(tmp_path) == log
    assert done.metrics.resumed == 3 * STEPS


def test_a_resumed_epoch_continues_its_number_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, write, steps = job_of("standard"), checkpoint.write, 0
    data, checkpointer, reports = data_of(job), always(tmp_path / "checkpoints" / "one"), []

    def bomb(*args: Any) -> None:
        nonlocal steps
        write(*args)
        steps += 1
        if steps == STEPS + 1 + 2:
            raise Killed

    monkeypatch.setattr(checkpoint, "write", bomb)
    with pytest.raises(Killed):
        run(job, data, tmp_path, checkpointer)
    monkeypatch.setattr(checkpoint, "write", write)
    state = checkpointer.read(CPU)
    assert state is not None
    state["progress"]["epoch_began"] -= 300
    checkpointer.write(state)
    done = train(job, data, tmp_path / "train.jsonl", reports.append, checkpointer)
    assert 100 < done.metrics.seconds_per_epoch < 120
    earlier = reports[0].pop("earlier")
    assert reports[0] == {"epoch": 2, "epochs": 3, "step": 2, "steps": STEPS, "share": (1 + 2 / STEPS) / 3}
    assert 0 < earlier < 100  # of the clock, which the change above leaves alone


def test_checkpoints_that_are_damaged_or_of_other_code_are_ignored(tmp_path: Path) -> None:
    job = job_of("standard")
    data, path = data_of(job), tmp_path / "checkpoints" / "one"
    plain = run(job, data, tmp_path, always(path))

    def resumed(checkpointer: Checkpointer) -> int:
        done = run(job, data, tmp_path, checkpointer)
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


def test_the_origin_depends_on_job_and_images(tmp_path: Path) -> None:
    jobs = [job_of("standard"), job_of("pgd_at"), job_of("standard", lr=0.06), job_of("standard", model="small_cnn")]
    found = [origin_of(job, data_of(job)) for job in jobs]
    assert len(set(found)) == len(jobs)
    data = data_of(jobs[0])
    assert origin_of(jobs[0], data) == found[0]
    data.train.x[0, 0, 4, 4] += 1
    assert origin_of(jobs[0], data) != found[0]


def test_the_origin_depends_on_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_state_is_restored_from_its_file(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = {
        "images": images,
        "part": images[:, 1:],  # neither whole nor contiguous
        "again": images,  # shares its memory
        "list": [torch.tensor(3), {"a.b": torch.zeros(0), "none": None}, True],
        "floats": [0.1 + 0.2, math.nan, -math.inf],
    }
    checkpointer = always(tmp_path / "checkpoints" / "one")  # the file stores contiguous tensors only
    checkpointer.write(state)
    back = checkpointer.read(CPU)
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


def test_random_streams_continue() -> None:
    def draws() -> list[float]:
        own = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
        return [*own, float(torch.rand(()))]

    with scope(3):
        random.gauss(0, 1), np.random.randn()  # both hold a second value back
        state = random_streams(CPU)
        packed = pack(state)
        expected = draws()
    with scope(4):
        restore_streams(unpack(*packed, CPU), CPU)
        assert draws() == expected


def test_a_training_on_a_gpu_resumes_where_fewer_gpus_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
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
    streams = random_streams(torch.device("cuda:2"))
    now = visible(4)
    restore_streams(unpack(*pack(streams), CPU), torch.device("cuda:3"))
    assert torch.equal(now[3].get_state(), before[2].get_state())
    assert torch.equal(now[2].get_state(), torch.Generator().manual_seed(2).get_state())


def test_how_often_a_checkpoint_is_due(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "checkpoints" / "one", lambda: "me", every=0.2, at_end=0.05, share=1.0)
    assert not checkpointer.due(epoch_over=True)
    time.sleep(0.06)
    assert checkpointer.due(epoch_over=True)
    assert not checkpointer.due(epoch_over=False)
    time.sleep(0.16)
    assert checkpointer.due(epoch_over=False)
    seconds = checkpointer.write({"x": torch.zeros(10)})
    assert not checkpointer.due(epoch_over=True)
    cheap = Checkpointer(tmp_path / "checkpoints" / "one", lambda: "me", every=0.0, at_end=0.0, share=0.01)
    spent = cheap.write({"x": torch.zeros(10)})
    time.sleep(min(20 * spent, 0.5))
    assert not cheap.due(epoch_over=True)  # a hundred times what it took has not passed
    assert 0 < seconds < 5


def test_short_trainings_write_no_checkpoint_and_compute_no_origin(tmp_path: Path) -> None:
    def fail() -> str:
        raise AssertionError

    job = job_of("standard")
    run(job, data_of(job), tmp_path, Checkpointer(tmp_path / "checkpoints" / "one", fail))
    assert not (tmp_path / "checkpoints").exists()


def test_the_collapse_detector_restores_its_state() -> None:
    data = data_of(job_of("standard"))
    silent = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(silent[1].weight)
    fresh, again = CollapseDetector(data, 0), CollapseDetector(data, 0)
    again.load_state_dict({"learned": True, "constant": 2})
    assert again.state_dict() == {"learned": True, "constant": 2}
    assert fresh.collapse(Classifier(silent), 3, 5) is None
    assert again.collapse(Classifier(silent), 3, 5) is not None  # the third time, after it had learned


def test_train_seconds_sum_all_attempts_without_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of("standard")
    data, path = data_of(job), tmp_path / "checkpoints" / "one"
    whole = run(job, data, tmp_path, always(path)).metrics
    assert whole.checkpoint_seconds > 0
    checkpointer = Checkpointer(path, lambda: "me", every=math.inf, at_end=math.inf)
    state = checkpointer.read(CPU)
    assert state is not None
    state["now"] += 1000
    checkpointer.write(state)
    found = run(job, data, tmp_path, checkpointer).metrics
    assert 1000 < found.train_seconds + found.check_seconds < 1000 + 10
    assert found.seconds_per_epoch == whole.seconds_per_epoch
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: (time.sleep(0.1), write(*args)))
    began = time.perf_counter()
    slow = run(job, data, tmp_path, always(tmp_path / "checkpoints" / "slow")).metrics
    elapsed = time.perf_counter() - began
    assert slow.checkpoint_seconds >= 3 * STEPS * 0.1
    assert slow.train_seconds + slow.check_seconds < elapsed - 3 * STEPS * 0.1
    assert slow.seconds_per_epoch < (elapsed - 3 * STEPS * 0.1) / 3
    clock = Clock()
    clock.set(5.0)
    assert 5.0 <= clock.now() < 6.0


def test_a_training_continues_without_a_writable_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
