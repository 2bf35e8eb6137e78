"""The local executor under injected faults, with workers that need no torch: who is hurt, what is recorded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM, Signals
from typing import Any

import fake_jobs
import pytest
from fake_jobs import evaluate, kinds, measured, order, says, starts, train
from harness import alive
from paths import ROOT, TESTS
from rich.console import Console

from bench.executors.base import Event
from bench.executors.devices import Slot
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.planning.job import Job
from bench.progress.live import View, title
from bench.records.record import JobError, PeakMemory, Provenance, Record, TrainMetrics
from bench.records.store import Store

CPU = Slot("cpu")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    return made


def run(store: Store, jobs: list[Job], slots: int = 2, **how: Any) -> list[Event]:
    return list(drive(Local(store.root.parent, [CPU] * slots, work=fake_jobs.work, **how), jobs, store))


def record(store: Store, job: Job) -> Record:
    found = store.record(job.key)
    assert found is not None
    return found


def ending(events: list[Event], job: Job) -> str:
    return kinds(events, job)[-1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_order_is_by_records_of_the_device(store: Store, device: str) -> None:
    for name, taken in (("trades", {"CPU x": 1000.0, "GPU y": 1.0}), ("rat", {"CPU x": 100.0, "GPU y": 5000.0})):
        for seed, (where, seconds) in enumerate(taken.items()):
            past = train(seed, defense=name)
            store.add(past)
            store.put(past, Record("done", TrainMetrics(train_seconds=seconds), provenance=Provenance(device=where)))
    trades, rat = train(7, defense="trades"), train(7, defense="rat")
    where = [Slot(device, (("CUDA_VISIBLE_DEVICES", "0"),) if device == "cuda" else ())]
    events = list(drive(Local(store.root.parent, where, work=fake_jobs.work), [rat, trades], store))
    assert order(events) == ([trades.key, rat.key] if device == "cpu" else [rat.key, trades.key])


def test_jobs_start_longest_first_by_what_like_jobs_took(store: Store, tmp_path: Path) -> None:
    past = train(9, images=100)
    measured(store, past, 10.0)
    measured(store, evaluate(past), 2.0)
    jobs = [train(0, 100), train(1, 300), train(2, 200)]
    jobs += [evaluate(jobs[0], 5000)]  # 100 s, which makes its training the most urgent
    events = run(store, jobs, slots=1)
    assert order(events) == [jobs[0].key, jobs[3].key, jobs[1].key, jobs[2].key]
    assert [event.kind for event in run(store, jobs)] == ["skipped"] * 4


def test_the_lines_of_equal_runs_are_equal_once_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which job starts next follows measured seconds, so that only the order of the lines may differ."""
    jobs = [train(0), train(1), train(2)]
    jobs += [evaluate(jobs[0]), evaluate(jobs[2])]
    says(tmp_path, jobs[1], "raise")
    shown = []
    for slots in (1, 2):
        again = Store(tmp_path / str(slots))
        again.prepare()
        View(Console(width=120), again, jobs, "plain", slots).follow(
            iter([event for event in run(again, jobs, slots) if event.kind != "tick"])
        )
        shown.append(capsys.readouterr().out.splitlines())
    assert shown[0] != shown[1]
    assert sorted(shown[0]) == sorted(shown[1])
    numbers = [f"#{number} {title(job, {job.key: job for job in jobs})}" for number, job in enumerate(jobs, start=1)]
    assert [sum(number in line for line in shown[0]) for number in numbers] == [2] * 5


def test_a_worker_that_dies_is_tried_three_times_and_hurts_nobody(store: Store, tmp_path: Path) -> None:
    jobs = [train(seed) for seed in range(6)]
    says(tmp_path, jobs[0], "kill", "ok")
    says(tmp_path, jobs[1], "kill")
    events = run(store, jobs)
    assert kinds(events, jobs[0]) == ["started", "retried", "started", "ok"]
    assert kinds(events, jobs[1]) == ["started", "retried"] * 2 + ["started", "error"]
    assert all(kinds(events, job) == ["started", "ok"] for job in jobs[2:])
    died = JobError("WorkerDied", "the worker died (SIGKILL) without a record")
    told = [(each.step, each.type) for each in record(store, jobs[0]).retries]
    assert told == [("again", "WorkerDied")]
    assert record(store, jobs[1]).error == died
    assert len(record(store, jobs[1]).retries) == 2
    assert record(store, jobs[2]).retries == ()


