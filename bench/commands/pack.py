"""`bench pack`: the published records of a matrix in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Plugin, Results, existing, plugins
from bench.commands.matrix import prepare
from bench.planning.typed import Options
from bench.records.pack import OTHER, pack_records
from bench.records.store import Store


def pack(
    spec: Annotated[
        Path | None, typer.Argument(help="A YAML spec (default: the records that no pack holds).", show_default=False)
    ] = None,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
) -> None:
    """Write the records of a spec to one file.

    The file is RESULTS/<spec name>.zip; it holds no weights and no images. Folders stay as they are.

    Without a spec: every record that is in no pack yet, to RESULTS/other.zip.
    """
    plugins(plugin)
    store = Store(existing(results_dir))
    if spec is None:
        print(pack_records(store, OTHER, None))
    else:
        print(pack_records(store, spec.stem, [job.key for job in prepare(Options(spec=spec), data_dir).jobs]))
