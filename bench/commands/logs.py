"""`bench logs`: parses; bench.records.maintenance prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Results, existing
from bench.records import maintenance
from bench.records.store import Store


def logs(
    key: Annotated[str, typer.Argument(help="A job key, or how it begins.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
    results_dir: Results = Path("results"),
) -> None:
    """Show the log of a job. Everything that it printed, and the traceback of a failure."""
    maintenance.logs(Store(existing(results_dir)), key, follow)
