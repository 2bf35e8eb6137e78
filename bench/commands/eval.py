"""`bench eval`: loads a model of the user's, measures its clean accuracy, then attacks it as any other."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Plugin, Results, plugins
from bench.commands.gate import GateOptions
from bench.commands.matrix import Matrix, check_options
from bench.commands.options import Only, OutputOptions, takes_groups
from bench.commands.output import announce, console_of, refused, stopped
from bench.commands.plan import show_plan
from bench.commands.run import run_matrix
from bench.core.stats import wilson
from bench.data import datasets
from bench.executors import processes
from bench.executors.base import todo
from bench.executors.clusters import Machine
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.planning import user_models
from bench.planning.checkpoints import Checkpoint
from bench.planning.checks import check_counts
from bench.planning.job import ImportJob, Job
from bench.planning.options import to_spec
from bench.planning.spec import Spec
from bench.planning.typed import ModelOptions, Options
from bench.progress import live
from bench.records.record import TrainMetrics, train_metrics
from bench.records.store import Store
from bench.terminal import counted, say

TOLERANCE = 0.01  # deviation from the claimed accuracy that is accepted even outside the interval of the measurement


@takes_groups
def eval_(
    model: ModelOptions,
    options: Annotated[Options, Only(("dataset", "size", "attack", "norm", "eps", "n", "set", "checks"))],
    machine: Annotated[Machine, Only(("workers", "device"))],
    output: OutputOptions,
    gate: GateOptions,
    name: Annotated[str | None, typer.Option(help="Name of the row (default: that of the file).")] = None,
    expect_clean: Annotated[
        str | None, typer.Option(help="Claimed clean accuracy, such as 0.842; attacks run only if it is reproduced.")
    ] = None,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load it, show the plan and write nothing.")] = False,
) -> None:
    """Attack a model of your own like any other. Same attacks, store and tables; the same command again resumes.

    Example: bench eval net.safetensors --arch mlp --dataset digits --eps 0.1
    """
    plugins(plugin)
    check_options(options)
    expected = expectation(expect_clean)
    # a spec must name a defense; the imported model takes its place
    options = replace(options, defense=["standard"], baseline=False)
    matrix, job, checkpoint = prepare_model(replace(model, name=name), options, data_dir)
    gate.check(matrix.spec)
    store = Store(results_dir)
    mode = output.mode(sys.stdout.isatty())
    if job in todo(matrix.jobs, store):
        with live.waiting(console_of(mode), mode, f"loading {user_models.describe(job).partition(',')[0]}"):
            note = _loaded(job, checkpoint, matrix.root)
        matrix.notes.append(note)
    if dry_run:
        backend = Local(matrix.root, machine.slots())
        raise typer.Exit(show_plan(matrix, results_dir, False, backend, output.as_json))
    raise typer.Exit(evaluate(matrix, job, checkpoint, expected, store, mode, machine, gate))


def prepare_model(
    model: ModelOptions, options: Options, data_dir: Path | None
) -> tuple[Matrix, ImportJob, Checkpoint | None]:
    """Options -> the import of the model and its evaluations. Raises in one line; writes nothing."""
    spec, root, notes = to_spec(options, datasets.data_root(data_dir), stochastic=model.randomised)
    if spec.train.model_fields_set or any(entry.set for entry in spec.defenses):
        raise ValueError("--set of `bench eval` is for attacks, such as pgd.steps=40; --arch-set for the architecture")
    datasets.check(spec.data.name, root, explicit=data_dir is not None)
    return plan_model(model, spec, root, [note for note in notes if not note.startswith("defense")])


def plan_model(
    model: ModelOptions, spec: Spec, root: Path, notes: list[str]
) -> tuple[Matrix, ImportJob, Checkpoint | None]:
    """The import of a model and the evaluations of a spec on it. Raises in one line; writes nothing."""
    facts = datasets.facts(spec.data.name, root, spec.data.size)
    check_counts(spec, facts)
    job, checkpoint = user_models.import_job(model, facts)
    source = str(model.model or model.model_file or model.checkpoint or "").partition(":")[0]
    return Matrix(spec, user_models.jobs(job, spec, facts), root, notes, source), job, checkpoint


def evaluate(
    matrix: Matrix,
    job: ImportJob,
    checkpoint: Checkpoint | None,
    expected: float | None,
    store: Store,
    mode: str,
    machine: Machine,
    gate: GateOptions,
) -> int:
    """Import the model, measure its clean accuracy, and attack it if it is the expected one; returns the exit code, 4
    if it is not."""
    backend = Local(matrix.root, machine.slots())
    if refused(backend.problems(matrix.jobs, store)):
        return 2
    store.prepare()
    store.add(job)
    if checkpoint is not None and job in todo(matrix.jobs, store):
        copy = store.folder(job.key) / user_models.SOURCE
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.path, copy)
        if checkpoint.origin is not None:
            (store.folder(job.key) / user_models.ORIGIN).write_text(checkpoint.origin, encoding="utf-8")
    announce(matrix, backend, mode)
    needed: list[Job] = [each for each in todo(matrix.jobs, store) if each.key == job.key]
    try:
        live.View(console_of(mode), store, needed, mode, 1).follow(drive(backend, needed, store))
    except (KeyboardInterrupt, SystemExit) as stop:
        stopped(stop, "stopped; resume with:")
    record = store.record(job.key)
    if record is None or record.state != "done":
        if mode in ("quiet", "json"):
            say(f"error: {record.problem if record else 'the import has no record'}", sys.stderr)
        return 1
    problem = _clean(job, train_metrics(record), expected, mode)
    if problem is not None:
        say(f"error: {problem}", sys.stderr)
        return 4
    return run_matrix(matrix, backend, store.root, mode, check=False, gate=gate, announced=True)


def _loaded(job: ImportJob, checkpoint: Checkpoint | None, root: Path) -> str:
    """Load the model once in a child process, so that a model that does not fit is an error before anything is
    written."""
    facts = datasets.facts(job.data.name, root, job.data.size)
    return str(processes.ask("bench.jobs.user_model", "check", job, facts, checkpoint and checkpoint.path))


def _clean(job: ImportJob, metrics: TrainMetrics, expected: float | None, mode: str) -> str | None:
    """Print the clean accuracy. Returns the error message if it is not the expected one."""
    found, n = metrics.clean_accuracy or 0.0, metrics.clean_n or 0
    low, high = wilson(round(found * n), n)
    fits = expected is None or abs(found - expected) <= TOLERANCE + 1e-9 or low <= expected <= high
    if mode == "json":
        line = {"event": "clean", "key": job.key, "accuracy": found, "n": n, "expected": expected, "fits": fits}
        print(json.dumps(line), flush=True)
    elif mode != "quiet":
        where = f"on the first {counted(n, 'test image')} (95 % interval {low:.4f} to {high:.4f})"
        text = f"clean accuracy {found:.4f} {where}"
        say(text)
    if expected is None or fits:
        return None
    known = datasets.KNOWN.get(job.data.name)
    chance = 1 / (known.classes if known else 2)
    likely = "class order, or weights of another task" if found < 1.5 * chance else "input range or normalization"
    if found > expected:
        likely = "other weights or other test images than claimed"
    return (
        f"clean accuracy is {found:.4f} on {counted(n, 'image')}, expected {expected:g} (tolerance {TOLERANCE:g} or "
        f"the interval {low:.4f} to {high:.4f}); likely {likely}: the same MODEL options with `bench doctor` say which"
    )


def expectation(text: str | None) -> float | None:
    """The accuracy of --expect-clean. Raises ValueError in one line."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"--expect-clean is '{text}'; expected a share from 0 to 1, such as 0.842")
    return value
