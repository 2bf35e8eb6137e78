"""What fault tests start and kill: a driver over fake jobs, with system calls that kill it at a named place."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from factories import toy_job
from fake_store import matrix, run, told

from bench.records import leases
from bench.records.record import Record, TrainMetrics
from bench.records.store import Store

# what a store does to a disk, by name: places to die before and after
CALLS = ("mkstemp", "fsync", "chmod", "replace", "link", "unlink", "utime", "mkdir", "open")


def patch(call: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put something around a system call, for all who make it."""
    owner: Any = tempfile if call == "mkstemp" else os
    setattr(owner, call, around(getattr(owner, call)))


def die(call: str, when: str, nth: int) -> None:
    """SIGKILL to this process before or after the n-th such call."""
    count = 0

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **options)
            finally:  # also behind a call that fails, such as the removal of a file that is not there
                if count == nth:
                    os.kill(os.getpid(), signal.SIGKILL)

        return called

    patch(call, around)


def starve(call: str, nth: int) -> None:
    """No space left on the device from the n-th such call on."""
    count = 0

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count >= nth:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **options)

        return called

    patch(call, around)


def no_locks() -> None:
    """As on a file server without locks."""

    def refuse(*args: Any) -> Any:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = fcntl.lockf = os.lockf = refuse  # type: ignore[assignment]


def drive(root: Path, acks: Path, jobs: int, failpoint: tuple[str, str, int] | None = None) -> None:
    """All jobs of a matrix, with a heartbeat as fast as the writes."""
    no_locks()
    leases.BEAT = 0.002
    if failpoint:
        die(*failpoint)
    run(root, matrix(jobs), told(acks))


def write_all(root: Path, count: int, own: int) -> None:
    """`count` records each: the first half those that everybody writes, the others this process's."""
    no_locks()
    store = Store(root)
    order = [*range(count // 2), *range(1000 * (own + 1), 1000 * (own + 1) + count - count // 2)]
    random.shuffle(order)
    for number in order:
        job = toy_job("train", {"seed": number})
        store.add(job)
        store.put(job, Record("done", TrainMetrics(steps=number)))
        record = store.record(job.key)
        if record is None or record.metrics != TrainMetrics(steps=number):
            raise AssertionError(f"record {job.key} of job {number} cannot be read back")


def rewrite(root: Path, output: Path, failpoint: tuple[str, str, int]) -> None:
    """The leaderboard of one folder and of the other, again and again, in one file, until it dies."""
    from bench.tables.leaderboard import write_leaderboard

    die(*failpoint)
    names = ("one", "two") if os.getpid() % 2 else ("two", "one")
    while True:
        for name in names:
            write_leaderboard(Store(root / name), output, root / "tables", [0.0])


def starved(root: Path, call: str, nth: int, answer: Any) -> None:
    """A run for which the disk is full from some moment on; answers with the error."""
    starve(call, nth)
    try:
        run(root, matrix(2))
        answer.send("")
    except OSError as error:
        answer.send(str(error))
