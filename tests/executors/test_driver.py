"""Executors: what has to run, what is blocked, the slots, and the same events and records whoever runs the jobs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from factories import toy_job
from harness import outcomes, write_plugins

from bench.atomic import file_hash
from bench.executors.base import Event, blocker, ended, todo
from bench.executors.debug import Debug
from bench.executors.devices import Slot
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.planning.job import Job
from bench.planning.plan import plan
from bench.planning.spec import build
from bench.records.record import JobError, Record
from bench.records.store import Store, weights_file

TRAIN = toy_job("train", {"seed": 0})
FIRST, SECOND = (toy_job("evaluate", {"n": n}, (TRAIN.key,)) for n in (1, 2))
JOBS = [TRAIN, FIRST, SECOND]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    for job in JOBS:
        made.add(job)
    return made


def finish(store: Store, job: Job, state: str = "done") -> None:
    """A record as a worker leaves it, with weights where there are any."""
    files = {}
    if job.kind == "train" and state == "done":
        (store.folder(job.key) / weights_file("last")).write_bytes(b"weights")
        files = {weights_file("last"): file_hash(store.folder(job.key) / weights_file("last"))}
    error = JobError("ValueError", "why") if state in ("error", "diverged") else None
    store.put(job, Record(state, files=files, error=error))


def test_everything_runs_at_first_and_nothing_in_the_end(store: Store) -> None:
    assert todo(JOBS, store) == JOBS
    finish(store, TRAIN)
    assert todo(JOBS, store) == [FIRST, SECOND]
    finish(store, FIRST)
    finish(store, SECOND, "unsupported")
    assert todo(JOBS, store) == []


def test_an_error_is_tried_again_and_a_divergence_is_not(store: Store) -> None:
    finish(store, TRAIN, "error")
    assert TRAIN in todo(JOBS, store)
    finish(store, TRAIN, "diverged")
    assert TRAIN not in todo(JOBS, store)


@pytest.mark.parametrize("damage", [None, b"", b"weightS"])
def test_lost_weights_are_trained_again_where_an_evaluation_needs_them(store: Store, damage: bytes | None) -> None:
    finish(store, TRAIN)
    finish(store, FIRST)
    weights = store.folder(TRAIN.key) / weights_file("last")
    weights.unlink()
    if damage is not None:
        weights.write_bytes(damage)
    assert todo([TRAIN, FIRST], store) == []
    assert todo(JOBS, store) == [TRAIN, SECOND]
    finish(store, SECOND)
    assert todo(JOBS, store) == []


@pytest.mark.parametrize("state", ["error", "diverged"])
def test_what_needs_a_failed_training_is_blocked(store: Store, state: str) -> None:
    assert blocker(FIRST, store, set()) is None
    finish(store, TRAIN, state)
    assert blocker(FIRST, store, set()) == f"training {TRAIN.key} ended as {state}"
    assert blocker(FIRST, store, {TRAIN.key}) is None  # it runs again
    finish(store, TRAIN)
    assert blocker(FIRST, store, set()) is None


def test_events_say_how_a_job_ended(store: Store) -> None:
    assert ended(TRAIN, store) is None
    finish(store, TRAIN)
    assert ended(TRAIN, store) == Event("ok", TRAIN)
    for state in ("error", "diverged"):
        finish(store, TRAIN, state)
        assert ended(TRAIN, store) == Event("error", TRAIN, "ValueError: why")
    store.put(FIRST, Record("unsupported", reason="no"))
    assert ended(FIRST, store) == Event("ok", FIRST, "no")


@pytest.fixture
def tiny_jobs(fresh_catalog: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Job]]:
    """Two trainings and their evaluations with the tiny plug-ins; `fragile.todo` in the folder makes one fail."""
    pytest.importorskip("torch")
    files = [str(path) for path in write_plugins(tmp_path) if path != "--plugin"]
    monkeypatch.setenv("BENCH_PLUGINS", os.pathsep.join(files))
    spec = {
        "data": {"name": "digits", "train": 64, "test": 16},
        "models": ["mlp"],
        "threat": {"eps": 0.1},
        "train": {"epochs": 1},
        "defenses": ["fragile", "plain"],
        "attacks": ["wobble", "picky"],
        "checks": "off",
    }
    yield plan(build(spec), tmp_path)
    for name in [name for name in sys.modules if name.startswith("bench_plugin_")]:
        del sys.modules[name]


@pytest.mark.parametrize("misbehaves", ["", "raise", "nan"])
def test_both_executors_tell_and_leave_the_same(tiny_jobs: list[Job], tmp_path: Path, misbehaves: str) -> None:
    (tmp_path / "fragile.todo").write_text(misbehaves)
    told, left = [], []
    for name, executor in (("debug", Debug(tmp_path)), ("local", Local(tmp_path, [Slot("cpu")]))):
        store = Store(tmp_path / name)
        store.prepare()
        events = [event for event in drive(executor, tiny_jobs, store) if event.kind != "tick"]
        told.append({(event.kind, event.job.key, event.message) for event in events if event.job})
        left.append(outcomes(store.root))
        kinds = {event.kind for event in events}
        assert kinds == {"started", "ok", *(("error", "blocked") if misbehaves else ())}
        again = [event.kind for event in drive(executor, tiny_jobs, store) if event.kind != "tick"]
        if not misbehaves:
            assert again == ["skipped"] * len(tiny_jobs)
    assert told[0] == told[1]
    assert left[0] == left[1]
    assert len(left[0]) == (4 if misbehaves else 6)  # what is blocked has no record


def test_jobs_run_after_what_they_need_and_no_two_in_a_slot(tiny_jobs: list[Job], tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    store.prepare()
    running: set[str] = set()
    over: set[str] = set()
    most = 0
    for event in drive(Local(tmp_path, [Slot("cpu")] * 2), tiny_jobs[::-1], store):
        if event.job is None:
            continue
        if event.kind == "started":
            assert over.issuperset(event.job.needs)
            running.add(event.job.key)
        else:
            running.remove(event.job.key)
            over.add(event.job.key)
        most = max(most, len(running))
    assert over == {job.key for job in tiny_jobs}
    assert most == 2
