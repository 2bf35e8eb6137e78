"""`bench leaderboard`: parses and prints; bench.tables.leaderboard makes the tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from bench.atomic import write_atomic
from bench.commands.arguments import Plugin, Results, opened, output_file, plugins
from bench.commands.options import ScopeOptions, takes_groups
from bench.core.epsilon import Epsilon
from bench.tables.citations import bibtex
from bench.tables.latex import COLUMNS, DEFAULT
from bench.tables.leaderboard import latex_tables, write_leaderboard

Columns = Annotated[
    str, typer.Option(help=f"Columns of the LaTeX tables: {', '.join(COLUMNS)}, or an attack by its name in the table.")
]
Latex = Annotated[bool, typer.Option("--latex", help="Print the tables of a paper, as LaTeX; write no other file.")]
Bib = Annotated[Path | None, typer.Option(help="Write the papers of all methods to this file, as BibTeX.")]
Output = Annotated[
    Path | None,
    typer.Option(
        help="The Markdown file whose marked part is replaced (default: leaderboard.md; of a scope "
        "RESULTS/tables/scope/leaderboard.md).",
        show_default=False,
    ),
]

AS_PRINTED = ",".join(DEFAULT)


@takes_groups
def leaderboard(
    scope: ScopeOptions,
    results_dir: Results = Path("results"),
    output: Output = None,
    radii: Annotated[str, typer.Option(help="L2 radii at which to show certified accuracy.")] = "0,0.25,0.5,1",
    latex: Latex = False,
    columns: Columns = AS_PRINTED,
    bib: Bib = None,
    plugin: Plugin = None,
) -> None:
    """Write leaderboard.md and the tables from the records. Tables: results/tables/*.csv, .tex, .bib and .json.

    Those of a scope go to results/tables/scope/, so that the whole ones stay.
    """
    plugins(plugin)
    at = [float(Epsilon(part)) for part in radii.split(",")]
    names = re.split(r",\s*(?![^()]*\))", columns)  # the commas in brackets belong to the name of an attack
    store = scope.of(opened(results_dir))
    tables = results_dir / "tables" / ("scope" if store.scope else "")
    to = output or (tables / "leaderboard.md" if store.scope else Path("leaderboard.md"))
    if latex:
        print(latex_tables(store, names, at), end="")
    if bib is not None:
        write_atomic(output_file(bib, "--bib"), lambda file: file.write(bibtex().encode()))
    if not latex:
        for path in write_leaderboard(store, output_file(to), tables, at, names):
            print(path)
