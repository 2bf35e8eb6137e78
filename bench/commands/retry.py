"""`bench retry`: parses; bench.records.maintenance marks the jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Results, existing, warn
from bench.records import maintenance
from bench.records.store import Store

Keys = Annotated[list[str] | None, typer.Argument(help="Job keys, or how they begin.", show_default=False)]


def retry(
    keys: Keys = None,
    failed: Annotated[bool, typer.Option("--failed", help="Every job that failed.")] = False,
    results_dir: Results = Path("results"),
) -> None:
    """Mark failed jobs for re-running, including diverged ones. The same `bench run` then repeats them."""
    store = Store(existing(results_dir))
    warn(store.damages())
    raise typer.Exit(maintenance.retry(store, keys or [], failed))
