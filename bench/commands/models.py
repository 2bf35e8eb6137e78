"""The commands about a model of the user's: eval and doctor. As bench.cli, free of torch until one needs it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Dataset, Plugin, Results, Size, plugins, typed
from bench.commands.options import MachineOptions, ModelOptions, Only, OutputOptions, takes_groups
from bench.planning.typed import Options


@takes_groups
def eval_(
    asked: ModelOptions,
    options: Annotated[Options, Only(("dataset", "size", "attack", "norm", "eps", "n", "set", "checks"))],
    machine: Annotated[MachineOptions, Only(("workers", "device"))],
    output: OutputOptions,
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
    from bench.commands import eval_model as importing

    plugins(plugin)
    typed(eps=options.eps, attack=options.attack)
    if options.n is not None and options.n < 1:
        raise ValueError(f"--n is {options.n}; expected at least 1 test image")
    expected = importing.expectation(expect_clean)
    # a spec must name a defense; the imported model takes its place
    options = replace(options, defense=["standard"], baseline=False)
    matrix, found = importing.prepare(replace(asked, name=name), options, data_dir)
    mode = output.mode(sys.stdout.isatty())
    code = importing.evaluate(matrix, found, expected, results_dir, mode, machine.workers, machine.device, dry_run)
    raise typer.Exit(code)


@takes_groups
def doctor(
    asked: ModelOptions,
    dataset: Dataset = None,
    size: Size = None,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Check this machine, or a model of yours. For a MODEL: input range, normalization, class order."""
    from bench.commands import list_and_check as listing

    if not asked.given:
        if as_json or dataset is not None or size is not None:
            raise ValueError("--json, --dataset and --size of `bench doctor` go with a MODEL")
        raise typer.Exit(listing.doctor(results_dir, data_dir))
    from bench.commands import diagnose as diagnosing

    raise typer.Exit(diagnosing.diagnose(asked, dataset or "digits", size, data_dir, as_json))
