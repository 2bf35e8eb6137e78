"""The worker process of a job: started from a fork server that has torch loaded, and ended with all it started.

A job then costs tens of milliseconds to start in place of seconds; the command `bench worker KEY` does the same work
in a process of its own. Free of torch itself.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

from bench.executors.devices import Slot
from bench.planning.job import Job
from bench.training import sigterm as stopping

CARRIED = ("BENCH_PLUGINS", "BENCH_MODEL_FILE")  # what names files of the user's to workers
Work = Callable[..., str]


class Task(NamedTuple):
    """All that a worker is told: the job, where it runs, how many run beside it, and the retries so far."""

    results: Path
    key: str
    root: Path
    slot: Slot
    workers: int
    retries: list[dict[str, Any]]


def carried() -> dict[str, str]:
    """The part of the environment that workers need and a fork server may not have."""
    return {name: os.environ[name] for name in CARRIED if name in os.environ}


def context() -> ForkServerContext:
    """Where workers come from."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP threads on a busy small machine are poison
    return multiprocessing.get_context("forkserver")


def preload(jobs: list[Job], work: Work | None = None) -> None:
    """Tell the fork server what to import once for all workers. Without effect on a server that runs already."""
    modules = ["bench.jobs.worker", "bench.cli", "bench.jobs.preflight"]
    if work is not None:
        modules = [work.__module__, "bench.executors.local"]
    elif any(job.kind == "train" for job in jobs):
        modules.append("torch._dynamo")  # an optimiser's first step imports it, else for seconds in every training
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)


def problems(jobs: list[Job], root: Path) -> list[str]:
    """What bench.jobs.preflight finds, in a child since torch is needed; what its server loads, workers find loaded."""
    preload(jobs)
    receiver, sender = context().Pipe(duplex=False)
    process = context().Process(target=_answer, args=(sender, jobs, root, carried()))
    with undisturbed():
        process.start()
    sender.close()
    try:
        found: list[str] = receiver.recv()
        return found
    except EOFError:  # it was killed, for memory say; that is no mistake of the user's
        return []
    finally:
        kill(process)


def _answer(sender: Connection, jobs: list[Job], root: Path, files: dict[str, str]) -> None:
    """Body of the process that looks at the jobs first; a plug-in's prints are not the answer."""
    leave_the_driver(files)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from bench.jobs.preflight import problems

        found = problems(jobs, root)
    sender.send(found)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """SIGINT and SIGTERM wait until the end: half a request for a worker would end the fork server, and then nobody
    could tell any more whether its workers are alive, which have work to save."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are handled in the main thread
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for waited in came[:1]:
            signal.raise_signal(waited)


def start(task: Task, work: Work | None) -> ForkServerProcess:
    """Start a worker. `work` does the job (default: bench.jobs.worker.work)."""
    process = context().Process(target=_child, args=(task, work, carried()))
    process.start()
    return process


def _child(task: Task, work: Work | None, files: dict[str, str]) -> None:
    """Body of a worker process."""
    leave_the_driver(files)
    signal.signal(signal.SIGTERM, _stopped)
    os.environ.update(dict(task.slot.environment))
    if work is None:
        from bench.jobs import worker

        work = worker.work
    work(task.results, task.key, task.root, task.slot.device, task.workers, task.retries)


def _stopped(number: int, frame: object) -> None:
    """Asked to stop: no record is written; a training saves itself first (see bench.training.sigterm)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked once is enough
    stopping.stopped(number, frame)


def leave_the_driver(files: dict[str, str]) -> None:
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


def kill(process: ForkServerProcess, started: Sequence[Any] = ()) -> None:
    """End a worker, its process group, and what it started outside of its group; also after it ended by itself.

    `started`: processes below it that were seen earlier, which nobody could find once it is gone.
    """
    below = [*started, *_below(process)]
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    for child in below:
        with contextlib.suppress(Exception):  # psutil asks whether it is still the same process
            child.kill()
    process.join(timeout=5)


def _below(process: ForkServerProcess) -> list[Any]:
    """What a worker that is alive has started, as psutil tells."""
    import psutil

    with contextlib.suppress(psutil.Error):
        if process.is_alive():
            return list(psutil.Process(process.pid).children(recursive=True))
    return []


def stop(processes: Iterable[ForkServerProcess], seconds: float) -> None:
    """Ask workers to stop, and kill what is left after so long; at once where it is interrupted meanwhile."""
    left = {process: list[Any]() for process in processes}
    try:
        for process in left:
            if seconds > 0 and process.pid is not None:
                left[process] = _below(process)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(process.is_alive() for process in left):
            wait([process.sentinel for process in left if process.is_alive()], timeout=0.1)
    finally:
        for process, started in left.items():
            kill(process, started)


def resident(process: ForkServerProcess) -> float | None:
    """Peak resident MB of a worker so far."""
    try:
        text = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        return int(text.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, ValueError, IndexError):
        return None


def killed_for_memory() -> int:
    """How often the kernel has killed for memory, in this container or on this machine; 0 where it does not tell."""
    counts = [0]
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError, ValueError):
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            counts += [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
    return max(counts)
