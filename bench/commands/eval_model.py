"""The command `bench eval`: load a model of the user's, measure its clean accuracy, then attack it as any row."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.commands import run as running
from bench.commands.options import ModelOptions
from bench.core.stats import wilson
from bench.data import datasets
from bench.executors import processes
from bench.executors.base import todo
from bench.executors.clusters import Machine
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.planning import user_models as imports
from bench.planning.checks import check_counts
from bench.planning.job import ImportJob, Job
from bench.planning.options import to_spec
from bench.planning.typed import Options
from bench.progress import live
from bench.records.store import Store

TOLERANCE = 0.01  # one point: what a claim may be off, beside the interval of the measurement


def named(asked: ModelOptions, facts: datasets.Facts) -> imports.Model:
    """The model, checked as far as that goes without torch; its file becomes known to every worker."""
    model = imports.named(
        asked.model,
        asked.checkpoint,
        asked.arch,
        asked.arch_set,
        asked.model_file,
        asked.normalise,
        asked.randomised,
        asked.name,
        facts,
    )
    os.environ.pop(imports.MODEL_FILE, None)
    if model.file is not None:
        os.environ[imports.MODEL_FILE] = str(model.file.resolve())
    return model


def prepare(asked: ModelOptions, options: Options, data_dir: Path | None) -> tuple[running.Matrix, imports.Model]:
    """Options -> the import and its evaluations. Raises in one line; writes nothing."""
    root = datasets.data_root(data_dir)
    spec, root, notes = to_spec(options, root)
    if spec.train.model_fields_set or any(entry.set for entry in spec.defenses):
        raise ValueError("--set of `bench eval` is for attacks, such as pgd.steps=40; --arch-set for the architecture")
    datasets.check(spec.data.name, root, explicit=data_dir is not None)
    facts = datasets.facts(spec.data.name, root, spec.data.size)
    check_counts(spec, facts)
    model = named(asked, facts)
    notes = [note for note in notes if not note.startswith("defense")]
    return running.Matrix(spec, imports.jobs(model, spec, facts), root, notes), model


def evaluate(
    matrix: running.Matrix,
    model: imports.Model,
    expected: float | None,
    results: Path,
    mode: str,
    workers: int | None,
    device: str,
    dry_run: bool,
) -> int:
    """Load, measure, and attack what fits; gives the exit code. 4: the clean accuracy is not the expected one."""
    (job,) = [each for each in matrix.jobs if isinstance(each, ImportJob)]
    store = Store(results)
    machine = Machine(device, workers)
    if job in todo(matrix.jobs, store):
        matrix.notes.append(_checked(job, model, matrix.root))
    if dry_run:
        return running.show_plan(matrix, results, False, machine)
    backend = Local(matrix.root, machine.slots())
    if running.refused(backend, matrix, store):
        return 2
    store.prepare()
    store.add(job)
    if model.checkpoint is not None and job in todo(matrix.jobs, store):
        copy = store.folder(job.key) / imports.SOURCE
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(model.checkpoint, copy)
    console = Console(stderr=mode == "json", emoji=False, width=None if sys.stdout.isatty() else 160)
    needed: list[Job] = [each for each in todo(matrix.jobs, store) if isinstance(each, ImportJob)]
    view = live.View(console, store, needed, mode, 1)
    if mode in ("live", "plain"):
        matrix.told = True
        for line in (*running.describe(matrix), f"devices   {backend.devices()}"):
            console.print(live.safe(line), soft_wrap=True)
    try:
        view.follow(drive(backend, needed, store))
    except (KeyboardInterrupt, SystemExit) as stop:
        print(f"stopped; resume with:\n  {running.resume_line()}", file=sys.stderr)
        raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else stop.code) from None
    record = store.record(job.key)
    if record is None or record["state"] != "done":
        return _failed(record, mode)
    problem = _clean(job, record["metrics"], expected, console, mode)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return 4
    return running.run(matrix, results, mode, False, machine=machine)


def _checked(job: ImportJob, model: imports.Model, root: Path) -> str:
    """Load the model once in a child, so that what does not fit is one line before anything is written."""
    facts = datasets.facts(job.data.name, root, job.data.size)
    return str(processes.ask("bench.jobs.user_model", "check", job, facts, model.checkpoint))


def _failed(record: dict[str, Any] | None, mode: str) -> int:
    if mode == "quiet" or mode == "json":
        error = (record or {}).get("error", {})
        print(f"error: {error.get('type')}: {error.get('message')}", file=sys.stderr)
    return 1


def _clean(job: ImportJob, metrics: dict[str, Any], expected: float | None, console: Console, mode: str) -> str | None:
    """Say what was measured; gives the one line of a claim that it does not bear out."""
    found, n = metrics["clean_accuracy"], metrics["clean_n"]
    low, high = wilson(round(found * n), n)
    fits = expected is None or abs(found - expected) <= TOLERANCE + 1e-9 or low <= expected <= high
    if mode == "json":
        line = {"event": "clean", "key": job.key, "accuracy": found, "n": n, "expected": expected, "fits": fits}
        print(json.dumps(line), flush=True)
    elif mode != "quiet":
        said = f"clean accuracy {found:.4f} on the first {n} test images (95 % interval {low:.4f} to {high:.4f})"
        console.print(live.safe(said), soft_wrap=True)
    if fits:
        return None
    classes = datasets.KNOWN[job.data.name].classes if job.data.name in datasets.KNOWN else 2
    likely = "class order, or weights of another task" if found < 1.5 / classes else "input range or normalization"
    if expected is not None and found > expected:
        likely = "other weights or other test images than claimed"
    return (
        f"clean accuracy is {found:.4f} on {n} images, expected {expected:g} (tolerance {TOLERANCE:g} or the interval "
        f"{low:.4f} to {high:.4f}); likely {likely}: the same MODEL options with `bench doctor` say which"
    )


def expectation(text: str | None) -> float | None:
    """The share of --expect-clean. Raises ValueError in one line."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ValueError(f"--expect-clean is '{text}'; expected a share from 0 to 1, such as 0.842")
    return value
