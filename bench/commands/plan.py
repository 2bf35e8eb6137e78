"""`bench plan`: the jobs of a matrix, which of them are done, and estimates for the rest."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Check, DataDir, Plugin, Results, plugins, warn
from bench.commands.matrix import Matrix, describe, prepare
from bench.commands.options import Only, takes_groups
from bench.commands.output import refused
from bench.executors.base import todo
from bench.executors.clusters import Machine
from bench.executors.local import Local
from bench.planning.typed import Options
from bench.progress import forecast
from bench.records.store import Store
from bench.terminal import counted, say

NOUNS = {"train": "training", "import": "import", "evaluate": "evaluation", "shard": "shard", "audit": "audit"}


@takes_groups
def plan(
    options: Options,
    machine: Annotated[Machine, Only(("workers", "jobs_per_gpu", "gpus", "device"))],
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
    check: Check = None,
) -> None:
    """Show what the same `bench run` would do. The jobs, which are done, the time of the rest; writes no result."""
    plugins(plugin)
    raise typer.Exit(show_plan(prepare(options, data_dir), results_dir, bool(check), machine))


def show_plan(matrix: Matrix, results: Path, check: bool, machine: Machine) -> int:
    """Print the matrix, what is done, and estimates of time, disk and memory, from past records or from the cost model;
    returns the exit code. Writes nothing into `results`.

    `check` builds every model and defense too, as a run does.
    """
    backend = Local(matrix.root, machine.slots())
    for line in (*describe(matrix), f"devices   {backend.devices()}"):
        say(line)
    store = Store(results, read_only=True)
    warn(store.damages())
    left = todo(matrix.jobs, store)
    kinds = Counter(job.kind for job in matrix.jobs)
    each = ", ".join(counted(kinds[kind], noun) for kind, noun in NOUNS.items() if kinds[kind])
    done = len(matrix.jobs) - len(left)
    say(f"jobs      {len(matrix.jobs)}: {each}; {done} done, {len(left)} to do")
    problems = check and refused(backend.problems(matrix.jobs, store))
    if left:
        forecast.show(left, matrix.jobs, store, matrix.root, backend.slots)
    return 2 if problems else 0
