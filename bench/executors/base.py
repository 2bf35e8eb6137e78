"""The face that every executor shares: run(jobs, store) -> events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from bench.plan import Job
from bench.store import Store, file_hash

EventKind = Literal["skipped", "started", "ok", "error", "blocked", "tick"]


@dataclass(frozen=True)
class Event:
    """Something happened to a job; a tick (no job) only lets the caller redraw."""

    kind: EventKind
    job: Job | None = None
    message: str = ""


class Executor(Protocol):
    """Runs jobs, each after what it needs. Closing the iterator stops every worker."""

    def problems(self, jobs: list[Job], store: Store) -> list[str]:
        """Why some of the jobs that have to run can never work, a line each (see bench.preflight). Writes nothing."""

    def run(self, jobs: list[Job], store: Store) -> Iterator[Event]:
        """Yield events until every job is over; jobs with a standing record are skipped."""


def todo(jobs: list[Job], store: Store) -> list[Job]:
    """What has to run: jobs without a standing record, and trainings whose weights a pending evaluation needs.

    Records may come from git without weights, and weights may be damaged; then the training runs again, since nothing
    else can give them back.
    """
    pending = [job for job in jobs if not store.done(job.key)]
    needed = {need for job in pending for need in job.needs}
    keys = {job.key for job in pending}
    missing = [
        job
        for job in jobs
        if job.key in needed - keys
        and (record := store.record(job.key) or {}).get("state") == "done"
        and any(
            name.startswith("weights-") and expected != file_hash(store.folder(job.key) / name)
            for name, expected in record["files"].items()
        )
    ]
    again = {job.key for job in missing} | keys
    return [job for job in jobs if job.key in again]


def ended(job: Job, store: Store) -> Event | None:
    """The event of a job that just ended, from its record; None where there is no record."""
    record = store.record(job.key)
    if record is None:
        return None
    if record["state"] in ("error", "diverged"):
        return Event("error", job, f"{record['error']['type']}: {record['error']['message']}")
    return Event("ok", job, record.get("reason", ""))


def blocker(job: Job, store: Store, running: set[str]) -> str | None:
    """Why a job can never start: something it needs ended without weights. None while it may still start."""
    for need in job.needs:
        record = store.record(need)
        if need not in running and record is not None and record["state"] != "done":
            return f"training {need} ended as {record['state']}"
    return None