def test_retries_outlive_a_driver(store: Store, tmp_path: Path) -> None:
    job = train(0)
    says(tmp_path, job, "kill", "deaf")
    events = drive(Local(tmp_path, [CPU], work=fake_jobs.work, polite=0.0), [job], store)
    while len(starts(tmp_path, job)) < 2:
        next(events)
    events.close()  # type: ignore[attr-defined]
    says(tmp_path, job, "kill")
    assert kinds(run(store, [job]), job) == ["started", "retried", "started", "error"]
    assert [len(start["before"]) for start in starts(tmp_path, job)] == [0, 1, 1, 2]
    assert len(record(store, job).retries) == 2
    assert not (store.folder(job.key) / "attempts.json").exists()


def test_what_raises_is_not_tried_again(store: Store, tmp_path: Path) -> None:
    trained = train(0)
    judged, other = evaluate(trained), train(1)
    says(tmp_path, trained, "raise")
    events = run(store, [trained, judged, other])
    assert kinds(events, trained) == ["started", "error"]
    assert kinds(events, judged) == ["blocked"]
    assert kinds(events, other) == ["started", "ok"]


def test_a_job_over_its_limit_is_killed_with_all_it_started(store: Store, tmp_path: Path) -> None:
    hang, family, fine = train(0), train(1), train(2)
    says(tmp_path, hang, "deaf")
    says(tmp_path, family, "family")
    began = time.monotonic()
    events = run(store, [hang, family, fine], slots=3, time_limit=3.0)
    for job in (hang, family):
        assert kinds(events, job) == ["started", "error"]
        assert record(store, job).state == "timeout"
        assert record(store, job).error.message == "killed at the time limit of 3 s, with all its processes"
        assert record(store, job).peak_memory_mb.rss > 1
        assert not alive(starts(tmp_path, job)[0]["pid"])
    assert not alive(int((tmp_path / f"{family.key}.child").read_text()))
    assert ending(events, fine) == "ok"
    assert 3.0 <= time.monotonic() - began < 6.0
    assert starts(tmp_path, hang)[0]["before"] == []
    says(tmp_path, hang, "ok", "ok")
    assert kinds(run(store, [hang]), hang) == ["started", "ok"]  # the same command tries it again


def test_an_evaluation_without_memory_runs_alone_and_then_in_smaller_passes(store: Store, tmp_path: Path) -> None:
    trained, others = train(0), [train(seed) for seed in range(1, 4)]
    large, hopeless = evaluate(trained, 100), evaluate(trained, 200)
    says(tmp_path, large, "oom", "oom", "oom", "ok")
    says(tmp_path, hopeless, "oom")
    events = run(store, [trained, large, hopeless, *others], slots=1)
    assert kinds(events, large) == ["started", "retried"] * 3 + ["started", "ok"]
    assert [each.step for each in record(store, large).retries] == ["halve"] * 3
    assert record(store, large).retries[0].peak_memory_mb == PeakMemory(rss=50.0)
    assert kinds(events, hopeless) == ["started", "retried"] * 3 + ["started", "error"]
    assert record(store, hopeless).state == "oom"
    assert record(store, hopeless).peak_memory_mb.rss == 50.0
    assert all(ending(events, job) == "ok" for job in others)


def test_a_training_without_memory_is_never_made_another_one(store: Store, tmp_path: Path) -> None:
    trained = train(0)
    judged = evaluate(trained)
    says(tmp_path, trained, "oom")
    events = run(store, [trained, judged], slots=1)
    assert kinds(events, trained) == ["started", "error"]
    assert record(store, trained).state == "oom"
    assert [event.message for event in events if event.job == judged] == [f"training {trained.key} ended as oom"]


def test_after_sharing_a_machine_a_job_without_memory_has_it_alone(store: Store, tmp_path: Path) -> None:
    greedy, others = train(0), [train(seed) for seed in range(1, 6)]
    says(tmp_path, greedy, "oom 0.3", "ok 0.5")
    for job in others:
        says(tmp_path, job, "ok 0.4")
    running, beside = set[str](), list[set[str]]()
    for event in drive(Local(tmp_path, [CPU] * 2, work=fake_jobs.work), [greedy, *others], store):
        if event.job and event.kind == "started":
            running.add(event.job.key)
            if greedy.key in running:
                beside.append(set(running))
        elif event.job:
            running.discard(event.job.key)
    assert beside[0] == {greedy.key}
    assert beside[-1] == {greedy.key}  # nobody came while it ran again
    assert len(beside) == 3
    assert [each.step for each in record(store, greedy).retries] == ["alone"]


