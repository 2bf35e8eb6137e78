"""Runs one job under its lease: `bench worker KEY`, and each task of Slurm and Ray. With the executors local and debug
the driver holds the lease. Does not import torch before a job begins.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path

from bench.atomic import unless_gone
from bench.jobs import retries
from bench.planning.job import Job
from bench.records import attempts
from bench.records.leases import Lease, claim, holders, this_machine
from bench.records.record import Retry
from bench.records.store import Store

HELD = 5  # exit code: another process runs the job, or it has ended; nothing was done
POLL = 1.0  # seconds between looks at a lease
WORDS = {
    "held": "is held: another process runs it; nothing was done",
    "over": "is over: it has a valid record; nothing was done",
}


def attempt(results: Path, key: str, root: Path, device: str = "cpu", workers: int = 1) -> str:
    """Run a job; returns the state of its record, "held" if another process runs it, "over" if it has a valid record.

    An evaluation that runs out of memory runs again with half the batch in each pass (bench.jobs.retries).
    """
    store = Store(results)
    job = store.job(key)
    lease = _lease(store, key)
    if lease is None:
        return "held"
    try:
        if store.intact(key):
            return "over"
        store.reopen(key)
        with _exit_if_taken_over(lease):
            return _run(store, job, root, device, max(workers, _jobs_per_node(device)))
    finally:
        lease.release()


def tried(store: Store, key: str) -> list[Retry]:
    """The retries of a job so far, as its record will list them."""
    return attempts.retries(store.folder(key))


def next_attempt(
    store: Store, job: Job, fault: retries.Fault, allowed: Container[retries.Step], shared: bool = False
) -> retries.Step | None:
    """How a failed job is retried, None if it is given up. A retry is stored, and the failed record removed.

    `allowed`: the steps that the caller can take; `shared`: other jobs ran on the same device.
    """
    before = tried(store, job.key)
    step = retries.step(fault, job, before, shared)
    if step not in allowed:
        return None
    attempts.save_retries(store.folder(job.key), [*before, retries.entry(fault, step)])
    (store.folder(job.key) / "record.json").unlink(missing_ok=True)
    return step


def forget(store: Store, key: str) -> None:
    """Remove the stored list of retries of a job that has ended; its record holds them."""
    attempts.save_retries(store.folder(key), [])


def _run(store: Store, job: Job, root: Path, device: str, workers: int) -> str:
    from bench.jobs.worker import work

    while True:
        state = work(store.root, job.key, root, device, workers, tried(store, job.key))
        fault = retries.fault(store.record(job.key), None, None, kernel=False, peak=None)
        if fault is None or next_attempt(store, job, fault, ("halve",)) is None:
            forget(store, job.key)
            return state
        _free()


def _jobs_per_node(device: str) -> int:
    """How many jobs of this size fit on a node that Slurm shares among jobs; Slurm does not share GPUs."""
    mine = int(os.environ.get("SLURM_CPUS_ON_NODE") or 0)
    return max((os.cpu_count() or 1) // mine, 1) if mine and device == "cpu" else 1


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _lease(store: Store, key: str) -> Lease | None:
    """The lease of a job, None if its holder is alive: a process of this machine, or a heartbeat from another one.

    A job that Slurm restarts on another machine thus waits until the lease of its previous task is stale.
    """
    seen: tuple[str, float] | None = None
    while (lease := claim(store, key)) is None:
        with unless_gone():  # released meanwhile
            holder = max(holders(store.folder(key), time.time()), key=lambda each: each.generation, default=None)
            if holder is not None:
                now = holder.path.name, holder.path.stat().st_mtime
                if holder.machine == this_machine() or seen not in (None, now):
                    return None
                seen = now
        time.sleep(POLL)
    return lease


@contextlib.contextmanager
def _exit_if_taken_over(lease: Lease) -> Iterator[None]:
    """Context in which this process exits if another one takes its job over, since both would write to the folder."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL):
            if not lease.held:
                os.write(2, b"another process took this job over after a minute without a heartbeat\n")
                os._exit(HELD)

    threading.Thread(target=watch, daemon=True, name="lease").start()
    try:
        yield
    finally:
        over.set()
