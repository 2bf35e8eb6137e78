"""`bench report`: parses and prints. bench.report makes the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.arguments import Plugin, Results, existing, file, plugins


def report(
    results_dir: Results = Path("results"),
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    figures: Annotated[
        Path | None, typer.Option(help="Also write each figure there as SVG, PNG and CSV.", show_default=False)
    ] = None,
    plugin: Plugin = None,
) -> None:
    """Write all tables and figures as one HTML file. It needs no network and no other file."""
    from bench.report import write_report
    from bench.store import Store

    plugins(plugin)
    for path in write_report(Store(existing(results_dir)), file(output), figures):
        print(path)