def test_a_kill_by_the_kernel_counts_as_out_of_memory(store: Store, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.touch()
    trained, other = train(0), train(1)
    judged = evaluate(trained)
    says(tmp_path, judged, "host", "ok")
    says(tmp_path, other, "kill")
    events = run(store, [trained, judged, other], slots=1, memory_kills=lambda: len(kernel.read_text()))
    assert kinds(events, judged) == ["started", "retried", "started", "ok"]
    assert [(each.step, each.type) for each in record(store, judged).retries] == [("halve", "KilledForMemory")]
    assert record(store, other).error.type == "WorkerDied"


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import fake_jobs
from bench.executors.devices import Slot
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.records.store import Store
import signal
def stop(number, frame):
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, stop)
if __name__ == "__main__":
    root = Path({root!r})
    jobs = [fake_jobs.train(seed) for seed in range(4)]
    try:
        for event in drive(Local(root, [Slot("cpu")] * 3, work=fake_jobs.work), jobs, Store(root / "results")):
            pass
    except KeyboardInterrupt:
        raise SystemExit(130)
"""
Driver = tuple[subprocess.Popen[str], list[Job]]


@pytest.fixture
def driver(store: Store, tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """A driver in a process of its own, with three jobs running and one waiting."""
    made: list[subprocess.Popen[str]] = []

    def begin(*acts: str) -> Driver:
        jobs = [train(seed) for seed in range(4)]
        for job, act in zip(jobs, acts, strict=False):
            says(tmp_path, job, act)
        script = tmp_path / "driver.py"
        script.write_text(DRIVER.format(tests=str(TESTS), root=str(tmp_path)))
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        made.append(process)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(starts(tmp_path, job) for job in jobs[:3]):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        return process, jobs

    yield begin
    for process in made:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("number", "code"), [(SIGINT, 130), (SIGTERM, 143)])
def test_one_signal_lets_jobs_save_and_starts_no_other(
    driver: Callable[..., Driver], store: Store, tmp_path: Path, number: Signals, code: int
) -> None:
    process, jobs = driver("polite", "sleep", "ok 1.5", "ok")
    began = time.monotonic()
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == code
    assert "stopping: 3 jobs may save for 10 s" in told
    assert "Traceback" not in told
    assert (tmp_path / f"{jobs[0].key}.saved").read_text() == "saved"
    assert starts(tmp_path, jobs[3]) == []
    assert [store.record(job.key) for job in jobs[:2]] == [None, None]
    assert not any(alive(starts(tmp_path, job)[0]["pid"]) for job in jobs[:3])


def test_a_second_signal_ends_it_at_once(driver: Callable[..., Driver], tmp_path: Path) -> None:
    process, jobs = driver("deaf", "deaf", "family")
    process.send_signal(SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # deaf jobs have their ten seconds
    began = time.monotonic()
    process.send_signal(SIGINT)
    process.communicate(timeout=30)
    assert time.monotonic() - began < 2.0
    assert process.returncode == 130
    assert not any(alive(starts(tmp_path, job)[0]["pid"]) for job in jobs[:3])


def test_jobs_that_do_not_stop_are_killed_in_time(driver: Callable[..., Driver], tmp_path: Path) -> None:
    process, jobs = driver("deaf", "sleep", "polite")
    began = time.monotonic()
    process.send_signal(SIGTERM)
    process.communicate(timeout=30)
    assert 9.5 <= time.monotonic() - began < 14.0  # a cluster waits for 30 s
    assert process.returncode == 143
    assert not any(alive(starts(tmp_path, job)[0]["pid"]) for job in jobs[:3])


def test_workers_end_with_a_driver_that_is_killed(driver: Callable[..., Driver], tmp_path: Path) -> None:
    process, jobs = driver("sleep", "deaf", "polite")
    process.send_signal(SIGKILL)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    pids = [starts(tmp_path, job)[0]["pid"] for job in jobs[:3]]
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
