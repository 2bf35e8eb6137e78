"""A planned run: its spec and jobs, and their description. Shared by the commands run, plan, eval, status and pack."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.commands.arguments import require_values
from bench.data import datasets
from bench.planning import user_models
from bench.planning.checks import duplicates, inapplicable
from bench.planning.job import EvaluateJob, ImportJob, Job, TrainJob
from bench.planning.options import to_spec
from bench.planning.plan import plan
from bench.planning.spec import Spec, TrainSpec
from bench.planning.typed import Options
from bench.terminal import counted


@dataclass
class Matrix:
    """A planned run. `root`: the data folder; `notes`: what was chosen for the user; `source`: the spec or model file,
    as it was typed, if there is one."""

    spec: Spec
    jobs: list[Job]
    root: Path
    notes: list[str]
    source: str = ""


def prepare(options: Options, data_dir: Path | None) -> Matrix:
    """Options -> jobs. Every error that can be detected is raised here, before anything is written."""
    spec, root, notes = specified(options, data_dir)
    return Matrix(spec, plan(spec, root), root, [*notes, *duplicates(spec)], str(options.spec or ""))


def specified(options: Options, data_dir: Path | None) -> tuple[Spec, Path, list[str]]:
    """Options -> their spec, the data folder, and what was chosen for the user."""
    check_options(options)
    root = datasets.data_root(data_dir)
    if data_dir is not None and not data_dir.is_dir():
        raise FileNotFoundError(f"no data folder {data_dir}; --data-dir or BENCH_DATA names an existing one")
    spec, found, notes = to_spec(options, root)
    datasets.check(spec.data.name, found, explicit=data_dir is not None)
    return spec, found, notes


def check_options(options: Options) -> None:
    """Raises ValueError for a list option without a value and for a number of test images below 1."""
    require_values(model=options.model, eps=options.eps, seeds=options.seeds)
    if options.n is not None and options.n < 1:
        raise ValueError(f"--n is {options.n}; expected at least 1 test image")


def describe(matrix: Matrix) -> list[str]:
    """Lines that describe the matrix of a run."""
    spec, jobs = matrix.spec, matrix.jobs
    trains = [job for job in jobs if isinstance(job, TrainJob)]
    evaluated = dict.fromkeys(f"{job.label()} n={job.n}" for job in jobs if isinstance(job, EvaluateJob))
    threat = f"threat    {spec.threat.norm} eps {', '.join(f'{eps} ({float(eps):.4f})' for eps in spec.threat.eps)}"
    attacks = f"attacks   {'; '.join(evaluated)}" + ("" if spec.data.split == "test" else ", on validation images")
    notes = [f"chosen    {note}" for note in matrix.notes]
    if isinstance(jobs[0], ImportJob):
        return [f"model     {user_models.describe(jobs[0])}", f"data      {spec.data.name}", threat, attacks, *notes]
    recipe = trains[0].training
    lines = [
        f"data      {spec.data.name}, models {', '.join(sorted({job.model.name for job in trains}))}, "
        f"seeds {', '.join(map(str, spec.seeds))}",
        threat,
        f"defenses  {'; '.join(dict.fromkeys(job.label() for job in trains))}",
        attacks,
        f"training  {spec.recipe} recipe: {counted(recipe['epochs'], 'epoch')}, {recipe['optimizer']} "
        f"lr {recipe['lr']:g} {recipe['schedule']}, batch {recipe['batch_size']}, "
        f"{counted(trains[0].data.train, 'image')}"
        + (f" less {spec.data.validation} for validation" if spec.data.validation else "")
        + "".join(f", {name} {recipe[name]}" for name in TrainSpec.settings_added_later if name in recipe),
    ]
    absent = [
        f"absent    {attack} on {', '.join(others)}: it needs a {wanted} defense"
        for attack, (wanted, others) in inapplicable(spec).items()
    ]
    return lines + absent + notes
