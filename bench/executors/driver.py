"""The loop that every run goes through: claim a job, submit it to a backend, and read its record when it has ended.

The driver takes leases (bench.records.leases; on a cluster the workers do), decides on retries (bench.jobs.retries),
gives up the dependents of failed jobs and yields events. Where the jobs run is the backend's business (debug, local,
slurm, ray). The records are the truth: whatever ends the driver early, the same command continues from them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from bench.executors.base import Backend, Event, Exit, Handle, blocker, elsewhere, ended, todo
from bench.executors.schedule import Queue, expected
from bench.jobs import retries
from bench.jobs.attempt import forget, next_attempt, tried
from bench.planning.job import Job
from bench.records.leases import Claims
from bench.records.record import Retry
from bench.records.store import Store
from bench.training import stop_signals

TICK = 0.5  # seconds that one round waits at most


def drive(backend: Backend, jobs: list[Job], store: Store) -> Iterator[Event]:
    """Run jobs on a backend, each after the jobs that it depends on; yields events until every job has ended.

    Jobs with a valid record are skipped. Closing the iterator ends all workers.
    """
    claims = Claims(store, [job.key for job in jobs])  # before `todo`: a job that ends later was run by others
    waiting = todo(jobs, store)
    pending = {job.key for job in waiting}
    for job in jobs:
        store.add(job)
        if job.key not in pending:
            yield Event("skipped", job)
    if waiting:
        store.mark_run(pending)
        yield from Driver(backend, store, claims, waiting).events()


class Driver:
    """One run. `queue`: jobs that have not ended; `running`: submitted jobs; `suspects`: jobs that may be blocked."""

    def __init__(self, backend: Backend, store: Store, claims: Claims, waiting: list[Job]) -> None:
        self.backend, self.store, self.claims = backend, store, claims
        self.suspects, self.exits = list(waiting), list[Exit]()
        self.running: dict[str, Handle] = {}
        self.attempts: dict[str, list[Retry]] = {}  # the retries of each job so far
        self.announced: set[str] = set()  # keys whose `started` was yielded
        self.last_good = time.monotonic()
        backend.open(store, waiting)
        self.queue = Queue(waiting, expected(waiting, backend.seconds), backend.lanes)

    def events(self) -> Iterator[Event]:
        """The loop. However it ends, the workers end before their leases are released."""
        try:
            with contextlib.nullcontext() if self.backend.in_process else stop_signals.rounds():
                yield from self._rounds()
        finally:
            try:
                self.backend.close()
            finally:
                self.claims.close()

    def _rounds(self) -> Iterator[Event]:
        while self.queue.pending:
            stop_signals.point()
            try:
                yield from self._block()
                yield from self._submit()
                self.exits += self.backend.poll(TICK)
                yield from self._start()
                yield from self._end()
                self.last_good = time.monotonic()
            except OSError:  # a file server that is away for a moment must not cost a week of cluster time
                if time.monotonic() - self.last_good >= self.backend.patience:
                    raise
                time.sleep(TICK)
            yield Event("tick")
            if self.backend.detach:
                return

    def _block(self) -> Iterator[Event]:
        """Give up jobs that can never start. A job is looked at when the run begins and when a job that it waits for
        ends."""
        while self.suspects:
            job = self.suspects[0]
            waits = job.key in self.queue.pending and job.key not in self.announced
            reason = blocker(job, self.store, self.queue.pending) if waits else None
            self.suspects.pop(0)
            if reason:
                if job.key in self.running:
                    self.backend.cancel(self.running[job.key])
                yield self._over(job, Event("blocked", job, reason))

    def _submit(self) -> Iterator[Event]:
        """Submit the jobs that can start, the most urgent first."""
        for job in self.queue.waiting() if self.backend.chains else self.queue.ready():
            stop_signals.point()
            if self.backend.unusable:
                yield self._over(job, Event("blocked", job, self.backend.unusable))
            elif self._reachable(job) and self.backend.room(job, self._tried(job)):
                if (taken := self._claim(job)) == "over":
                    yield self._over(job, elsewhere(job, self.store))
                elif taken == "run":
                    self.running[job.key] = self.backend.submit(job, self._tried(job))
                    self.queue.start(job)
                    yield from self._start()

    def _reachable(self, job: Job) -> bool:
        """Has every job that this one waits for ended, or been submitted?"""
        return all(key in self.running or key not in self.queue.pending for key in job.waits)

    def _tried(self, job: Job) -> list[Retry]:
        if job.key not in self.attempts:
            self.attempts[job.key] = tried(self.store, job.key)
        return self.attempts[job.key]

    def _claim(self, job: Job) -> str:
        """`run`: the job may be submitted; `held`: another process runs it; `over`: another process finished it."""
        try:
            return self.claims.take(job.key)
        finally:
            if self.backend.worker_claims:
                self.claims.release(job.key)

    def _start(self) -> Iterator[Event]:
        """Announce the jobs that workers have begun."""
        for key, handle in list(self.running.items()):
            if handle.started and key not in self.announced:
                self.announced.add(key)
                yield Event("started", handle.job)

    def _end(self) -> Iterator[Event]:
        """Handle jobs that ended, and jobs that another driver took from this one."""
        for key, handle in list(self.running.items()):
            if not self.backend.worker_claims and self.claims.lost(key):
                self.backend.cancel(handle)  # from now on the folder belongs to the other driver
                self.claims.release(key)
                yield self._again(handle.job, "another run took it over after this one was silent for a minute")
        while self.exits:
            job, known = self.exits[0].handle.job, self.exits[0].handle in self.running.values()
            event = self._event(self.exits[0]) if known else None
            self.exits.pop(0)
            if event is not None and event.kind in ("ok", "error") and job.key not in self.announced:
                self.announced.add(job.key)
                yield Event("started", job)
            if event is not None:
                yield event if event.kind == "retried" else self._over(job, event)
            elif known:
                self._again(job)

    def _event(self, end: Exit) -> Event | None:
        """What the end of a job means: the event of its record, or a retry. None where another process runs the job."""
        job, fault = end.handle.job, end.fault
        if end.result == "held":
            return None
        if end.result == "over":
            return elsewhere(job, self.store)
        record = self.store.record(job.key)
        if fault is not None:
            step = next_attempt(self.store, job, fault, self.backend.retries, end.shared)
            if step is not None:
                return self._again(job, f"{fault.name}: {fault.message}; {retries.WORDS[step]}")
            if record is None:
                self.store.put(job, retries.final_record(fault, tried(self.store, job.key)))
        elif record is not None and record.state == "done" and self.backend.learn(job, record):
            left = [self.queue.jobs[key] for key in self.queue.pending]
            self.queue.weigh(expected(left, self.backend.seconds))
        forget(self.store, job.key)
        return ended(job, self.store) or Event("error", job, "its record cannot be read")

    def _again(self, job: Job, message: str = "") -> Event:
        """The job has to be submitted again."""
        del self.running[job.key]
        self.attempts.pop(job.key, None)
        self.announced.discard(job.key)
        self.queue.again(job)
        return Event("retried", job, message)

    def _over(self, job: Job, event: Event) -> Event:
        """The job has ended or will never start: others may claim it from now on."""
        self.running.pop(job.key, None)
        self.suspects += self.queue.over(job)
        self.claims.release(job.key)
        return event
