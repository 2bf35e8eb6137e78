"""The face that every executor shares: run(jobs, store) -> events."""

from __future__ import annotations

from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from bench.atomic import file_hash
from bench.planning.job import Job
from bench.records.evaluated_weights import outdated
from bench.records.leases import Claims
from bench.records.store import Store

EventKind = Literal["skipped", "started", "retried", "ok", "error", "blocked", "tick"]
FAILED = ("error", "diverged", "oom", "timeout")  # states whose record tells an error


class MissingDependency(ImportError):
    """What an executor or a tracker needs is not installed here; says what to do."""


@dataclass(frozen=True)
class Event:
    """Something happened to a job; a tick (no job) only lets the caller redraw. A job that failed for no fault of its
    own is `retried` before it ends."""

    kind: EventKind
    job: Job | None = None
    message: str = ""


class Executor(Protocol):
    """Runs jobs, each after what it needs. Closing the iterator stops every worker."""

    def devices(self) -> str:
        """What the jobs run on, in words."""

    def problems(self, jobs: list[Job], store: Store) -> list[str]:
        """Why some of the jobs that have to run can never work, a line each (bench.jobs.preflight). Writes nothing."""

    def run(self, jobs: list[Job], store: Store) -> Iterator[Event]:
        """Yield events until every job is over; jobs with a standing record are skipped."""


def todo(jobs: list[Job], store: Store) -> list[Job]:
    """What has to run: jobs without a standing record, and those whose files a pending job needs and cannot find.

    Records may come from git without weights and images, and files may be damaged; then the job runs again, since
    nothing else can give them back. A record does not stand if it judged other weights than its training has now.
    Shards of an evaluation that stands are not run.
    """
    known = {job.key: job for job in jobs}
    standing = {job.key for job in jobs if store.intact(job.key) and not outdated(store, job)}
    idle = {part for job in jobs if job.key in standing for part in job.parts}
    pending = {key for key in known if key not in standing and key not in idle}
    found = list(pending)
    while found:
        job = known[found.pop()]
        for key in job.waits:
            if key in known and key not in pending and _lacks(store, known[key], job):
                pending.add(key)
                found.append(key)
    return [job for job in jobs if job.key in pending]


def begin(jobs: list[Job], store: Store) -> Generator[Event, None, tuple[Claims, list[Job]]]:
    """How every executor begins: all jobs are written down, those that stand are skipped. Gives the claims and what has
    to run."""
    claims = Claims(store, [job.key for job in jobs])
    waiting = todo(jobs, store)
    pending = {job.key for job in waiting}
    for job in jobs:
        store.add(job)
        if job.key not in pending:
            yield Event("skipped", job)
    return claims, waiting


def _lacks(store: Store, need: Job, job: Job) -> bool:
    """Is a file that `job` will read of the finished `need` absent or damaged?"""
    record = store.record(need.key)
    if record is None:  # a shard that was never run, of an evaluation that stood until now
        return True
    if record["state"] != "done" or (job.kind == "audit" and need.kind != "train"):
        return False  # an audit takes the images that are there
    wanted = "weights-" if need.kind in ("train", "import") else "samples" if need.key in job.parts else "adversarial"
    return any(
        name.startswith(wanted) and expected != file_hash(store.folder(need.key) / name)
        for name, expected in record["files"].items()
    )


def ended(job: Job, store: Store) -> Event | None:
    """The event of a job that just ended, from its record; None where there is no record."""
    record = store.record(job.key)
    if record is None:
        return None
    if record["state"] in FAILED:
        return Event("error", job, f"{record['error']['type']}: {record['error']['message']}")
    return Event("ok", job, record.get("reason", ""))


def elsewhere(job: Job, store: Store) -> Event:
    """The event of a job that another driver did while this one ran."""
    event = ended(job, store)
    if event is None or event.kind == "ok":
        return Event("skipped", job, "done by another run")
    return event


def blocker(job: Job, store: Store, running: Container[str]) -> str | None:
    """Why a job can never start: its training ended without weights, or a shard without samples. None while it may.

    Other evaluations whose images it takes only have to end: one collapsed defense must not blank a whole column.
    """
    for need in (*job.needs[:1], *job.parts):
        record = None if need in running else store.record(need)
        if record is not None and record["state"] != "done":
            return f"{'training' if need in job.needs else 'shard'} {need} ended as {record['state']}"
    return None
