"""Real workers of one small job each, which tests kill or stop at chosen moments.

They come from the fork server of the local executor, which has torch loaded: a fork of the test's own process could
hang, since its threads (heartbeats, OpenMP) hold locks that a forked child inherits.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from bench.executors import processes
from bench.executors.devices import Slot
from bench.jobs import worker
from bench.records.store import Store
from bench.training.resume import Checkpointer

LIMIT = 60.0  # seconds after which a worker counts as hung; its job takes a few


def work_and_save_often(*args: Any) -> str:
    """The worker's function, with a checkpoint every 50 ms and after every epoch."""
    worker.Checkpointer = _often  # type: ignore[assignment, misc]  # in a process of its own
    return worker.work(*args)


def _often(path: Path, origin: Any) -> Checkpointer:
    return Checkpointer(path, origin, every=0.05, at_end=0.0, share=math.inf)


class WorkerProcess:
    """A started worker of one job. Fails the test when the worker runs for longer than LIMIT."""

    def __init__(self, store: Store, key: str, root: Path, work: processes.Work | None = None) -> None:
        modules = ["pytest", "bench.cli", "bench.jobs.worker", "torch._dynamo"]  # no effect on a running server
        multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
        self.process = processes.start(processes.Task(store.root, key, root, Slot("cpu"), 1, []), work)
        self.log = store.folder(key) / "log.txt"
        self.began = time.monotonic()

    def alive(self) -> bool:
        """Whether it still runs."""
        if self.process.is_alive() and time.monotonic() - self.began > LIMIT:
            processes.kill(self.process)
            log = self.log.read_text()[-2000:] if self.log.exists() else "empty"
            pytest.fail(f"the worker hung: no end after {LIMIT:.0f} s. Its log:\n{log}")
        return self.process.is_alive()

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; False if the worker had ended by itself."""
        if not self.alive() or self.process.pid is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        return True

    def kill(self) -> bool:
        """Kill it; False if it had ended by itself before."""
        self.send(signal.SIGKILL)
        return self.end() == -signal.SIGKILL

    def end(self) -> int:
        """Wait for its end: the exit code."""
        while self.alive():
            self.process.join(1)
        assert self.process.exitcode is not None
        return self.process.exitcode
