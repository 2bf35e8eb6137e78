"""`bench merge`: parses; bench.records.merge copies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Results
from bench.records import merge as merging
from bench.records.store import Store


def merge(
    sources: Annotated[list[Path], typer.Argument(help="Results folders of other machines.")],
    results_dir: Results = Path("results"),
) -> None:
    """Copy the records of other results folders. With a conflict, nothing is copied (exit code 1)."""
    for source in sources:
        if source.is_dir() and not Store(source).keys():
            raise LookupError(f"{source} holds no job; expected a results folder")
    raise typer.Exit(merging.merge(sources, results_dir))
