"""`bench timing`: parses and prints. bench.tables.timing makes the table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Dataset, Plugin, Results, existing, plugins


def timing(
    results_dir: Results = Path("results"),
    dataset: Dataset = None,
    plugin: Plugin = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show the cost of trainings and attacks. Seconds, work and memory, separately for each device."""
    from bench.records.store import Store
    from bench.tables import timing as times
    from bench.tables.leaderboard import board

    plugins(plugin)
    found = board(Store(existing(results_dir)))
    met = sorted({row.dataset for row in found})
    if dataset is not None and dataset not in met:
        raise LookupError(f"no row has data set {dataset}; there are: {', '.join(met) or 'none'}")
    print(times.show([row for row in found if dataset in (None, row.dataset)], as_json))
