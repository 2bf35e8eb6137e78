"""`bench timing`: parses and prints; bench.tables.timing makes the table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Dataset, Plugin, Results, opened, plugins
from bench.tables.leaderboard import board
from bench.tables.timing import show


def timing(
    results_dir: Results = Path("results"),
    dataset: Dataset = None,
    plugin: Plugin = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show the cost of trainings and attacks. Seconds, work and memory, separately for each device."""
    plugins(plugin)
    rows = board(opened(results_dir))
    known = sorted({row.dataset for row in rows})
    if dataset is not None and dataset not in known:
        raise LookupError(f"no row has data set {dataset}; there are: {', '.join(known) or 'none'}")
    print(show([row for row in rows if dataset in (None, row.dataset)], as_json))
