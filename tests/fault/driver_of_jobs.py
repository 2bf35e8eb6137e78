"""What tests of signals start: `bench run` itself, from its events to its exit code, over jobs that need no torch."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import fake_jobs
from fake_store import matrix

from bench import cli
from bench.commands import run as running
from bench.executors.base import Backend
from bench.executors.devices import Slot
from bench.executors.local import Local
from bench.planning.job import Job
from bench.planning.spec import build
from bench.records.store import Store

JOBS, SLOTS = 6, 3


def jobs() -> list[Job]:
    """Trainings, all ready at once."""
    return matrix(JOBS, 0)


def drive(root: Path) -> int:
    """All of them on three slots; the command's own code takes the signals."""
    spec = build({"threat": {"eps": 0.1}, "defenses": ["standard"], "attacks": ["clean"]})
    matrix = running.Matrix(spec, jobs(), root, [], told=True)

    def chosen(*args: Any) -> Backend:
        return Local(root, [Slot("cpu")] * SLOTS, work=fake_jobs.work)

    running.choose = chosen
    running.tables = lambda *args: None  # they need real records
    return running.run(matrix, root / "results", "plain", check=False)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    folder = Path(sys.argv[1])
    Store(folder / "results").prepare()
    cli.app = lambda: sys.exit(drive(folder))
    cli.main()
