"""Runs jobs one after another in this process: breakpoints and tracebacks work. Imports torch when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.executors.base import Event, blocker, ended, todo
from bench.job import Job
from bench.store import Store


@dataclass
class Debug:
    """In-process executor. `root`: the data folder."""

    root: Path
    device: str = "cpu"

    def problems(self, jobs: list[Job], store: Store) -> list[str]:
        """See Executor."""
        from bench.preflight import problems

        return problems(todo(jobs, store), self.root)

    def run(self, jobs: list[Job], store: Store) -> Iterator[Event]:
        """See Executor."""
        from bench.worker import work

        pending = {job.key for job in todo(jobs, store)}
        for job in jobs:
            store.add(job)
            if job.key not in pending:
                yield Event("skipped", job)
                continue
            reason = blocker(job, store, set())
            if reason:
                yield Event("blocked", job, reason)
                continue
            yield Event("started", job)
            state = work(store.root, job.key, self.root, self.device)
            yield ended(job, store) or Event("error", job, f"{state}, but its record cannot be read back")
