"""One machine: a process a job, GPUs shared by measured memory or one-thread slots on the CPU. Free of torch itself.

Which job is next: bench.executors.schedule; where: places; the processes: processes; what after
a failure: bench.jobs.retries.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from bench.executors import processes
from bench.executors.base import Event, begin, blocker, elsewhere, ended, todo
from bench.executors.devices import Slot, kind, lanes, slots, told
from bench.executors.processes import carried
from bench.executors.schedule import Queue, expected
from bench.executors.slot_pool import Placement, SlotPool
from bench.jobs import retries
from bench.planning.job import Job
from bench.records.leases import Claims
from bench.records.runtime_estimate import Estimator
from bench.records.store import SHARED, Store

__all__ = ["Local", "Slot", "carried", "slots"]
TICK = 0.5  # seconds between ticks
POLITE = 10.0  # seconds that jobs have to save when a run is stopped
MARGIN, CONTEXT = 1.25, 600.0  # of measured memory, for fragments; MB that CUDA itself takes in each process


@dataclass
class Local:
    """Local executor. `root`: the data folder; `slots`: where jobs run; `time_limit`: seconds that a job may take.

    `work` does a job (default: bench.jobs.worker.work); `memory_kills` counts what the kernel killed for memory.
    """

    root: Path
    slots: list[Slot]
    time_limit: float | None = None
    work: processes.Work | None = None
    memory_kills: Callable[[], int] = processes.killed_for_memory
    polite: float = POLITE

    def devices(self) -> str:
        """See Executor."""
        return told(self.slots)

    def problems(self, jobs: list[Job], store: Store) -> list[str]:
        """See Executor."""
        waiting = todo(jobs, store)
        return processes.problems(waiting, self.root) if waiting else []

    def run(self, jobs: list[Job], store: Store) -> Iterator[Event]:
        """See Executor. Closing the iterator asks all workers to stop, and kills them with all they started."""
        claims, waiting = yield from begin(jobs, store)
        if not waiting:
            return
        processes.preload(waiting, self.work)
        yield from _Run(self, waiting, store, claims).events()


@dataclass
class _Running:
    """A job with its process. `shared`: the most jobs on its device so far; `peak`: resident MB seen last."""

    job: Job
    process: ForkServerProcess
    lease: Placement
    began: float
    shared: int
    peak: float | None = None
    late: float | None = None


class _Run:
    """One run of an executor: what waits, what runs, and what was tried before."""

    def __init__(self, how: Local, waiting: list[Job], store: Store, claims: Claims) -> None:
        self.how, self.store, self.claims = how, store, claims
        self.estimator = Estimator(store, kind(how.slots))
        self.places = SlotPool(how.slots)
        seconds = expected(waiting, self.estimator.seconds)
        self.queue = Queue(waiting, seconds, lanes(how.slots))
        self.unknown = any(self.estimator.seconds(job) is None for job in waiting)
        self.running: dict[str, _Running] = {}
        self.retries: dict[str, list[dict[str, Any]]] = {}
        self.avoid: dict[str, set[str]] = {}
        self.needs: dict[str, float | None] = {}
        self.suspects = list(waiting)
        self.kills = how.memory_kills()

    def events(self) -> Iterator[Event]:
        """Until every job is over. Whatever ends it early, no worker outlives it."""
        try:
            while self.queue or self.running:
                yield from self._block()
                yield from self._launch()
                self._wait()
                for each in list(self.running.values()):
                    if self.claims.lost(each.job.key):
                        yield self._taken(each)
                    elif each.late is not None or not each.process.is_alive():
                        yield self._ended(each)
                yield Event("tick")
        finally:
            try:
                self._stop()
            finally:
                self.claims.close()  # not before the last worker is gone

    def _stop(self) -> None:
        if self.running and self.how.polite:
            told = f"stopping: {len(self.running)} jobs may save for {self.how.polite:g} s; again to kill them"
            print(told, file=sys.stderr, flush=True)
        processes.stop([each.process for each in self.running.values()], self.how.polite)

    def _block(self) -> Iterator[Event]:
        """Give up the jobs that can never start, and those that wait for them in vain. Looked at once for each end."""
        while self.suspects:
            job = self.suspects.pop(0)
            reason = blocker(job, self.store, self.queue.pending) if job.key in self.queue.pending else None
            if reason:
                self.suspects += self.queue.over(job)
                yield Event("blocked", job, reason)

    def _launch(self) -> Iterator[Event]:
        """Start what can start, most urgent first."""
        self.places.begin()
        for job in self.queue.ready():
            if not self.places.usable:
                self.queue.over(job)
                self.claims.release(job.key)
                yield Event("blocked", job, "every GPU was benched after errors of its own; nothing ends on the CPU")
                continue
            if not self.places.open:
                return
            alone = any(entry["step"] == "alone" for entry in self.retries.get(job.key, ()))
            lease = self.places.take(self._need(job), alone, self.avoid.get(job.key, ()))
            if lease is not None and (event := self._start(job, lease)) is not None:
                yield event

    def _need(self, job: Job) -> float | None:
        """MB on the device to put aside for a job, None where nothing like it was measured."""
        if job.key not in self.needs:
            held = self.estimator.memory(job, "cuda")
            self.needs[job.key] = None if held is None else held * MARGIN + CONTEXT
        return self.needs[job.key]

    def _start(self, job: Job, lease: Placement) -> Event | None:
        """A job begins, for the first time or again. None while another driver is at it; it may also be over by now."""
        if (took := self.claims.take(job.key)) != "run":
            self.places.give(lease)
            if took == "held":
                return None
            self.suspects += self.queue.over(job)
            return elsewhere(job, self.store)
        (self.store.folder(job.key) / SHARED).unlink(missing_ok=True)
        gpu = lease.slot.device != "cpu"  # on the CPU all slots share one machine, and timings say so from the start
        beside = lease.neighbours if gpu else len(self.how.slots)
        for other in self.running.values():
            if gpu and other.lease.slot.place == lease.slot.place and other.shared < beside:
                other.shared = beside
                (self.store.folder(other.job.key) / SHARED).write_text(str(beside), encoding="utf-8")
        task = processes.Task(
            self.store.root, job.key, self.how.root, lease.slot, beside, self.retries.get(job.key, [])
        )
        self.queue.start(job)
        with processes.undisturbed():
            process = processes.start(task, self.how.work)
            self.running[job.key] = _Running(job, process, lease, time.monotonic(), lease.neighbours)
        return Event("started", job)

    def _wait(self) -> None:
        """Until a worker ends, a limit is reached, or it is time for a tick."""
        limit, timeout = self.how.time_limit, TICK
        if limit is not None:
            ages = [time.monotonic() - each.began for each in self.running.values()]
            timeout = max(min([TICK, *(limit - age for age in ages)]), 0.0)
        wait([each.process.sentinel for each in self.running.values()], timeout=timeout)
        crowd = len(self.running)
        for each in self.running.values():
            each.peak = processes.resident(each.process) or each.peak
            each.shared = max(each.shared, crowd if each.lease.slot.device == "cpu" else 1)
            if limit is not None and time.monotonic() - each.began >= limit and each.process.is_alive():
                each.late = limit

    def _ended(self, each: _Running) -> Event:
        """A worker is gone, or has to go: its result, or another try, for which the job stays this driver's."""
        job, place = each.job, each.lease.slot.place
        processes.kill(each.process)  # and whatever it left behind
        del self.running[job.key]
        self.places.give(each.lease)
        (self.store.folder(job.key) / SHARED).unlink(missing_ok=True)
        before, self.kills = self.kills, self.how.memory_kills()
        record = self.store.record(job.key)
        fault = retries.fault(record, each.process.exitcode, each.late, self.kills > before, each.peak)
        if fault is None:
            self.places.well(place)
            self._learn(job, record)
            return self._over(job)
        history = self.retries.setdefault(job.key, [])
        step = retries.step(fault, job, history, each.shared > 1)
        if fault.kind == "device":
            self.avoid.setdefault(job.key, set()).add(place)
            self.places.broke(place, job.key)
        if step != "give up":
            history.append(retries.entry(fault, step))
            (self.store.folder(job.key) / "record.json").unlink(missing_ok=True)
            self.queue.again(job)
            return Event("retried", job, f"{fault.name}: {fault.message}; {retries.WORDS[step]}")
        if record is None:
            content: dict[str, Any] = {"error": {"type": fault.name, "message": fault.message}}
            content |= {"peak_memory_mb": fault.peak, **({"attempts": history} if history else {})}
            self.store.put(job, retries.final(fault), {"metrics": {}, "files": {}, **content})
        return self._over(job)

    def _taken(self, each: _Running) -> Event:
        """Another driver took the job over; its folder is no longer to be touched from here."""
        processes.kill(each.process)
        del self.running[each.job.key]
        self.places.give(each.lease)
        self.claims.release(each.job.key)
        self.queue.again(each.job)
        return Event("retried", each.job, "another run took it over after a minute without a sign of life from here")

    def _over(self, job: Job) -> Event:
        self.suspects += self.queue.over(job)
        event = ended(job, self.store) or Event("error", job, "its record cannot be read back")
        self.claims.release(job.key)  # from now on another command may try it again
        return event

    def _learn(self, job: Job, record: dict[str, Any] | None) -> None:
        """What a finished job took tells how long others will; the order is made anew where that was not known."""
        if record is None or record["state"] != "done":
            return
        news = self.estimator.seconds(job) is None
        self.estimator.learn(job, record)
        self.needs.clear()
        if self.unknown and news:
            left = [self.queue.jobs[key] for key in self.queue.pending]
            self.queue.weigh(expected(left, self.estimator.seconds))
            self.unknown = any(self.estimator.seconds(each) is None for each in left)
