"""What `bench run`, `plan` and `eval` print: the matrix, problems, the table, and how to resume."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from bench.commands.matrix import Matrix, describe
from bench.executors.base import Backend
from bench.progress import live
from bench.records.store import Store

MOST_PROBLEMS = 5  # errors printed at a time


def print_table(store: Store, keys: list[str], console: Console) -> None:
    """Print the defense x attack table of these jobs."""
    from bench.tables.summary import matrix  # with it comes NumPy, which a run that only starts jobs does not need

    live.plain(matrix(store, keys), console.print, console.width)


def gated(store: Store, keys: list[str]) -> bool:
    """Print the rows of these jobs that `--gate` rejects. Returns whether there is any."""
    from bench.soundness.verdicts import judged_rows
    from bench.tables.ranking import reasons

    rejected = reasons(judged_rows(store, keys, split=None))
    for line in rejected:
        print(f"gate: {line}", file=sys.stderr)
    return bool(rejected)


def console_of(mode: str) -> Console:
    """Where a run prints: stderr if its events go to stdout as JSON."""
    return Console(stderr=mode == "json", emoji=False, width=None if sys.stdout.isatty() else 160)


def announce(matrix: Matrix, backend: Backend, console: Console, mode: str) -> None:
    """Describe the matrix and the devices, unless the mode is "quiet" or "json"."""
    if mode in ("live", "plain"):
        for line in (*describe(matrix), f"devices   {backend.devices()}"):
            console.print(live.safe(line), soft_wrap=True)


def stopped(stop: KeyboardInterrupt | SystemExit, message: str) -> NoReturn:
    """End an interrupted command: print a message and the command that was typed, which resumes."""
    print(f"{message}\n  {shlex.join(['bench', *sys.argv[1:]])}", file=sys.stderr)
    raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None


def refused(problems: list[str]) -> bool:
    """Print one line for each error that would make jobs fail. Returns whether there is any."""
    for line in problems[:MOST_PROBLEMS]:
        print(f"error: {line}", file=sys.stderr)
    if len(problems) > MOST_PROBLEMS:
        print(f"and {len(problems) - MOST_PROBLEMS} more like these", file=sys.stderr)
    return bool(problems)


def print_script(matrix: Matrix, backend: Backend, results: Path, check: bool) -> int:
    """Print the batch script of `--executor slurm` and store its jobs; submits nothing."""
    store = Store(results)
    if check and refused(Backend.problems(backend, matrix.jobs, store)):  # Slurm itself may not be installed here
        return 2
    store.prepare()
    print(backend.script(matrix.jobs, store), end="")  # type: ignore[attr-defined]
    return 0
