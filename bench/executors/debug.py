"""Runs jobs one after another in this process: breakpoints and tracebacks work. Imports torch when it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.executors.base import Event, begin, blocker, elsewhere, ended, todo
from bench.planning.job import Job
from bench.records.leases import Claims
from bench.records.store import Store

PAUSE = 0.5  # seconds until asking again for what another driver does


@dataclass
class Debug:
    """In-process executor. `root`: the data folder; `work` does a job (default: bench.jobs.worker.work)."""

    root: Path
    device: str = "cpu"
    work: Callable[..., str] | None = None

    def devices(self) -> str:
        """See Executor."""
        return f"{self.device}, in this process"

    def problems(self, jobs: list[Job], store: Store) -> list[str]:
        """See Executor."""
        from bench.jobs.preflight import problems

        return problems(todo(jobs, store), self.root)

    def run(self, jobs: list[Job], store: Store) -> Iterator[Event]:
        """See Executor."""
        claims, waiting = yield from begin(jobs, store)
        pending = {job.key for job in waiting}
        try:
            while waiting:
                held = len(waiting)
                for job in list(waiting):
                    events = self._try(job, store, pending, claims)
                    if events is not None:
                        waiting.remove(job)
                        yield from events
                        pending.discard(job.key)
                if len(waiting) == held:  # another driver is at all that is left
                    yield Event("tick")
                    time.sleep(PAUSE)
        finally:
            claims.close()

    def _try(self, job: Job, store: Store, pending: set[str], claims: Claims) -> Iterator[Event] | None:
        """The events of a job, which does it; None while it has to wait for another job or driver."""
        reason = blocker(job, store, pending)
        if reason:
            return iter([Event("blocked", job, reason)])
        took = "held" if any(key in pending for key in job.waits) else claims.take(job.key)
        if took == "over":
            return iter([elsewhere(job, store)])
        return None if took == "held" else self._do(job, store, claims)

    def _do(self, job: Job, store: Store, claims: Claims) -> Iterator[Event]:
        yield Event("started", job)
        state = (self.work or _work())(store.root, job.key, self.root, self.device)
        claims.release(job.key)
        yield ended(job, store) or Event("error", job, f"{state}, but its record cannot be read back")


def _work() -> Callable[..., str]:
    from bench.jobs.worker import work

    return work
