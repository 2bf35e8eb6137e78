"""Two drivers of the local executor on one results folder: one of them does a job, the other one hears of it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import fake_jobs
import pytest
from fake_jobs import evaluate, kinds, says, starts, train

from bench.executors.base import Event
from bench.executors.devices import Slot
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.planning.job import Job
from bench.records import leases
from bench.records.leases import STALE, Lease, claim, holder_of
from bench.records.record import JobError, Record
from bench.records.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    return made


def local(store: Store, slots: int = 1) -> Local:
    return Local(store.root.parent, [Slot("cpu")] * slots, work=fake_jobs.work)


def held(store: Store, job: Job) -> Lease:
    """The claim of another driver."""
    store.add(job)
    lease = claim(store, job.key)
    assert lease is not None
    return lease


@pytest.mark.parametrize("state", ["done", "error"])
def test_what_another_driver_is_at_takes_no_slot_and_is_not_done_again(
    store: Store, tmp_path: Path, state: str
) -> None:
    theirs, mine = train(0, images=1000), train(1, images=10)
    judged = evaluate(theirs)
    lease = held(store, theirs)
    seen: list[Event] = []
    for event in drive(local(store), [theirs, mine, judged], store):
        seen.append(event)
        if event.kind == "tick" and lease.held and kinds(seen, mine) == ["started", "ok"]:  # on the only slot
            assert kinds(seen, theirs) == kinds(seen, judged) == []
            error = JobError("RuntimeError", "theirs") if state == "error" else None
            store.put(theirs, Record(state, error=error))
            lease.release()
    told = [(event.kind, event.message) for event in seen if event.job == theirs]
    good = state == "done"
    assert told == [("skipped", "done by another run") if good else ("error", "RuntimeError: theirs")]
    assert kinds(seen, judged) == (["started", "ok"] if good else ["blocked"])
    assert starts(tmp_path, theirs) == []
    assert [holder_of(store, job.key) for job in (theirs, mine, judged)] == [None] * 3


def test_a_job_that_is_tried_again_stays_with_its_driver(store: Store, tmp_path: Path) -> None:
    job = train(0)
    says(tmp_path, job, "kill", "ok 0.5")
    seen: list[Event] = []
    for event in drive(local(store), [job], store):
        seen.append(event)
        if event.kind in ("started", "retried"):
            assert claim(store, job.key) is None
    assert kinds(seen, job) == ["started", "retried", "started", "ok"]
    assert claim(store, job.key) is not None


def test_a_job_that_was_taken_over_is_left_alone_until_it_is_free(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT", 2.0)
    monkeypatch.setattr(leases, "_beating", leases._Beating())
    job = train(0)
    says(tmp_path, job, "sleep", "ok")
    seen: list[Event] = []
    theirs: Lease | None = None
    for event in drive(local(store), [job], store):
        seen.append(event)
        if theirs is None and starts(tmp_path, job):
            mine = next(store.folder(job.key).glob("lease-*.json"))
            os.utime(mine, (time.time() - STALE - 1,) * 2)
            theirs = held(store, job)
            until = time.monotonic() + 60
        elif theirs is not None and theirs.held and kinds(seen, job)[-1] == "retried":
            assert theirs.path.exists()
            with pytest.raises(ProcessLookupError):  # its worker is gone before anybody else begins
                os.kill(starts(tmp_path, job)[0]["pid"], 0)
            theirs.release()  # given up without a result
        assert theirs is None or time.monotonic() < until
    assert kinds(seen, job) == ["started", "retried", "started", "ok"]
    assert holder_of(store, job.key) is None


def test_closing_a_run_frees_its_jobs(store: Store, tmp_path: Path) -> None:
    job = train(0)
    says(tmp_path, job, "polite")
    events = drive(local(store), [job], store)
    for event in events:
        if event.kind == "tick" and starts(tmp_path, job):
            break
    assert holder_of(store, job.key) is not None
    events.close()  # type: ignore[attr-defined]
    assert (tmp_path / f"{job.key}.saved").exists()
    assert list(store.folder(job.key).glob("lease-*")) == []
    assert store.record(job.key) is None


def test_two_drivers_do_every_job_once(store: Store, tmp_path: Path) -> None:
    trained = [train(seed) for seed in range(4)]
    jobs = trained + [evaluate(job, n) for job in trained for n in (1, 2)]
    for job in jobs:
        says(tmp_path, job, "ok 0.2")
    seen: list[list[Event]] = [[], []]
    both = [
        threading.Thread(target=lambda mine: mine.extend(drive(local(store, 2), jobs, store)), args=(mine,))
        for mine in seen
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(120)
    for job in jobs:
        assert len(starts(tmp_path, job)) == 1
        assert sorted(kinds(seen[0], job) + kinds(seen[1], job)) == ["ok", "skipped", "started"]
        assert store.done(job.key)
    assert all(any(event.kind == "started" for event in mine) for mine in seen)
