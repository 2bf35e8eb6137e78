"""What tests of signals start: `bench run` itself, from its events to its exit code, over jobs that need no torch."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import fake_jobs
from fake_store import matrix

from bench import cli
from bench.commands import run
from bench.commands.matrix import Matrix
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
    run.print_table = lambda *args: None  # it needs real records
    backend = Local(root, [Slot("cpu")] * SLOTS, work=fake_jobs.work)
    return run.run_matrix(Matrix(spec, jobs(), root, []), backend, root / "results", "plain", False, announced=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started deaf to it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and those of nohup to this one
    folder = Path(sys.argv[1])
    Store(folder / "results").prepare()
    cli.app = lambda: sys.exit(drive(folder))
    cli.main()
