"""`bench unpack`: the records of packs as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Results
from bench.records.pack import unpack_records
from bench.records.store import Store


def unpack(
    packs: Annotated[
        list[Path] | None, typer.Argument(help="Packs (default: all in the results folder).", show_default=False)
    ] = None,
    results_dir: Results = Path("results"),
) -> None:
    """Write the records of packs as folders of the results folder. Jobs that have a folder are left alone."""
    results_dir.mkdir(parents=True, exist_ok=True)
    print(unpack_records(Store(results_dir), packs))
