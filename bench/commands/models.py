"""The commands about a model of the user's: eval and doctor. As bench.cli, free of torch until one needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import (
    Arch,
    ArchSet,
    Checkpoint,
    DataDir,
    Dataset,
    Model,
    ModelFile,
    Normalised,
    Plugin,
    Randomised,
    Results,
    Size,
    plugins,
    typed,
)
from bench.planning.typed import Options


def eval_(
    model: Model = None,
    checkpoint: Checkpoint = None,
    arch: Arch = None,
    arch_set: ArchSet = None,
    model_file: ModelFile = None,
    normalise: Normalised = None,
    randomised: Randomised = False,
    name: Annotated[str | None, typer.Option(help="Name of the row (default: that of the file).")] = None,
    expect_clean: Annotated[
        str | None, typer.Option(help="Claimed clean accuracy, such as 0.842; no attack unless it is measured.")
    ] = None,
    dataset: Dataset = None,
    size: Size = None,
    attack: Annotated[list[str] | None, typer.Option(help="Repeat or separate by commas.")] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1.")] = None,
    eps: Annotated[list[str] | None, typer.Option(help="Budgets attacked, such as 8/255 or 0.1,0.2.")] = None,
    n: Annotated[int | None, typer.Option(help="Test images attacked (default: all).")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of an attack: pgd.steps=40.")] = None,
    checks: Annotated[str | None, typer.Option(help="Soundness checks: quick, full or off (default: quick).")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Jobs at a time.")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Load it, show the plan and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors and the final table only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON event a line on stdout.")] = False,
) -> None:
    """Attack a model of your own like any other. Same attacks, store and tables; the same command again resumes.

    Example: bench eval net.safetensors --arch mlp --dataset digits --eps 0.1
    """
    from bench.commands import eval_model as importing

    plugins(plugin)
    typed(eps=eps, attack=attack)
    if n is not None and n < 1:
        raise ValueError(f"--n is {n}; expected at least 1 test image")
    expected = importing.expectation(expect_clean)
    options = Options(
        dataset=dataset,
        size=size,
        defense=["standard"],  # stands where a spec must name one; the import takes its place
        attack=attack or [],
        norm=norm,
        eps=eps or [],
        n=n,
        set=set_ or [],
        baseline=False,
        checks=checks,
    )
    asked = importing.ModelOptions(model, checkpoint, arch, arch_set or [], model_file, normalise, randomised, name)
    matrix, found = importing.prepare(asked, options, data_dir)
    mode = "json" if as_json else "quiet" if quiet else "live" if sys.stdout.isatty() else "plain"
    raise typer.Exit(importing.evaluate(matrix, found, expected, results_dir, mode, workers, device, dry_run))


def doctor(
    model: Model = None,
    checkpoint: Checkpoint = None,
    arch: Arch = None,
    arch_set: ArchSet = None,
    model_file: ModelFile = None,
    normalise: Normalised = None,
    randomised: Randomised = False,
    dataset: Dataset = None,
    size: Size = None,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Check this machine, or a model of yours. Is the MODEL fed and read as it expects? Each line OK, WARN or FAIL."""
    from bench.commands import list_and_check as listing

    if all(word is None for word in (model, checkpoint, arch, model_file, normalise)) and not arch_set:
        if as_json or dataset is not None or size is not None:
            raise ValueError("--json, --dataset and --size of `bench doctor` go with a MODEL")
        raise typer.Exit(listing.doctor(results_dir, data_dir))
    from bench.commands import diagnose as diagnosing
    from bench.commands import eval_model as importing

    asked = importing.ModelOptions(model, checkpoint, arch, arch_set or [], model_file, normalise, randomised)
    raise typer.Exit(diagnosing.diagnose(asked, dataset or "digits", size, data_dir, as_json))
