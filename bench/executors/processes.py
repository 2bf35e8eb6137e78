"""Child processes: the workers of jobs, and questions whose answer needs torch. Free of torch itself.

They come from a fork server that has torch loaded, so that one starts in tens of milliseconds instead of seconds, and
are killed together with every process that they started.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

from bench.data import datasets
from bench.executors.devices import Slot
from bench.planning.job import Job, ModelJob, TrainJob
from bench.records.record import Retry
from bench.training import stop_signals

CARRIED = ("BENCH_PLUGINS", "BENCH_MODEL_FILE")  # variables that name files of the user
MISTAKES = (ValueError, LookupError, OSError)  # exceptions that a mistake of the user's causes, shown in one line
SLOW = 2.0  # seconds after which `ask` says what its child process is doing
Work = Callable[..., str]


class Task(NamedTuple):
    """The arguments of a worker: the job, its slot, the number of jobs on its device, and the retries so far."""

    results: Path
    key: str
    root: Path
    slot: Slot
    workers: int
    retries: list[Retry]


def carried() -> dict[str, str]:
    """The environment variables that workers need and a running fork server may lack."""
    return {name: os.environ[name] for name in CARRIED if name in os.environ}


def context() -> ForkServerContext:
    """The fork server."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two OpenMP threads are far slower than one on a busy machine
    return multiprocessing.get_context("forkserver")


def preload(jobs: Sequence[Job], work: Work | None = None) -> None:
    """Set what the fork server imports once for all workers. Without effect on a server that is already running."""
    modules = ["bench.jobs.worker", "bench.cli", "bench.jobs.preflight"]
    if work is not None:
        modules = [work.__module__, "bench.executors.local"]
    elif any(isinstance(job, TrainJob) for job in jobs):
        modules.append("torch._dynamo")  # the first step of an optimizer imports it, in seconds
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)


class ChildDied(ValueError):
    """The child process ended without an answer, for instance since the kernel killed it for lack of memory."""


def ask(
    module: str, function: str, *arguments: Any, jobs: Sequence[Job] = (), note: Callable[[str], None] | None = None
) -> Any:
    """The value of `module.function(*arguments)`, computed in a child process: for questions that need torch, or that
    open files of unknown origin which may crash or fill the memory. The child is not a sandbox.

    It comes from the fork server of the workers; `jobs`: the jobs that these will run, which decide what is imported
    there. What the function prints is discarded. With `note` the function gets a further argument, which it calls with
    what it does next; `note` is called with it if that takes longer than SLOW. Raises what the function raises if that
    is one of MISTAKES, ChildDied if the child died, and ValueError for any other exception in it.
    """
    preload(jobs)
    receiver, sender = context().Pipe(duplex=False)
    told = (sender, module, function, arguments, note is not None, str(Path.cwd()), carried())
    process = context().Process(target=_answer, args=told)
    process.start()
    sender.close()
    try:
        kind, found = receiver.recv()
        while kind == "note":
            if note is not None and not receiver.poll(SLOW):
                note(found)
            kind, found = receiver.recv()
    except EOFError:
        process.join(timeout=5)
        raise ChildDied(f"the process that loaded it died (exit code {process.exitcode}); is memory short?") from None
    finally:
        kill(process)
    if kind == "good":
        return found
    raise found


def _answer(
    sender: Connection,
    module: str,
    function: str,
    arguments: tuple[Any, ...],
    notes: bool,
    folder: str,
    files: dict[str, str],
) -> None:
    """Body of the child process of `ask`."""
    leave_the_driver(files)
    if notes:
        arguments += (lambda text: sender.send(("note", text)),)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), contextlib.chdir(folder):
        try:
            answer = "good", getattr(importlib.import_module(module), function)(*arguments)
        except MISTAKES as error:
            text = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
            answer = "bad", type(error)(text) if type(error) in MISTAKES else ValueError(text)
        except Exception as error:
            answer = "bad", ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}")
    sender.send(answer)


def preflight(jobs: list[Job], root: Path, note: Callable[[str], None]) -> list[str]:
    """The problems that bench.jobs.preflight finds; none where the child process died, which is no mistake in a job."""
    try:
        found: list[str] = ask("bench.jobs.preflight", "problems", jobs, root, jobs=jobs, note=note) if jobs else []
        return found
    except ChildDied:
        return []


def bring_data(jobs: list[Job], root: Path, note: Callable[[str], None]) -> list[str]:
    """Download the data sets of these jobs that are absent from `root`; a line for each that cannot be had."""
    named = {job.data.name for job in jobs if isinstance(job, ModelJob)}
    absent = sorted(name for name in named if name in datasets.FILES and datasets.missing(name, root))
    found: list[str] = ask("bench.data.vision", "bring", absent, root, note=note) if absent else []
    return found


def start(task: Task, work: Work | None) -> ForkServerProcess:
    """Start a worker. `work` runs the job (default: bench.jobs.worker.work)."""
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
    try:
        work(task.results, task.key, task.root, task.slot.device, task.workers, task.retries)
    except OSError as error:  # from the results folder, as errors of the job are in its record; the driver meets it too
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        raise SystemExit(1) from None


def _stopped(number: int, frame: object) -> None:
    """Handler of SIGTERM: no record is written; a training saves its state first (see bench.training.stop_signals)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one request is enough
    stop_signals.handle(number, frame)


def leave_the_driver(files: dict[str, str]) -> None:
    """Give this process a group of its own, so that it can be killed whole and Ctrl-C reaches the driver only. It still
    ends with the driver."""
    os.setsid()
    threading.Thread(target=_die_with_driver, daemon=True).start()
    for name in CARRIED:  # the fork server may belong to another command
        os.environ.pop(name, None)
    os.environ.update(files)


def _die_with_driver() -> None:
    """Kill this process group when the driver is killed: a worker left behind would compete with the next run."""
    driver = multiprocessing.parent_process()
    if driver is not None:
        wait([driver.sentinel])
        os.killpg(0, signal.SIGKILL)


def kill(process: ForkServerProcess, started: Sequence[Any] = ()) -> None:
    """Kill a worker, its process group, and its descendants in other groups; also after it has ended by itself.

    `started`: its descendants that were seen earlier; they cannot be found once it is gone.
    """
    below = [*started, *_below(process)]
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if process.pid is not None:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    for child in below:
        with contextlib.suppress(Exception):  # psutil checks that it is still the same process
            child.kill()
    process.join(timeout=5)


def _below(process: ForkServerProcess) -> list[Any]:
    """The descendants of a worker that is alive."""
    import psutil

    with contextlib.suppress(psutil.Error):
        if process.is_alive():
            return list(psutil.Process(process.pid).children(recursive=True))
    return []


def stop(processes: Iterable[ForkServerProcess], seconds: float) -> None:
    """Ask workers to stop, and kill those that are left after `seconds`, or at once when interrupted."""
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
    """How many processes the kernel has killed for lack of memory in this container or machine; 0 if unknown."""
    counts = [0]
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError, ValueError):
            lines = Path(path).read_text(encoding="utf-8").splitlines()
            counts += [int(line.split()[1]) for line in lines if line.startswith("oom_kill ")]
    return max(counts)
