"""Where a run on Slurm stands: which job has which task, what another process is at, what may be submitted."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench.executors.base import Event, elsewhere
from bench.planning.job import Job
from bench.records.leases import Claims
from bench.records.store import Store


@dataclass
class Submitted:
    """`live`: task of each submitted job; `mine`: the tasks that this command submitted."""

    store: Store
    claims: Claims
    jobs: dict[str, Job]
    pending: set[str]
    waiting: list[Job]
    live: dict[str, str] = field(default_factory=dict)
    mine: set[str] = field(default_factory=set)
    held: set[str] = field(default_factory=set)  # waiting jobs that another process is at
    started: set[str] = field(default_factory=set)
    lost: dict[str, float] = field(default_factory=dict)  # when Slurm was first seen to be done with a job

    def over(self, key: str) -> None:
        """A job has ended or will never begin."""
        self.pending.discard(key)
        self.live.pop(key, None)
        self.lost.pop(key, None)
        self.waiting = [job for job in self.waiting if job.key != key]

    def submit(self, jobs: list[Job], tasks: list[str]) -> None:
        """Each of the jobs has a task now."""
        self.live |= {job.key: task for job, task in zip(jobs, tasks, strict=True)}
        self.mine |= set(tasks)
        self.waiting = [job for job in self.waiting if job.key not in self.live]

    def back(self, job: Job) -> None:
        """Slurm is done with its task, but the job is not over: it is submitted anew once nobody is at it."""
        del self.live[job.key]
        self.lost.pop(job.key, None)
        self.started.discard(job.key)
        self.waiting.append(job)

    def take(self, job: Job) -> tuple[bool, Event | None]:
        """May it be submitted? Then the record of an error is gone. The event of a job that is over by now."""
        try:
            took = self.claims.take(job.key)
        finally:
            self.claims.release(job.key)  # its worker will take it
        if took == "held":
            self.held.add(job.key)
        if took != "over":
            return took == "run", None
        self.over(job.key)
        return False, elsewhere(job, self.store)

    def free(self) -> list[Job]:
        """What waits for no job that another process is at, or that Slurm lost just now."""
        unsettled = self.held | set(self.lost)
        free = [job for job in self.waiting if job.key not in unsettled]
        while stuck := {job.key for job in free if not unsettled.isdisjoint(job.waits)}:
            unsettled |= stuck
            free = [job for job in free if job.key not in stuck]
        return free
