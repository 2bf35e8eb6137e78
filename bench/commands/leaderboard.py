"""`bench leaderboard`: parses and prints; bench.tables.leaderboard makes the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Plugin, Results, opened, output_file, plugins
from bench.core.epsilon import Epsilon
from bench.tables.leaderboard import write_leaderboard

Output = Annotated[Path, typer.Option(help="The Markdown file whose marked part is replaced.")]


def leaderboard(
    results_dir: Results = Path("results"),
    output: Output = Path("leaderboard.md"),
    radii: Annotated[str, typer.Option(help="L2 radii at which to show certified accuracy.")] = "0,0.25,0.5,1",
    plugin: Plugin = None,
) -> None:
    """Write leaderboard.md and the tables from the records. Tables: results/tables/*.csv, .tex and .json."""
    plugins(plugin)
    at = [float(Epsilon(part)) for part in radii.split(",")]
    for path in write_leaderboard(opened(results_dir), output_file(output), results_dir / "tables", at):
        print(path)
