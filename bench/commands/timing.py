"""`bench timing`: parses and prints; bench.tables.timing makes the table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Plugin, Results, opened, plugins
from bench.commands.options import ScopeOptions, takes_groups
from bench.tables.leaderboard import board
from bench.tables.timing import show


@takes_groups
def timing(
    scope: ScopeOptions,
    results_dir: Results = Path("results"),
    plugin: Plugin = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show the cost of trainings and attacks. Seconds, work and memory, separately for each device."""
    plugins(plugin)
    print(show(board(scope.of(opened(results_dir))), as_json))
