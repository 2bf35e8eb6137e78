"""`bench sweep`: parses and prints; bench.tables.sweep finds the points and their values. With --optuna it searches
(bench.commands.search): the only option with which it trains anything."""

from __future__ import annotations

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Plugin, Results, opened, plugins
from bench.commands.options import Only, OutputOptions, ScopeOptions, takes_groups
from bench.executors.clusters import Machine
from bench.planning.typed import Options
from bench.records.store import Store
from bench.results.rows import Row
from bench.tables import sweep as series
from bench.tables import sweep_text
from bench.tables.equivalence import matches, partner
from bench.tables.leaderboard import board
from bench.tables.selection import RowFilter

SHOWS = ("dataset", "eps", "norm")  # fields of Options that also say what is shown of past runs
SEARCHES = ("size", "model", "attack", "train_eps", "epochs", "seeds", "n", "train_n", "recipe", "set", "validation")


@takes_groups
def sweep(
    *,
    defense: Annotated[str, typer.Argument(help="A defense, such as noisy.")],
    setting: Annotated[
        str | None,
        typer.Argument(
            help="A setting of it, train_eps (trained at), eps (attacked) or train.NAME.", show_default=False
        ),
    ] = None,
    optuna: Annotated[
        int | None, typer.Option(min=1, help="Search in so many trials, on validation images (extra sweep).")
    ] = None,
    search: Annotated[
        list[str] | None,
        typer.Option(help="What --optuna varies: sigma=0.05:1.5:log, target=logits,softmax or a name alone; repeat."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(help="Map it to another defense's setting, such as pgd_at:train_eps.", show_default=False),
    ] = None,
    options: Annotated[Options, Only((*SHOWS, *SEARCHES))],
    machine: Machine,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
    spec: Annotated[
        Path | None,
        typer.Option(help="A YAML spec: its jobs only; with --optuna all but its defenses.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write each as CSV, SVG and PNG there.", show_default=False)
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="With --optuna: trials and the front only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show accuracy against a setting, or search settings on validation images.

    Each seed is shown. --against gives the value of another defense's setting that is equally accurate. With --optuna N
    the settings of --search are searched in N trainings, all evaluated on validation images, and the front of clean
    against worst-case accuracy is shown; the other options are then those of `bench run`, and the same command resumes.

    Example: bench sweep noisy sigma --against pgd_at:train_eps --dataset mnist --eps 0.1

    Example: bench sweep noisy --optuna 20 --search sigma=0.05:1.5:log --dataset mnist --eps 0.1
    """
    plugins(plugin)
    if optuna is not None:
        if setting is not None or against is not None or output is not None:
            given = "--against" if against else "--output" if output else f"the setting '{setting}'"
            raise ValueError(f"{given} and --optuna; a search takes its settings from --search, such as sigma=LOW:HIGH")
        from bench.commands.search import search as searched

        mode = OutputOptions(quiet, as_json).mode(sys.stdout.isatty())
        machine.seconds()
        matrix = replace(options, spec=spec, defense=[defense], baseline=False)
        raise typer.Exit(searched(matrix, search or [], optuna, machine, results_dir, data_dir, plugin or [], mode))
    if setting is None:
        raise ValueError(f"name a setting of {defense} to show, or search some with --optuna N --search NAME=LOW:HIGH")
    typed = [each.name for each in fields(Options) if getattr(options, each.name) != getattr(Options(), each.name)]
    typed = [name for name in typed if name not in SHOWS] + ["search"] * bool(search) + ["quiet"] * quiet
    typed += [each.name for each in fields(Machine) if getattr(machine, each.name) != getattr(Machine(), each.name)]
    if typed:
        raise ValueError(f"--{typed[0].replace('_', '-')} needs --optuna N; without it only past runs are shown")
    scope = ScopeOptions(spec, options.dataset, options.eps)
    store = scope.of(opened(results_dir), data_dir)
    rows, where = board(store), RowFilter(norm=options.norm)
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
