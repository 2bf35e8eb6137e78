"""The commands run and plan: spec -> plan -> executor -> tables."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.data import datasets
from bench.executors.base import Backend, todo
from bench.executors.clusters import NO_CLUSTER, THIS_MACHINE, Cluster, Machine
from bench.executors.clusters import backend as choose
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.planning import user_models as imports
from bench.planning.checks import duplicates, inapplicable
from bench.planning.job import EvaluateJob, Job, TrainJob
from bench.planning.options import to_spec
from bench.planning.plan import plan
from bench.planning.spec import Spec, TrainSpec
from bench.planning.typed import Options
from bench.progress import forecast, live
from bench.progress.cost_model import CostModel
from bench.progress.tracker import tracker as follows
from bench.records.runtime_estimate import clock
from bench.records.store import Store

MOST_PROBLEMS = 5  # errors printed at a time
TOLD = {"ok": "jobs run", "skipped": "already done", "error": "failed", "blocked": "blocked"}  # of a stopped run


@dataclass
class Matrix:
    """A planned run: the spec, its jobs, where the data lies, and what was chosen for the user."""

    spec: Spec
    jobs: list[Job]
    root: Path
    notes: list[str]
    told: bool = False  # was it described already?


def prepare(options: Options, data_dir: Path | None) -> Matrix:
    """Options -> jobs. Every error that can be detected is raised here, before anything is written."""
    root = datasets.data_root(data_dir)
    if data_dir is not None and not data_dir.is_dir():
        raise FileNotFoundError(f"no data folder {data_dir}; --data-dir or BENCH_DATA names an existing one")
    spec, found, notes = to_spec(options, root)
    datasets.check(spec.data.name, found, explicit=data_dir is not None)
    return Matrix(spec, plan(spec, found), found, [*notes, *duplicates(spec)])


def describe(matrix: Matrix) -> list[str]:
    """Lines that describe the matrix of a run."""
    spec, jobs = matrix.spec, matrix.jobs
    trains = [job for job in jobs if isinstance(job, TrainJob)]
    if not trains:
        return imports.describe(spec, jobs, matrix.notes)
    models = sorted({job.model.name for job in trains})
    names = list(dict.fromkeys(job.label() for job in trains))
    attacks = list(dict.fromkeys(f"{job.label()} n={job.n}" for job in jobs if isinstance(job, EvaluateJob)))
    budgets = ", ".join(f"{eps} ({float(eps):.4f})" for eps in spec.threat.eps)
    recipe = trains[0].training
    lines = [
        f"data      {spec.data.name}, models {', '.join(models)}, seeds {', '.join(map(str, spec.seeds))}",
        f"threat    {spec.threat.norm} eps {budgets}",
        f"defenses  {'; '.join(names)}",
        f"attacks   {'; '.join(attacks)}" + ("" if spec.data.split == "test" else ", on validation images"),
        f"training  {spec.recipe} recipe: {recipe['epochs']} epochs, {recipe['optimizer']} lr {recipe['lr']:g} "
        f"{recipe['schedule']}, batch {recipe['batch_size']}, {trains[0].data.train} images"
        + (f" less {spec.data.validation} for validation" if spec.data.validation else "")
        + "".join(f", {name} {recipe[name]}" for name in TrainSpec.settings_added_later if name in recipe),
    ]
    absent = [
        f"absent    {attack} on {', '.join(others)}: it needs a {wanted} defense"
        for attack, (wanted, others) in inapplicable(spec).items()
    ]
    return lines + absent + [f"chosen    {note}" for note in matrix.notes]


def show_plan(matrix: Matrix, results: Path, check: bool, machine: Machine = THIS_MACHINE) -> int:
    """Print the matrix, what is done, and estimates of time, disk and memory, from past records or from the cost model;
    returns the exit code. Writes nothing into `results`.

    `check` builds every model and defense too, as a run does.
    """
    backend = Local(matrix.root, machine.slots())
    for line in (*describe(matrix), f"devices   {backend.devices()}"):
        print(line)
    store = Store(results, read_only=True)
    left = todo(matrix.jobs, store)
    kinds = Counter(job.kind for job in matrix.jobs)
    names = {"train": "trainings", "import": "imports", "evaluate": "evaluations", "shard": "shards", "audit": "audits"}
    counted = ", ".join(f"{kinds[kind]} {name}" for kind, name in names.items() if kinds[kind])
    print(
        f"jobs      {len(matrix.jobs)}: {counted}; {len(matrix.jobs) - len(left)} done, {len(left)} to do", flush=True
    )
    problems = check and refused(backend, matrix, store)
    if left:
        forecast.show(left, matrix.jobs, store, matrix.root, backend.slots)
    return 2 if problems else 0


def run(
    matrix: Matrix,
    results: Path,
    mode: str,
    check: bool,
    executor: str = "local",
    machine: Machine = THIS_MACHINE,
    gate: bool = False,
    cluster: Cluster = NO_CLUSTER,
    tracker: str | None = None,
) -> int:
    """Run what is missing and print the tables; gives the exit code.

    0: all done, 1: some jobs failed, 2: `check` found jobs that can never work, nothing was started or written,
    4: nothing failed, but with `gate` a row is UNSOUND or INVALID (one that was NOT CHECKED passes).
    """
    store = Store(results)
    backend = choose(executor, matrix.root, machine, cluster)
    count, device = backend.lanes, backend.kind  # connects to Ray before anything is written
    made = [folder for folder in (results, *results.parents) if not folder.exists()]
    follower = follows(tracker, store)
    store.prepare()
    console = Console(stderr=mode == "json", emoji=False, width=None if sys.stdout.isatty() else 160)
    if mode in ("live", "plain") and not matrix.told:
        for line in (*describe(matrix), f"devices   {backend.devices()}"):
            console.print(live.safe(line), soft_wrap=True)
    model = None
    if executor in ("local", "debug") and mode in ("live", "plain"):  # a cluster's nodes are not timed from here
        model = CostModel(matrix.root, machine.slots()[0])
    view = live.View(console, store, matrix.jobs, mode, count, device, model)
    began = time.monotonic()
    events = drive(backend, matrix.jobs, store)
    if follower is not None:
        events = follower.follow(events)
    try:
        if check and refused(backend, matrix, store):
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            return 2
        view.follow(events)
    except (KeyboardInterrupt, SystemExit) as stop:
        with contextlib.suppress(Exception):
            events.close()  # type: ignore[attr-defined]
        told = ", ".join(f"{view.counts[kind]} {words}" for kind, words in TOLD.items())
        print(f"{told}, {len(view.left)} left", file=sys.stderr)
        print(f"stopped; nothing finished is lost. Resume with:\n  {resume_line()}", file=sys.stderr)
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
    if cluster.detach and view.left:
        note = f"{len(view.left)} jobs are in Slurm's queue; the same command without --detach follows them"
        print(note, file=sys.stderr)
        return 0
    if mode != "json":
        tables(store, matrix, console)
        done = f"{view.counts['ok']} jobs run, {view.counts['skipped']} already done"
        console.print(live.safe(f"{done} in {clock(time.monotonic() - began)}; records in {results}/"), soft_wrap=True)
    failed = view.counts["error"] + view.counts["blocked"]
    if failed:
        print(f"{failed} jobs failed or were blocked; see `bench status --results-dir {results}`", file=sys.stderr)
    if failed:
        return 1
    return 4 if gate and _unsound(store, matrix) else 0


def print_script(matrix: Matrix, results: Path, check: bool, machine: Machine, cluster: Cluster) -> int:
    """Print the batch script of `--executor slurm` and write down what its jobs are; submits nothing."""
    backend = choose("slurm", matrix.root, machine, cluster)
    store = Store(results)
    if check and refused(Local(matrix.root, []), matrix, store):
        return 2
    store.prepare()
    print(backend.script(matrix.jobs, store), end="")  # type: ignore[attr-defined]
    return 0


def _unsound(store: Store, matrix: Matrix) -> bool:
    """Print the rows of this run that `--gate` rejects."""
    from bench.soundness.verdicts import judged_rows
    from bench.tables.ranking import reasons

    keys = [job.key for job in matrix.jobs]
    found = reasons(judged_rows(store, keys, split=None))
    for line in found:
        print(f"gate: {line}", file=sys.stderr)
    return bool(found)


def refused(backend: Backend, matrix: Matrix, store: Store) -> bool:
    """Print a line for each error that would make jobs fail one by one."""
    found = backend.problems(matrix.jobs, store)
    for line in found[:MOST_PROBLEMS]:
        print(f"error: {line}", file=sys.stderr)
    if len(found) > MOST_PROBLEMS:
        print(f"and {len(found) - MOST_PROBLEMS} more like these", file=sys.stderr)
    return bool(found)


def tables(store: Store, matrix: Matrix, console: Console) -> None:
    """The defense x attack table of these jobs."""
    from bench.tables.summary import matrix as table

    live.plain(table(store, [job.key for job in matrix.jobs]), console.print, console.width)


def resume_line() -> str:
    """The command that was typed; the same command resumes."""
    return shlex.join(["bench", *sys.argv[1:]])
