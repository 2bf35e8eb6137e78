"""Runs jobs one after another in this process, so that breakpoints and tracebacks work. Imports torch when it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.executors.base import Backend, Exit, Handle, todo, unnoted
from bench.executors.devices import Slot
from bench.planning.job import Job
from bench.records.record import Retry
from bench.records.store import Store

CPU = Slot("cpu")


@dataclass
class Debug(Backend):
    """Backend within this process. `root`: the data folder; `work` runs a job (default: bench.jobs.worker.work)."""

    in_process: ClassVar[bool] = True
    root: Path
    slot: Slot = CPU
    work: Callable[..., str] | None = None
    lanes = 1

    def __post_init__(self) -> None:
        self.slots, self.kind = [self.slot], self.slot.device

    def devices(self) -> str:
        """See Backend."""
        return f"{self.kind}, in this process"

    def problems(self, jobs: list[Job], store: Store, note: Callable[[str], None] = unnoted) -> list[str]:
        """See Backend. In this process too, so that a breakpoint in a plug-in is reached."""
        from bench.jobs.preflight import problems

        return problems(todo(jobs, store), self.root)

    def open(self, store: Store, jobs: list[Job]) -> None:
        """See Backend."""
        from bench.jobs import worker

        self.store, self.run = store, self.work or worker.work
        self.next: Handle | None = None

    def room(self, job: Job, attempts: Sequence[Retry]) -> bool:
        """One job at a time."""
        return self.next is None

    def submit(self, job: Job, attempts: Sequence[Retry]) -> Handle:
        """The job runs in the next call of `poll`."""
        self.next = Handle(job, started=True)
        return self.next

    def poll(self, seconds: float) -> list[Exit]:
        """Run the submitted job."""
        if self.next is None:
            time.sleep(seconds)  # other drivers run everything that is left
            return []
        handle, self.next = self.next, None
        self.run(self.store.root, handle.job.key, self.root, self.kind)
        return [Exit(handle)]

    def cancel(self, handle: Handle) -> None:
        """See Backend. A job that runs here cannot be ended from outside."""
        self.next = None

    def close(self) -> None:
        """See Backend."""
