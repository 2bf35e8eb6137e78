"""One job by whoever may do it: the lease is taken here, kept alive, and given back. What `bench worker KEY`, a task of
Slurm and a task of Ray do; the executors local and debug hold the lease themselves.

Free of torch until a job begins.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from bench.atomic import unless_gone, write_json
from bench.jobs import retries
from bench.planning.job import Job
from bench.records.leases import Lease, claim, holders, this_machine
from bench.records.store import Store

HELD = 5  # exit code: another process is at the job, or it is over; nothing was done
ATTEMPTS = "attempts.json"  # retries so far, while a job is not over: they outlive the process
POLL = 1.0  # seconds between looks at a lease
WORDS = {
    "held": "is held: another process does it; nothing was done",
    "over": "is over: its record stands; nothing was done",
}


def attempt(results: Path, key: str, root: Path, device: str = "cpu", workers: int = 1) -> str:
    """Do a job; gives its record's state. "held": another process is at it, "over": its record stands already.

    An evaluation that runs out of memory is done again with its passes halved, by the rules of bench.jobs.retries.
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
        with _watched(lease):
            return _do(store, job, root, device, max(workers, _beside(device)))
    finally:
        lease.release()


def tried(store: Store, key: str) -> list[dict[str, Any]]:
    """The retries of a job so far, as its record will tell them."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((store.folder(key) / ATTEMPTS).read_text(encoding="utf-8"))
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return []


def next_attempt(
    store: Store, job: Job, fault: retries.Fault, allowed: Container[retries.Step], shared: bool = False
) -> retries.Step | None:
    """How a failed job is tried again, None where it is given up. A retry is saved, and the failed record removed.

    `allowed`: the steps that the caller can take; `shared`: other jobs ran on the same device.
    """
    before = tried(store, job.key)
    step = retries.step(fault, job, before, shared)
    if step not in allowed:
        return None
    write_json(store.folder(job.key) / ATTEMPTS, [*before, retries.entry(fault, step)])
    (store.folder(job.key) / "record.json").unlink(missing_ok=True)
    return step


def forget(store: Store, key: str) -> None:
    """The job is over: its record tells what was tried."""
    (store.folder(key) / ATTEMPTS).unlink(missing_ok=True)


def _do(store: Store, job: Job, root: Path, device: str, workers: int) -> str:
    from bench.jobs.worker import work

    while True:
        state = work(store.root, job.key, root, device, workers, tried(store, job.key))
        fault = retries.fault(store.record(job.key), None, None, kernel=False, peak=None)
        if fault is None or next_attempt(store, job, fault, ("halve",)) is None:
            forget(store, job.key)
            return state
        _free()


def _beside(device: str) -> int:
    """How many jobs like this one fit on a node of Slurm's that is not this job's alone; GPUs are not shared there."""
    mine = int(os.environ.get("SLURM_CPUS_ON_NODE") or 0)
    return max((os.cpu_count() or 1) // mine, 1) if mine and device == "cpu" else 1


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _lease(store: Store, key: str) -> Lease | None:
    """The lease of a job, None where its holder shows a sign of life: its process here, or a heartbeat from elsewhere.

    A job that Slurm ended and starts anew on another machine thus waits until the lease of its own past is stale.
    """
    seen: tuple[str, float] | None = None
    while (lease := claim(store, key)) is None:
        with unless_gone():  # given back meanwhile
            holder = max(holders(store.folder(key), time.time()), key=lambda each: each.generation, default=None)
            if holder is not None:
                now = holder.path.name, holder.path.stat().st_mtime
                if holder.machine == this_machine() or seen not in (None, now):
                    return None
                seen = now
        time.sleep(POLL)
    return lease


@contextlib.contextmanager
def _watched(lease: Lease) -> Iterator[None]:
    """Inside, this process ends at once when another one took its job over: the folder is no longer its own."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL):
            if not lease.held:
                os.write(2, b"another process took this job over after a minute without a sign of life\n")
                os._exit(HELD)

    threading.Thread(target=watch, daemon=True, name="lease").start()
    try:
        yield
    finally:
        over.set()
