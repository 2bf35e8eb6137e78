"""`bench doctor`: checks of this machine, or of a model of the user's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Dataset, Results, Size
from bench.commands.options import takes_groups
from bench.planning.typed import ModelOptions


@takes_groups
def doctor(
    model: ModelOptions,
    dataset: Dataset = None,
    size: Size = None,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")] = False,
) -> None:
    """Check this machine, or a model of yours. For a MODEL: input range, normalization, class order."""
    if model.given:
        from bench.commands.diagnose import diagnose

        raise typer.Exit(diagnose(model, dataset or "digits", size, data_dir, as_json))
    if as_json or dataset is not None or size is not None:
        raise ValueError("--json, --dataset and --size of `bench doctor` go with a MODEL")
    from bench.doctor import machine

    lines = machine.lines(results_dir, data_dir)
    for state, text in lines:
        print(f"{state:4}  {text}")
    raise typer.Exit(3 if any(state == "FAIL" for state, _ in lines) else 0)
