"""`bench sweep`: parses and prints; bench.tables.sweep finds the points and their values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Results, opened
from bench.commands.options import Only, ScopeOptions, takes_groups
from bench.records.store import Store
from bench.results.rows import Row
from bench.tables import sweep as series
from bench.tables import sweep_text
from bench.tables.equivalence import matches, partner
from bench.tables.leaderboard import board
from bench.tables.selection import RowFilter


@takes_groups
def sweep(
    scope: Annotated[ScopeOptions, Only(("dataset", "eps"))],
    defense: Annotated[str, typer.Argument(help="A defense, such as noisy.")],
    setting: Annotated[
        str, typer.Argument(help="A setting of it, train_eps (trained at), eps (attacked) or train.NAME.")
    ],
    against: Annotated[
        str | None,
        typer.Option(help="Map it to another defense's setting, such as pgd_at:train_eps.", show_default=False),
    ] = None,
    results_dir: Results = Path("results"),
    spec: Annotated[Path | None, typer.Option(help="A YAML spec: its jobs only.", show_default=False)] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1 (default: all).")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write each as CSV, SVG and PNG there.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show accuracy against a swept setting.

    Each seed is shown. --against gives the value of another defense's setting that is equally accurate.

    Example: bench sweep noisy sigma --against pgd_at:train_eps --dataset mnist --eps 0.1
    """
    store = replace(scope, spec=spec).of(opened(results_dir))
    rows, where = board(store), RowFilter(norm=norm)
    swept = series.sweep(store, rows, defense, setting, where)
    maps = _maps(store, rows, swept, against, where) if against else []
    print(sweep_text.as_json(swept, maps) if as_json else sweep_text.text(store, swept, maps))
    if output is not None:
        from bench.report.canvas import unique  # with it comes matplotlib
        from bench.report.sweeps import map_plot, sweep_plot

        drawn = [sweep_plot(each) for each in swept] + [p for found in maps if (p := map_plot(found)) is not None]
        for path in (path for plot in unique(drawn) for path in plot.write(output)):
            print(path)


def _maps(
    store: Store, rows: list[Row], swept: list[series.Series], against: str, where: RowFilter
) -> list[sweep_text.Map]:
    """For each swept series the values of the other defense's setting that are equally accurate."""
    name, _, setting = against.partition(":")
    found = series.sweep(store, rows, name, setting or series.TRAINED, where, least=1)
    others = [series.with_anchor(each) for each in found]
    pairs = [(series.with_anchor(each), partner(store, each, others)) for each in swept]
    maps = [(a, b, matches(store, a, b)) for a, b in pairs if b is not None]
    if not maps:
        raise LookupError(
            f"no series of {name} was trained and attacked as one of {swept[0].defense} was, at two or more values"
        )
    return maps
