"""`bench run`: options become jobs, the jobs run on an executor, their records become a table."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from bench.commands.arguments import Check, DataDir, Plugin, Results, plugins, warn
from bench.commands.gate import GateOptions, outcomes, write
from bench.commands.matrix import Matrix, prepare
from bench.commands.options import OutputOptions, takes_groups
from bench.commands.output import announce, console_of, print_script, print_table, refused, stopped
from bench.commands.plan import show_plan
from bench.executors.base import Backend, Event
from bench.executors.clusters import Cluster, Machine, choose
from bench.executors.devices import Slot
from bench.executors.driver import drive
from bench.executors.slurm import Slurm
from bench.planning.typed import Options
from bench.progress import live
from bench.progress.cost_model import CostModel
from bench.progress.tracker import tracker as tracker_of
from bench.records.runtime_estimate import clock
from bench.records.store import Store
from bench.terminal import counted, say

OTHERS = {"skipped": "already done", "error": "failed", "blocked": "blocked"}


@takes_groups
def run(
    options: Options,
    machine: Machine,
    cluster: Cluster,
    output: OutputOptions,
    gate: GateOptions,
    executor: Annotated[str, typer.Option(help="local, debug (in this process), slurm or ray.")] = "local",
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
    check: Check = None,
    tracker: Annotated[
        str | None,
        typer.Option(help="Write the scalars of each training for it: tensorboard, wandb, mlflow.", show_default=False),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
) -> None:
    """Train and evaluate a matrix. The same command again resumes; finished jobs are not repeated.

    Example: bench run --defense noisy --eps 8/255
    """
    plugins(plugin)
    machine.seconds()  # a mistake in --time-limit comes before those in the spec
    matrix = prepare(options, data_dir)
    gate.check(matrix.spec)
    backend = choose(executor, matrix.root, machine, cluster, runs=not dry_run)
    if isinstance(backend, Slurm) and backend.asked.pack and not dry_run:
        # which evaluations are short: timed on this machine's CPU, which a node with a GPU is faster than
        backend.cost_model = CostModel(matrix.root, Slot("cpu"))
    if dry_run:
        raise typer.Exit(show_plan(matrix, results_dir, bool(check), backend, output.as_json))
    if cluster.print_script:
        raise typer.Exit(print_script(matrix, backend, results_dir, check is not False))
    mode = output.mode(sys.stdout.isatty())
    raise typer.Exit(run_matrix(matrix, backend, results_dir, mode, check is not False, gate, tracker))


def run_matrix(
    matrix: Matrix,
    backend: Backend,
    results: Path,
    mode: str,
    check: bool,
    gate: GateOptions = GateOptions(),  # noqa: B008 - frozen
    tracker: str | None = None,
    announced: bool = False,
) -> int:
    """Run what is missing and print the table; returns the exit code. `announced`: the matrix was described before.

    0: all done, 1: some jobs failed, 2: `check` found jobs that can never work, nothing was started or written,
    4: nothing failed, but a row fails the `gate`.
    """
    store, began = Store(results), time.monotonic()
    missing = [folder for folder in (results, *results.parents) if not folder.exists()]
    follower = tracker_of(tracker, store)
    warn(store.prepare())
    console = console_of(mode)
    if not announced:
        announce(matrix, backend, mode)
    view = live.View(console, store, matrix.jobs, mode, backend.lanes, backend.kind)
    events = drive(backend, matrix.jobs, store)
    if follower is not None:
        events = follower.follow(events)
    try:
        if not _ready(matrix, backend, view, check):
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            return 2
        view.follow(events)
    except (KeyboardInterrupt, SystemExit) as stop:
        halted(stop, view, events)
    if backend.detach and view.left:
        note = f"{counted(len(view.left), 'job')} in Slurm's queue; the same command without --detach follows"
        say(note, sys.stderr)
        return 0
    keys = [job.key for job in matrix.jobs]
    found = outcomes(store, keys, gate) if mode == "json" or gate.used else []
    if mode == "json":
        for each in found:
            print(json.dumps(each.to_json()), flush=True)
    else:
        print_table(store, keys, console)
        done = f"{counted(view.counts['ok'], 'job')} run, {view.counts['skipped']} already done"
        say(f"{done} in {clock(time.monotonic() - began)}; records in {results}/")
    write(found, gate, matrix.source)
    if failed := view.counts["error"] + view.counts["blocked"]:
        say(f"{counted(failed, 'job')} failed or blocked; see `bench status --results-dir {results}`", sys.stderr)
        return 1
    failures = [line for each in found for line in each.failures.values()] if gate.fails else []
    for line in failures:
        say(f"gate: {line}", sys.stderr)
    return 4 if failures else 0


def halted(stop: KeyboardInterrupt | SystemExit, view: live.View, events: Iterator[Event]) -> NoReturn:
    """End a run that was interrupted: what was done and kept, and the command that resumes."""
    with contextlib.suppress(Exception):
        events.close()  # type: ignore[attr-defined]
    counts = ", ".join(f"{view.counts[kind]} {words}" for kind, words in OTHERS.items())
    lines = [*view.kept(), f"{counted(view.counts['ok'], 'job')} run, {counts}, {len(view.left)} left"]
    stopped(stop, "\n".join([*lines, "stopped; nothing finished is lost. Resume with:"]))


def _ready(matrix: Matrix, backend: Backend, view: live.View, check: bool) -> bool:
    """Print the estimated time, and with `check` the problems that make jobs impossible; False if there are any.

    The estimate comes first if it needs no model to be timed. The nodes of a cluster are not timed from here.
    """
    model = CostModel(matrix.root, backend.slots[0], measure=False) if backend.slots else None
    lines = view.estimate(model)
    for line in lines or ():
        say(line)
    todo, later = ["checking models, defenses and attacks"] * check + ["timing a forward pass"] * (lines is None), None
    with live.waiting(view.console, view.mode if todo else "quiet", ", then ".join(todo)) as note:
        problems = backend.problems(matrix.jobs, view.store, note) if check else []
        if lines is None and not problems:
            later = view.estimate(CostModel(matrix.root, backend.slots[0]))
    for line in later or ():
        say(line)
    return not refused(problems)
