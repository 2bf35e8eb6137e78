"""`bench gc`: parses; bench.records.maintenance removes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Results, existing, warn
from bench.records import maintenance
from bench.records.store import Store


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed and remove nothing.")] = False,
    results_dir: Results = Path("results"),
) -> None:
    """Remove files that no result needs. Temporary files, partial work of finished jobs, duplicate images."""
    store = Store(existing(results_dir))
    warn(store.damages())
    maintenance.gc(store, dry_run)
