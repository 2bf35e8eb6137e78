"""`bench status`: parses; bench.progress.status prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Results, opened
from bench.commands.matrix import prepare
from bench.data.datasets import data_root
from bench.planning.typed import Options
from bench.progress import status as survey

SpecFile = Annotated[Path | None, typer.Argument(help="A YAML spec; only its jobs are shown.", show_default=False)]


def status(
    results_dir: Results = Path("results"),
    spec: SpecFile = None,
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show which jobs are done, running and failed. Works during a run, from another terminal."""
    planned = prepare(Options(spec=spec), data_dir).jobs if spec else []
    survey.status(opened(results_dir), planned, as_json, data_root(data_dir))
