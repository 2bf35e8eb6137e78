"""`bench plan`: the jobs of a matrix, which of them are done, and estimates for the rest."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Check, DataDir, Plugin, Results, plugins, warn
from bench.commands.matrix import Matrix, describe, prepare
from bench.commands.options import Only, takes_groups
from bench.commands.output import refused
from bench.executors.base import Backend, todo
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
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what the same `bench run` would do. The jobs, which are done, time and device hours; writes no result."""
    plugins(plugin)
    matrix = prepare(options, data_dir)
    raise typer.Exit(show_plan(matrix, results_dir, bool(check), Local(matrix.root, machine.slots()), as_json))


def show_plan(matrix: Matrix, results: Path, check: bool, backend: Backend, as_json: bool = False) -> int:
    """Print the matrix, what is done, and estimates of time, device hours, disk and memory, from past records or from
    the cost model; returns the exit code. Writes nothing into `results`.

    `check` builds every model and defense too, as a run does.
    """
    if not as_json:
        for line in (*describe(matrix), f"devices   {backend.devices()}"):
            say(line)
    store = Store(results, read_only=True)
    warn(store.damages())
    left = todo(matrix.jobs, store)
    kinds = Counter(job.kind for job in matrix.jobs)
    each = ", ".join(counted(kinds[kind], noun) for kind, noun in NOUNS.items() if kinds[kind])
    done = len(matrix.jobs) - len(left)
    if not as_json:
        say(f"jobs      {len(matrix.jobs)}: {each}; {done} done, {len(left)} to do")
    problems = check and refused(Backend.problems(backend, matrix.jobs, store))  # Slurm itself may not be here
    lines, known = forecast.survey(left, matrix.jobs, store, matrix.root, backend)
    if as_json:
        counts = {"jobs": len(matrix.jobs), "kinds": dict(kinds), "done": done, "todo": len(left)}
        print(json.dumps({**counts, "devices": backend.devices(), "slots": backend.lanes, **known}))
    for line in lines if not as_json else ():
        say(line)
    return 2 if problems else 0
