"""The commands that print or write tables: leaderboard, compare, timing. Free of torch; pandas when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Dataset, Plugin, Results, existing, file, plugins


def leaderboard(
    results_dir: Results = Path("results"),
    output: Annotated[Path, typer.Option(help="The Markdown file whose marked part is replaced.")] = Path(
        "leaderboard.md"
    ),
    radii: Annotated[str, typer.Option(help="L2 radii at which to show certified accuracy.")] = "0,0.25,0.5,1",
    plugin: Plugin = None,
) -> None:
    """Write leaderboard.md and the tables from the records. Tables: results/tables/*.csv, .tex and .json."""
    from bench.core.epsilon import Epsilon
    from bench.records.store import Store
    from bench.tables import leaderboard as tables

    plugins(plugin)
    at = [float(Epsilon(part)) for part in radii.split(",")]
    for path in tables.write_leaderboard(Store(existing(results_dir)), file(output), results_dir / "tables", at):
        print(path)


def compare(
    a: Annotated[str, typer.Argument(help="A method as the leaderboard names it, a defense, or a training key.")],
    b: Annotated[str, typer.Argument(help="The other one.")],
    results_dir: Results = Path("results"),
    dataset: Dataset = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1 (default: all that both have).")] = None,
    eps: Annotated[str | None, typer.Option(help="Such as 8/255 (default: all that both have).")] = None,
    seed: Annotated[int | None, typer.Option(help="One training seed (default: all that both have).")] = None,
    plugin: Plugin = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, one entry a budget.")] = False,
) -> None:
    """Compare two defenses on the same images. Paired differences, intervals, McNemar's p, costs.

    Example: bench compare trades pgd_at --dataset mnist --eps 0.1
    """
    from bench.records.store import Store
    from bench.tables import compare as comparing
    from bench.tables.selection import RowFilter

    plugins(plugin)
    where = RowFilter(dataset, norm, eps, seed)
    print(comparing.show(Store(existing(results_dir)), a, b, where, as_json))


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
