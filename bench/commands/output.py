"""What `bench run`, `plan` and `eval` print: the matrix, problems, the table, and how to resume."""

from __future__ import annotations

import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rich.console import Console
from rich.table import Table

from bench.commands.matrix import Matrix, describe
from bench.executors.base import Backend
from bench.progress import live
from bench.records.store import Store
from bench.terminal import columns, say, wrapped

if TYPE_CHECKING:
    from bench.tables.summary import Summary

MOST_PROBLEMS = 5  # errors printed at a time
VERDICTS = {"OK": "green", "FLAG": "yellow", "NOT CHECKED": "magenta"}  # others are red


def print_table(store: Store, keys: list[str], console: Console) -> None:
    """Print the defense x attack table of these jobs."""
    from bench.tables.summary import matrix  # with it comes NumPy, which a run that only starts jobs does not need

    show_table(matrix(store, keys), console)


def show_table(table: Summary, console: Console) -> None:
    """Print a table with its notes below. Best values are bold, verdicts colored where the terminal has colors.

    Nothing is cut off: headers wrap, and columns that do not fit beside the first two go into further tables.
    """
    header, rows, notes, best = table
    cells = [max((len(row[k]) for row in rows), default=0) for k in range(len(header))]
    wide = [max(cell, *map(len, name.split())) for cell, name in zip(cells, header, strict=True)]
    names = [textwrap.fill(name, size, break_long_words=False) for name, size in zip(header, wide, strict=True)]
    fixed, groups, used = list(range(min(2, len(header)))), [list[int]()], 0
    for k in range(len(fixed), len(header)):
        used += wide[k] + 3
        if groups[-1] and sum(wide[f] + 3 for f in fixed) + used + 1 > console.width:
            groups.append([])
            used = wide[k] + 3
        groups[-1].append(k)
    for group in groups:
        shown = Table(header_style="bold")
        for k in fixed + group:
            text = header[k] in ("defense", "verdict")
            shown.add_column(live.safe(names[k]), justify="left" if text else "right", overflow="fold", no_wrap=k > 0)
        for place, row in enumerate(rows):
            values = [live.safe(row[k]) for k in fixed + group]
            for k, value in zip(fixed + group, values, strict=True):
                if (place, k) in best:
                    value.stylize("bold")
                elif header[k] == "verdict":
                    value.stylize(VERDICTS.get(row[k].partition(" (")[0], "red"))
            shown.add_row(*values)
        console.print(shown)
    for note in notes:
        console.print(live.safe(wrapped(note, columns())), soft_wrap=True)


def console_of(mode: str) -> Console:
    """Where a run prints: stderr if its events go to stdout as JSON."""
    return Console(stderr=mode == "json", emoji=False, width=None if sys.stdout.isatty() else 160)


def announce(matrix: Matrix, backend: Backend, mode: str) -> None:
    """Describe the matrix and the devices, unless the mode is "quiet" or "json"."""
    if mode in ("live", "plain"):
        for line in (*describe(matrix), f"devices   {backend.devices()}"):
            say(line)


def stopped(stop: KeyboardInterrupt | SystemExit, message: str) -> NoReturn:
    """End an interrupted command: print a message and the command that was typed, which resumes."""
    print(f"{message}\n  {shlex.join(['bench', *sys.argv[1:]])}", file=sys.stderr)
    raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None


def refused(problems: list[str]) -> bool:
    """Print one line for each error that would make jobs fail. Returns whether there is any."""
    for line in problems[:MOST_PROBLEMS]:
        say(f"error: {line}", sys.stderr)
    if len(problems) > MOST_PROBLEMS:
        say(f"and {len(problems) - MOST_PROBLEMS} more like these", sys.stderr)
    return bool(problems)


def print_script(matrix: Matrix, backend: Backend, results: Path, check: bool) -> int:
    """Print the batch script of `--executor slurm` and store its jobs; submits nothing."""
    store = Store(results)
    if check and refused(Backend.problems(backend, matrix.jobs, store)):  # Slurm itself may not be installed here
        return 2
    store.prepare()
    print(backend.script(matrix.jobs, store), end="")  # type: ignore[attr-defined]
    return 0
