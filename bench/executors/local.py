"""This machine: one process for each job, GPUs shared by measured memory, one-thread slots on the CPU. Free of torch.

Devices and memory: bench.executors.slot_pool; the processes themselves: bench.executors.processes.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import ClassVar

from bench.executors import devices, processes
from bench.executors.base import Backend, Exit, Handle, todo, unnoted
from bench.executors.devices import Slot
from bench.executors.slot_pool import Placement, SlotPool
from bench.jobs import retries
from bench.planning.job import Job
from bench.records.record import Record, Retry
from bench.records.runtime_estimate import Estimator
from bench.records.store import SHARED, Store
from bench.terminal import counted
from bench.training import stop_signals

POLITE = 10.0  # seconds that jobs have to save their state when a run is stopped
MARGIN, CONTEXT = 1.25, 600.0  # factor on the measured memory for fragmentation; MB that CUDA takes in each process


@dataclass(eq=False)
class Running(Handle):
    """A job with its process. `shared`: the largest number of jobs on its device so far; `peak`: resident MB seen last;
    `late`: the time limit, once it is exceeded."""

    process: ForkServerProcess = field(kw_only=True)
    placement: Placement = field(kw_only=True)
    began: float = field(kw_only=True)
    shared: int = field(kw_only=True)
    peak: float | None = None
    late: float | None = None


@dataclass
class Local(Backend):
    """Backend of this machine. `root`: the data folder; `slots`: where jobs run; `time_limit`: seconds a job may take.

    `work` runs a job (default: bench.jobs.worker.work); `memory_kills` counts the processes that the kernel killed for
    lack of memory; `polite`: seconds that jobs have to save their state when a run is stopped.
    """

    retries: ClassVar[frozenset[retries.Step]] = frozenset({"again", "alone", "halve", "elsewhere"})
    root: Path
    slots: list[Slot]
    time_limit: float | None = None
    work: processes.Work | None = None
    memory_kills: Callable[[], int] = processes.killed_for_memory
    polite: float = POLITE

    def __post_init__(self) -> None:
        self.kind, self.lanes = devices.kind(self.slots), devices.lanes(self.slots)

    def devices(self) -> str:
        """See Backend."""
        return devices.describe(self.slots)

    def problems(self, jobs: list[Job], store: Store, note: Callable[[str], None] = unnoted) -> list[str]:
        """See Backend. Data that is absent is downloaded here, once, before each worker would try it."""
        absent = processes.bring_data(jobs, self.root, note) if todo(jobs, store) else []
        return absent or super().problems(jobs, store, note)

    def open(self, store: Store, jobs: list[Job]) -> None:
        """See Backend."""
        processes.preload(jobs, self.work)
        self.store, self.pool = store, SlotPool(self.slots)
        self.estimator = Estimator(store, self.kind)
        self.running: dict[str, Running] = {}
        self.failed_on: dict[str, set[str]] = {}  # the devices that failed each job
        self.needs: dict[str, float | None] = {}
        self.kills = self.memory_kills()

    def seconds(self, job: Job) -> float | None:
        """See Backend."""
        return self.estimator.seconds(job)

    def share(self, job: Job) -> float:
        """See Backend. Of a GPU with several slots a job takes one of them."""
        return 1.0 if self.kind == "cpu" else len({slot.place for slot in self.slots}) / self.lanes

    def learn(self, job: Job, record: Record) -> bool:
        """See Backend."""
        unknown = self.estimator.seconds(job) is None
        self.estimator.learn(job, record)
        self.needs.clear()
        return unknown

    @property
    def unusable(self) -> str:
        """See Backend. Jobs that were to run on a GPU never run on the CPU instead."""
        return "" if self.pool.usable else "every GPU was benched after errors of its own; no job moves to the CPU"

    def room(self, job: Job, attempts: Sequence[Retry]) -> bool:
        """See Backend."""
        return self.pool.open and self.pool.find(*self._request(job, attempts)) is not None

    def _request(self, job: Job, attempts: Sequence[Retry]) -> tuple[float | None, bool, set[str]]:
        """MB on the device (None where no similar job was measured), whether it runs alone, the devices to avoid."""
        if job.key not in self.needs:
            held = self.estimator.memory(job, "cuda")
            self.needs[job.key] = None if held is None else held * MARGIN + CONTEXT
        alone = any(entry.step == "alone" for entry in attempts)
        return self.needs[job.key], alone, self.failed_on.get(job.key, set())

    def submit(self, job: Job, attempts: Sequence[Retry]) -> Running:
        """Start a worker."""
        placement = self.pool.take(*self._request(job, attempts))
        assert placement is not None, "submit follows room"
        (self.store.folder(job.key) / SHARED).unlink(missing_ok=True)
        # on the CPU all slots share one machine, and timings say so from the start
        gpu = placement.slot.device != "cpu"
        beside = placement.neighbors if gpu else len(self.slots)
        for other in self.running.values():
            if gpu and other.placement.slot.place == placement.slot.place and other.shared < beside:
                other.shared = beside
                (self.store.folder(other.job.key) / SHARED).write_text(str(beside), encoding="utf-8")
        task = processes.Task(self.store.root, job.key, self.root, placement.slot, beside, list(attempts))
        process = processes.start(task, self.work)
        handle = Running(
            job, True, process=process, placement=placement, began=time.monotonic(), shared=placement.neighbors
        )
        self.running[job.key] = handle
        return handle

    def poll(self, seconds: float) -> list[Exit]:
        """See Backend. A job over the time limit ends here."""
        limit = math.inf if self.time_limit is None else self.time_limit
        ends = [each.began + limit for each in self.running.values()]
        timeout = max(min([seconds, *(end - time.monotonic() for end in ends)]), 0.0)
        wait([each.process.sentinel for each in self.running.values()], timeout=timeout)
        crowd = len(self.running)
        for each in self.running.values():
            each.peak = processes.resident(each.process) or each.peak
            each.shared = max(each.shared, crowd if each.placement.slot.device == "cpu" else 1)
            if time.monotonic() >= each.began + limit and each.process.is_alive():
                each.late = limit
        self.pool.begin()
        over = [each for each in self.running.values() if each.late is not None or not each.process.is_alive()]
        return [self._ended(each) for each in over]

    def _ended(self, each: Running) -> Exit:
        """A worker ended, or is over its time limit."""
        key, place = each.job.key, each.placement.slot.place
        self.cancel(each)  # and whatever it left behind
        (self.store.folder(key) / SHARED).unlink(missing_ok=True)
        before, self.kills = self.kills, self.memory_kills()
        record = self.store.record(key)
        fault = retries.fault(record, each.process.exitcode, each.late, self.kills > before, each.peak)
        if fault is None:
            self.pool.well(place)
        elif fault.kind == "device":
            self.failed_on.setdefault(key, set()).add(place)
            self.pool.broke(place, key)
        return Exit(each, fault=fault, shared=each.shared > 1)

    def cancel(self, handle: Handle) -> None:
        """Kill the worker with every process that it started."""
        each = self.running.pop(handle.job.key, None)
        if each is not None:
            processes.kill(each.process)
            self.pool.give(each.placement)

    def close(self) -> None:
        """Ask all workers to save and stop, and kill those that are left after `polite` seconds."""
        polite = 0.0 if stop_signals.insisted() else self.polite
        if self.running and polite:
            line = f"stopping: {counted(len(self.running), 'job')} may save for {polite:g} s; again to kill them"
            print(line, file=sys.stderr, flush=True)
        processes.stop([each.process for each in self.running.values()], polite)
        self.running = {}
