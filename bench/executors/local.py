"""One machine: a process a job, k slots a GPU or one-thread slots on the CPU. Free of torch itself.

Workers fork from a server that has torch loaded (tens of milliseconds a job in place of seconds); the command
`bench worker KEY` does the same work in a process of its own.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from bench.executors.base import Event, blocker, elsewhere, ended, todo
from bench.job import Job
from bench.leases import Claims
from bench.store import Store

CARRIED = ("BENCH_PLUGINS", "BENCH_MODEL_FILE")  # what names files of the user's to workers
TICK = 0.5  # seconds between ticks


@dataclass(frozen=True)
class Slot:
    """A place where one job runs: a device for the worker and the environment that shows it only that device."""

    device: str
    environment: tuple[tuple[str, str], ...] = ()


def gpus() -> list[str]:
    """Indices of the GPUs that may be used, without opening a CUDA context; CUDA_VISIBLE_DEVICES is respected."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip() not in ("", "-1")]
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    # MIG parts are listed between the GPUs, indented
    return [line.split(":")[0].removeprefix("GPU ") for line in done.stdout.splitlines() if line.startswith("GPU ")]


def slots(device: str, workers: int | None, jobs_per_gpu: int) -> list[Slot]:
    """Slots for `--device auto|cpu|cuda`. Raises ValueError where CUDA is asked for and there is none."""
    found = gpus() if device in ("auto", "cuda") else []
    if device == "cuda" and not found:
        raise ValueError("--device cuda, but no GPU was found; run `bench doctor`, or use --device cpu")
    if found:
        places = [Slot("cuda", (("CUDA_VISIBLE_DEVICES", gpu),)) for _ in range(jobs_per_gpu) for gpu in found]
        return places[:workers] if workers else places
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [Slot("cpu")] * (workers or cores)


@dataclass
class Local:
    """Local executor. `root`: the data folder; `slots`: where jobs run."""

    root: Path
    slots: list[Slot]

    def problems(self, jobs: list[Job], store: Store) -> list[str]:
        """See Executor. Asked in a child, since torch is needed; what its server loads, the workers find loaded."""
        waiting = todo(jobs, store)
        if not waiting:
            return []
        _preload(waiting)
        context = _context()
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(sender, waiting, self.root, carried()))
        process.start()
        sender.close()
        try:
            found: list[str] = receiver.recv()
            return found
        except EOFError:  # it was killed, for memory say; that is no mistake of the user's
            return []
        finally:
            _kill(process)

    def run(self, jobs: list[Job], store: Store) -> Iterator[Event]:
        """See Executor. Closing the iterator kills every worker's process group."""
        claims = Claims(store, [job.key for job in jobs])
        waiting = todo(jobs, store)
        pending = {job.key for job in waiting}
        for job in jobs:
            store.add(job)
            if job.key not in pending:
                yield Event("skipped", job)
        _preload(waiting)
        running: dict[str, tuple[Job, ForkServerProcess, Slot]] = {}
        free = list(self.slots)
        try:
            while waiting or running:
                for job in list(waiting):
                    reason = blocker(job, store, pending)
                    if reason:
                        waiting.remove(job)
                        pending.discard(job.key)
                        yield Event("blocked", job, reason)
                    elif free and not any(key in pending for key in job.waits):
                        took = claims.take(job.key)
                        if took == "held":
                            continue
                        waiting.remove(job)
                        if took == "over":
                            pending.discard(job.key)
                            yield elsewhere(job, store)
                            continue
                        slot = free.pop(0)
                        running[job.key] = (job, self._start(job, store, slot), slot)
                        yield Event("started", job)
                wait([process.sentinel for _, process, _ in running.values()], timeout=TICK)
                for key, (job, process, slot) in list(running.items()):
                    if process.is_alive() and not claims.lost(key):
                        continue
                    del running[key]
                    free.append(slot)
                    if claims.lost(key):
                        _kill(process)
                        waiting.append(job)
                    else:
                        process.join()
                        pending.discard(key)
                        yield self._ended(job, process, store)
                    claims.release(key)
                yield Event("tick")
        finally:
            for _, process, _ in running.values():
                _kill(process)
            claims.close()

    def _start(self, job: Job, store: Store, slot: Slot) -> ForkServerProcess:
        context = _context()
        process = context.Process(
            target=_child, args=(store.root, job.key, self.root, slot, len(self.slots), carried())
        )
        process.start()
        return process

    def _ended(self, job: Job, process: ForkServerProcess, store: Store) -> Event:
        event = ended(job, store)
        if event is None:  # the worker catches everything, so it was killed (by the kernel for memory, say)
            code = process.exitcode or 0
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            message = f"the worker died ({name}) without a record"
            store.put(job, "error", {"error": {"type": "WorkerDied", "message": message}, "metrics": {}, "files": {}})
            event = Event("error", job, message)
        return event


def carried() -> dict[str, str]:
    """The part of the environment that workers need and a fork server may not have."""
    return {name: os.environ[name] for name in CARRIED if name in os.environ}


def _context() -> ForkServerContext:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP threads on a busy small machine are poison
    return multiprocessing.get_context("forkserver")


def _preload(jobs: list[Job]) -> None:
    """Tell the fork server what to import once for all workers. Without effect on a server that runs already."""
    modules = ["bench.worker", "bench.cli", "bench.preflight"]
    if any(job.kind == "train" for job in jobs):
        modules.append("torch._dynamo")  # an optimiser's first step imports it, else for seconds in every training
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)


def _child(results: Path, key: str, root: Path, slot: Slot, workers: int, files: dict[str, str]) -> None:
    """Body of a worker process."""
    _leave_the_driver(files)
    os.environ.update(dict(slot.environment))
    from bench.worker import work

    work(results, key, root, slot.device, workers)


def _answer(sender: Connection, jobs: list[Job], root: Path, files: dict[str, str]) -> None:
    """Body of the process that looks at the jobs first; a plug-in's prints are not the answer."""
    _leave_the_driver(files)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from bench.preflight import problems

        found = problems(jobs, root)
    sender.send(found)


def _leave_the_driver(files: dict[str, str]) -> None:
    """A group of its own, so that it can be killed whole and Ctrl-C stays with the driver, but ends with the driver."""
    os.setsid()
    threading.Thread(target=_die_with_driver, daemon=True).start()
    for name in CARRIED:  # the fork server may have been started by another command
        os.environ.pop(name, None)
    os.environ.update(files)


def _die_with_driver() -> None:
    """A driver that is killed outright leaves no worker behind, which the next one would compete with."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        wait([driver.sentinel])
        os.killpg(0, signal.SIGKILL)


def _kill(process: ForkServerProcess) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(timeout=5)
