"""Whoever does a job holds its lease: `bench worker` typed twice, beside a driver, after a kill, out of memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import toy_job
from harness import Bench, alive, outcomes, states, tiny, write_plugins

from bench.jobs import attempt as attempts
from bench.jobs import worker
from bench.jobs.attempt import HELD, attempt, forget, next_attempt, tried
from bench.jobs.retries import Fault
from bench.records import leases
from bench.records.attempts import RETRIES
from bench.records.leases import STALE, claim, holder_of, this_machine
from bench.records.record import JobError, Record, Retry
from bench.records.store import Store

TRAIN = toy_job("train", {"seed": 0})
EVALUATE = toy_job("evaluate", {"n": 1}, (TRAIN.key,))
NO_MEMORY = Record("oom", error=JobError("OutOfMemoryError", "no room"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    for job in (TRAIN, EVALUATE):
        made.add(job)
    return made


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch, store: Store) -> list[tuple[str, list[dict[str, Any]]]]:
    """Each call of the worker, and that it held the lease; the job ends as done."""
    seen: list[tuple[str, list[dict[str, Any]]]] = []

    def work(results: Path, key: str, root: Path, device: str, workers: int, before: list[Retry]) -> str:
        holder = holder_of(store, key)
        assert holder is not None
        assert holder.pid == os.getpid()
        seen.append((key, list(before)))
        store.put(store.job(key), Record("done"))
        return "done"

    monkeypatch.setattr(worker, "work", work)
    return seen


def test_a_job_is_done_under_its_lease_once(store: Store, works: list[Any]) -> None:
    assert attempt(store.root, TRAIN.key, Path()) == "done"
    assert works == [(TRAIN.key, [])]
    assert holder_of(store, TRAIN.key) is None
    assert attempt(store.root, TRAIN.key, Path()) == "over"
    assert len(works) == 1
    store.put(TRAIN, Record("error"))  # does not stand
    assert attempt(store.root, TRAIN.key, Path()) == "done"
    assert store.record(TRAIN.key).failures == 1
    assert sorted(path.name for path in store.folder(TRAIN.key).iterdir()) == [
        "attempts.json",
        "job.json",
        "record.json",
    ]


def test_what_a_process_of_this_machine_does_is_left_alone_at_once(store: Store, works: list[Any]) -> None:
    theirs = claim(store, TRAIN.key)
    assert theirs is not None
    began = time.monotonic()
    assert attempt(store.root, TRAIN.key, Path()) == "held"
    assert time.monotonic() - began < 0.9
    assert works == []
    theirs.release()
    assert attempt(store.root, TRAIN.key, Path()) == "done"


def elsewhere(store: Store, age: float) -> Path:
    """A lease of another machine, silent for so long."""
    path = store.folder(TRAIN.key) / "lease-000003.json"
    path.write_text(json.dumps({"token": "t", "machine": "another", "pid": 1, "began": "1"}))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_heartbeat_from_another_machine_means_held(
    store: Store, works: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "POLL", 0.05)
    path = elsewhere(store, 10)
    threading.Timer(0.4, lambda: os.utime(path)).start()
    assert attempt(store.root, TRAIN.key, Path()) == "held"
    assert works == []


def test_silence_from_another_machine_is_waited_out(
    store: Store, works: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that Slurm starts anew elsewhere, while the lease of its killed process still looks alive."""
    monkeypatch.setattr(attempts, "POLL", 0.05)
    elsewhere(store, STALE - 1)
    began = time.monotonic()
    assert attempt(store.root, TRAIN.key, Path()) == "done"
    assert 0.5 < time.monotonic() - began < 10
    assert len(works) == 1


@pytest.mark.parametrize(
    ("cpus", "device", "workers"),
    [(None, "cpu", 1), ("2", "cpu", 4), ("8", "cpu", 1), ("16", "cpu", 1), ("2", "cuda", 1)],
)
def test_a_node_of_slurm_s_that_others_may_use_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch, cpus: str | None, device: str, workers: int
) -> None:
    """Times that were taken there are not comparable."""
    seen: list[int] = []

    def work(results: Path, key: str, root: Path, device: str, workers: int, before: list[Retry]) -> str:
        seen.append(workers)
        store.put(store.job(key), Record("done"))
        return "done"

    monkeypatch.setattr(worker, "work", work)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    if cpus:
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", cpus)
    attempt(store.root, TRAIN.key, Path(), device)
    assert seen == [workers]


def test_the_lease_is_given_back_whatever_happens(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*rest: object) -> str:
        raise SystemExit(143)

    monkeypatch.setattr(worker, "work", stopped)
    with pytest.raises(SystemExit):
        attempt(store.root, TRAIN.key, Path())
    assert holder_of(store, TRAIN.key) is None


def _out_of_memory(store: Store, times: int, seen: list[list[dict[str, Any]]]) -> Callable[..., str]:
    def work(results: Path, key: str, root: Path, device: str, workers: int, before: list[Retry]) -> str:
        seen.append([entry.step for entry in before])
        assert store.record(key) is None
        record = NO_MEMORY if len(seen) <= times else Record("done")
        store.put(store.job(key), replace(record, retries=tuple(before)))
        return record.state

    return work


