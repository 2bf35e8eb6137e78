"""The commands pack and unpack: the published records of a matrix in one file. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Plugin, Results, existing, plugins


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
    from bench.records.pack import OTHER, pack_records
    from bench.records.store import Store

    plugins(plugin)
    store, keys = Store(existing(results_dir)), None
    if spec is not None:
        from bench.commands import run as running
        from bench.planning.typed import Options

        keys = [job.key for job in running.prepare(Options(spec=spec), data_dir).jobs]
    print(pack_records(store, OTHER if spec is None else spec.stem, keys))


def unpack(
    packs: Annotated[
        list[Path] | None, typer.Argument(help="Packs (default: all in the results folder).", show_default=False)
    ] = None,
    results_dir: Results = Path("results"),
) -> None:
    """Write the records of packs as folders of the results folder. Jobs that have a folder are left alone."""
    from bench.records.pack import unpack_records
    from bench.records.store import Store

    results_dir.mkdir(parents=True, exist_ok=True)
    print(unpack_records(Store(results_dir), packs))
