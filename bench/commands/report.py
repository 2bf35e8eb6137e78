"""`bench report`: parses and prints; bench.report makes the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.commands.arguments import DataDir, Plugin, Results, opened, output_file, plugins
from bench.commands.options import ScopeOptions, takes_groups
from bench.data.datasets import data_root
from bench.report import write_report
from bench.report.images import Fetched, Wanted, no_images


@takes_groups
def report(
    scope: ScopeOptions,
    results_dir: Results = Path("results"),
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure there as SVG, PNG and CSV.", show_default=False)
    ] = None,
    images: Annotated[bool, typer.Option(help="Show adversarial images where they were stored.")] = True,
    data_dir: DataDir = None,
    plugin: Plugin = None,
) -> None:
    """Write all tables and figures as one HTML file. It needs no network and no other file."""
    plugins(plugin)
    store = scope.of(opened(results_dir), data_dir)

    def fetch(wanted: list[Wanted]) -> Fetched:
        from bench.commands.report_images import Strips  # imports torch, which a page without images does not need

        return Strips(store, data_root(data_dir)).fetch(wanted)

    with Console(stderr=True).status("") as line:  # on a terminal alone
        written = write_report(store, output_file(output), figures, fetch if images else no_images, line.update)
    for path in written:
        print(path)