@pytest.mark.parametrize(("times", "state"), [(0, "done"), (1, "done"), (3, "done"), (4, "oom"), (9, "oom")])
def test_an_evaluation_out_of_memory_is_done_with_half_the_batch(
    store: Store, monkeypatch: pytest.MonkeyPatch, times: int, state: str
) -> None:
    seen: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(worker, "work", _out_of_memory(store, times, seen))
    assert attempt(store.root, EVALUATE.key, Path()) == state
    assert seen == [["halve"] * n for n in range(min(times, 3) + 1)]
    assert [entry.type for entry in store.record(EVALUATE.key).retries] == (["OutOfMemoryError"] * min(times, 3))
    assert not (store.folder(EVALUATE.key) / RETRIES).exists()


def test_a_training_out_of_memory_is_not_another_training(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(worker, "work", _out_of_memory(store, 9, seen))
    assert attempt(store.root, TRAIN.key, Path()) == "oom"
    assert seen == [[]]


def test_what_was_tried_outlives_the_process(store: Store, works: list[Any]) -> None:
    killed = Fault("oom", "KilledForMemory", "Slurm says OUT_OF_MEMORY")
    assert next_attempt(store, EVALUATE, killed, ()) is None
    assert tried(store, EVALUATE.key) == []
    assert next_attempt(store, EVALUATE, killed, ("halve",)) == "halve"
    before = [Retry("halve", "KilledForMemory", "Slurm says OUT_OF_MEMORY")]
    assert tried(store, EVALUATE.key) == before
    assert attempt(store.root, EVALUATE.key, Path()) == "done"
    assert works == [(EVALUATE.key, before)]
    assert tried(store, EVALUATE.key) == []
    for text in ("", "{", "3", '{"a": 1}', "[3]"):
        (store.folder(EVALUATE.key) / RETRIES).write_text(text)
        assert tried(store, EVALUATE.key) == []
    forget(store, EVALUATE.key)
    forget(store, EVALUATE.key)


@pytest.fixture
def sleeping(bench: Bench, tmp_path: Path) -> Iterator[tuple[Store, str, list[str], subprocess.Popen[str]]]:
    """A training that sleeps, under `bench worker`: store, key, the command, and its process."""
    plugins = [str(word) for word in write_plugins(tmp_path)]
    (tmp_path / "fragile.todo").write_text("raise")
    assert bench(*tiny(*plugins, "--workers", 1, defense="fragile", attack="clean")).code == 1
    store = Store(tmp_path / "results")
    key = next(job.key for job in store.jobs().values() if job.kind == "train")
    (tmp_path / "fragile.todo").write_text("sleep")
    command = [sys.executable, "-m", "bench", "worker", key, *plugins]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(lambda: holder_of(store, key) is not None and store.progress(key))
    yield store, key, command, process
    process.kill()
    process.wait()


def until(what: Callable[[], Any]) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < 60
        time.sleep(0.05)


def again(command: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=60)


def test_the_same_worker_typed_twice_works_once(
    sleeping: tuple[Store, str, list[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    store, key, command, process = sleeping
    second = again(command, "--over-is-done")
    assert (second.returncode, second.stderr) == (HELD, "")
    assert second.stdout == f"{key} is held: another process runs it; nothing was done\n"
    assert alive(process.pid)
    (tmp_path / "fragile.todo").unlink()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, f"{key} done\n", "")
    over = again(command)
    assert (over.returncode, over.stderr) == (HELD, "")
    assert over.stdout == f"{key} is over: it has a valid record; nothing was done\n"
    assert again(command, "--over-is-done").returncode == 0  # for those who wait for it
    assert (store.folder(key) / "log.txt").read_text().count("train ") == 2  # the one that raised, and this


@pytest.mark.slow
def test_a_local_driver_waits_for_a_worker_and_takes_over_what_it_left(
    sleeping: tuple[Store, str, list[str], subprocess.Popen[str]], bench: Bench, tmp_path: Path
) -> None:
    store, key, command, process = sleeping
    words = [str(word) for word in tiny(*command[5:], "--workers", 1, defense="fragile", attack="clean")]
    driver = subprocess.Popen(
        [sys.executable, "-m", "bench", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        time.sleep(4)
        assert (store.folder(key) / "log.txt").read_text().count("train ") == 2
        (tmp_path / "fragile.todo").unlink()
        process.send_signal(signal.SIGKILL)
        out, _ = driver.communicate(timeout=90)
    finally:
        driver.kill()
    assert driver.returncode == 0, out
    assert states(store.root) == {"fragile": "done", "fragile/clean": "done"}
    assert (store.folder(key) / "log.txt").read_text().count("train ") == 3
    assert len(outcomes(store.root)) == 2


@pytest.mark.slow
def test_a_worker_whose_job_was_taken_over_ends_at_once(
    sleeping: tuple[Store, str, list[str], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was silent for a minute (a laptop that slept, a file server that was away) and another one began."""
    store, key, _, process = sleeping
    holder = holder_of(store, key)
    assert holder is not None
    process.send_signal(signal.SIGSTOP)
    os.utime(holder.path, (time.time() - STALE - 1,) * 2)
    taken = claim(store, key)
    assert taken is not None
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=leases.BEAT + 30)
    assert process.returncode == HELD
    assert "another process took this job over" in err
    assert taken.beat()
    taken.release()


def test_this_machine_is_always_the_same() -> None:
    assert this_machine() == this_machine() != ""
