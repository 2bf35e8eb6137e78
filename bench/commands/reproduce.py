"""`bench reproduce`: computes what a paper or a repository has published, and compares the two."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from bench.commands.arguments import DataDir, Results
from bench.commands.eval import evaluate, plan_model
from bench.commands.gate import GateOptions
from bench.commands.matrix import Matrix
from bench.commands.options import Only, OutputOptions, takes_groups
from bench.commands.plan import show_plan
from bench.commands.run import run_matrix
from bench.data import datasets
from bench.executors.clusters import Cluster, Machine, choose
from bench.executors.devices import kind
from bench.executors.local import Local
from bench.planning import reproductions
from bench.planning.checkpoints import Checkpoint
from bench.planning.job import EvaluateJob, ImportJob
from bench.planning.plan import plan
from bench.planning.reproductions import WORST, Published, Reproduction
from bench.planning.spec import Spec
from bench.planning.typed import ModelOptions
from bench.records.store import Store
from bench.terminal import counted, say

HEADER = ("", "published", "ours", "95 % interval", "n", "")


class Compared(NamedTuple):
    """One published figure beside ours, an accuracy in percent with its 95 % interval over n images (NaN if absent)."""

    published: Published
    ours: float
    low: float
    high: float
    n: int

    @property
    def agrees(self) -> bool | None:
        """Is ours within the tolerance? None where there is no number of ours."""
        return None if math.isnan(self.ours) else self.published.holds(self.ours)

    def __str__(self) -> str:
        """The outcome in words."""
        if self.agrees is None:
            return "no number of ours"
        if self.published.value is None:
            return "holds" if self.agrees else "DOES NOT HOLD"
        return f"{'within' if self.agrees else 'NOT within'} {self.published.tolerance:g}"


class Planned(NamedTuple):
    """A reproduction that can run. `imported`: the import of a published model, `checkpoint`: its file."""

    matrix: Matrix
    imported: ImportJob | None
    checkpoint: Checkpoint | None


@takes_groups
def reproduce(
    machine: Annotated[Machine, Only(("workers", "device"))],
    output: OutputOptions,
    name: Annotated[
        str | None, typer.Argument(help="One that is listed without a NAME, or a YAML file.", show_default=False)
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All that this machine can run.")] = False,
    zoo: Annotated[
        Path | None, typer.Option(help="Folder of published models, which you bring.", envvar="BENCH_ZOO")
    ] = None,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
) -> None:
    """Compare published numbers with ours. Exit code 1 if a number is not within its tolerance.

    Example: bench reproduce wong_mnist --zoo models
    """
    if name is not None and every:
        raise ValueError(f"--all and the name '{name}'; give one of them")
    loaded = [reproductions.load(each) for each in (reproductions.names() if name is None else [name])]
    gpu = kind(machine.slots()) == "cuda"
    if name is None and not every:
        for each, entry, _ in loaded:
            say(f"{each:20} {entry.title}; {_obstacle(entry, zoo, gpu) or 'can run here'}")
        return
    mode = output.mode(sys.stdout.isatty())
    codes, tables = list[int](), list[tuple[str, Reproduction, list[Compared]]]()
    for each, entry, spec in loaded:
        obstacle = _obstacle(entry, zoo, gpu) if every else entry.model.problem(zoo) if entry.model else ""
        if obstacle and not every:
            raise ValueError(f"{each}: {obstacle}")
        if obstacle:
            say(f"{each} is left out: {obstacle}", sys.stderr)
            continue
        planned = _plan(each, entry, spec, zoo, data_dir)
        if dry_run:
            backend = Local(planned.matrix.root, machine.slots())
            codes.append(show_plan(planned.matrix, results_dir, False, backend, output.as_json))
            continue
        codes.append(_run(planned, results_dir, mode, machine))
        tables.append((each, entry, compare(entry, planned, Store(results_dir, read_only=True))))
    for each, entry, found in tables:
        _show(each, entry, found, mode)
    if not codes:
        say("nothing could be compared", sys.stderr)
    agree = all(one.agrees for _, _, found in tables for one in found)
    raise typer.Exit(max([*codes, 0 if codes and agree else 1]))


def _obstacle(entry: Reproduction, zoo: Path | None, gpu: bool) -> str:
    """Why a reproduction is left out where all are asked for; empty if it can run."""
    if entry.needs == "gpu" and not gpu:
        return "it needs a GPU (on a CPU it takes days; its name runs it all the same)"
    return entry.model.problem(zoo) if entry.model else ""


def _plan(name: str, entry: Reproduction, spec: Spec, zoo: Path | None, data_dir: Path | None) -> Planned:
    """The jobs of a reproduction. Raises in one line, also for a figure of an attack that the spec lacks."""
    root = datasets.data_root(data_dir)
    datasets.check(spec.data.name, root, explicit=data_dir is not None)
    if entry.model is None:
        planned = Planned(Matrix(spec, plan(spec, root), root, []), None, None)
    else:
        assert zoo is not None
        model = ModelOptions(str(zoo / entry.model.file), checkpoint=str(zoo / entry.model.checkpoint), name=name)
        planned = Planned(*plan_model(model, spec, root, []))
    known = [WORST, *dict.fromkeys(job.label() for job in planned.matrix.jobs if isinstance(job, EvaluateJob))]
    for figure in entry.published:
        if figure.of not in known:
            raise ValueError(f"{name}: published is '{figure.of}', which its spec does not compute: {', '.join(known)}")
    return planned


def _run(planned: Planned, results: Path, mode: str, machine: Machine) -> int:
    """Run what is missing, as `bench run` and `bench eval` do; returns the exit code."""
    matrix, imported, checkpoint = planned
    if imported is None:
        return run_matrix(matrix, choose("local", matrix.root, machine, Cluster()), results, mode, check=True)
    return evaluate(matrix, imported, checkpoint, None, Store(results), mode, machine, GateOptions())


def compare(entry: Reproduction, planned: Planned, store: Store) -> list[Compared]:
    """The published figures beside those of the records."""
    from bench.soundness.verdicts import judged_rows  # with it comes NumPy

    jobs = [job for job in planned.matrix.jobs if isinstance(job, EvaluateJob)]
    labels = {job.key: job.label() for job in jobs}
    rows = judged_rows(store.snapshot(), [job.key for job in planned.matrix.jobs])
    found = []
    for figure in entry.published:
        cells = [row.accuracy.worst for row in rows if figure.of == WORST]
        for row in rows:
            every = {"clean": row.accuracy.clean, **row.accuracy.attacks}
            for name, seeds in row.provenance.entries.items():
                if any(labels.get(one.key) == figure.of for one in seeds.values()) and name in every:
                    cells.append(every[name])
        cell = next((cell for cell in cells if cell.values), None)
        if cell is None:
            found.append(Compared(figure, math.nan, math.nan, math.nan, 0))
        else:
            low, high = cell.interval()
            found.append(Compared(figure, 100 * cell.mean, 100 * low, 100 * high, cell.n))
    return found


def _show(name: str, entry: Reproduction, found: list[Compared], mode: str) -> None:
    """Print the comparison: an event in JSON, otherwise a table with what it rests on."""
    if mode == "json":
        print(json.dumps({"event": "reproduced", **as_json(name, entry, found)}), flush=True)
        return
    from bench.tables.text import aligned, decimals, printed

    lines = [list(HEADER)]
    for one in found:
        figure, ours, low, high, n = one
        bound = f"at least {figure.at_least:.2f}" if figure.value is None else f"{figure.value:.2f}"
        interval = f"{decimals(low, 2)} to {decimals(high, 2)}" if n else "–"
        number = str(n) if n == figure.n else f"{n} (published {figure.n})"
        lines.append([figure.of, bound, decimals(ours, 2), interval, number, str(one)])
    print(printed(["", f"{name}: {entry.title}", *aligned(lines)]))
    for word, text in (("source", entry.source), ("tolerance", entry.tolerance), ("deviations", entry.deviations)):
        say(f"{word:10} {text}")
    count = sum(bool(one.agrees) for one in found)
    say(f"{count} of {counted(len(found), 'published number')} reproduced")


def as_json(name: str, entry: Reproduction, found: list[Compared]) -> dict[str, Any]:
    """The comparison as plain values; null where there is no number."""
    numbers = [
        {
            "of": one.published.of,
            "published": one.published.value,
            "at_least": one.published.at_least,
            "published_n": one.published.n,
            "tolerance": one.published.tolerance,
            **{
                key: None if math.isnan(each) else each
                for key, each in (("ours", one.ours), ("low", one.low), ("high", one.high))
            },
            "n": one.n,
            "agrees": one.agrees,
        }
        for one in found
    ]
    about = {"title": entry.title, "source": entry.source, "tolerance": entry.tolerance}
    return {"name": name, **about, "deviations": entry.deviations, "numbers": numbers}
