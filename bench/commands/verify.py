"""`bench verify`: parses; bench.jobs.verify verifies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Plugin, Results, existing, plugins
from bench.data.datasets import data_root
from bench.jobs import verify as verifying
from bench.records.store import Store


def verify(
    sample: Annotated[
        float, typer.Option(help="Share of the evaluations with stored images to evaluate again.")
    ] = 0.01,
    full: Annotated[bool, typer.Option("--full", help="Evaluate all of them again.")] = False,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
) -> None:
    """Verify checksums and evaluate stored images again. Exit code 4 if something changed."""
    plugins(plugin)
    raise typer.Exit(verifying.verify(Store(existing(results_dir)), sample, full, data_root(data_dir)))
