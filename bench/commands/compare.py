"""`bench compare`: parses and prints; bench.tables.compare compares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Plugin, Results, opened, plugins
from bench.commands.options import Only, ScopeOptions, takes_groups
from bench.tables.compare import show
from bench.tables.selection import RowFilter


@takes_groups
def compare(
    scope: Annotated[ScopeOptions, Only(("dataset", "eps", "defense"))],
    a: Annotated[str, typer.Argument(help="A method as the leaderboard names it, a defense, or a training key.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    results_dir: Results = Path("results"),
    spec: Annotated[Path | None, typer.Option(help="A YAML spec: its jobs only.", show_default=False)] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1 (default: all that both have).")] = None,
    seed: Annotated[int | None, typer.Option(help="One training seed (default: all that both have).")] = None,
    plugin: Plugin = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, one entry a budget.")] = False,
) -> None:
    """Compare two defenses on the same images. Paired differences, intervals, McNemar's p, costs.

    Example: bench compare trades pgd_at --dataset mnist --eps 0.1
    """
    plugins(plugin)
    store = replace(scope, spec=spec).of(opened(results_dir))
    print(show(store, a, b, RowFilter(norm=norm, seed=seed), as_json))
