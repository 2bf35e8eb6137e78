"""The commands about a results folder: status, logs, retry, merge, verify, gc. Free of torch until one needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Plugin, Results, plugins
from bench.records.store import Store

SpecFile = Annotated[Path | None, typer.Argument(help="A YAML spec; only its jobs are shown.", show_default=False)]
Keys = Annotated[list[str] | None, typer.Argument(help="Job keys, or how they begin.", show_default=False)]


def status(
    results_dir: Results = Path("results"),
    spec: SpecFile = None,
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show which jobs are done, running and failed. Works during a run, from another terminal."""
    from bench.progress import status as survey

    planned = []
    if spec:
        from bench.commands import run as running
        from bench.planning.typed import Options

        planned = running.prepare(Options(spec=spec), data_dir).jobs
    survey.status(_existing(results_dir), planned, as_json)


def logs(
    key: Annotated[str, typer.Argument(help="A job key, or how it begins.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Keep printing until the job ends.")] = False,
    results_dir: Results = Path("results"),
) -> None:
    """Show the log of a job. Everything that it printed, and the traceback of a failure."""
    from bench.records import maintenance as keeping

    keeping.logs(Store(_existing(results_dir)), key, follow)


def retry(
    keys: Keys = None,
    failed: Annotated[bool, typer.Option("--failed", help="Every job that failed.")] = False,
    results_dir: Results = Path("results"),
) -> None:
    """Mark failed jobs for re-running, including diverged ones. The same `bench run` then repeats them."""
    from bench.records import maintenance as keeping

    raise typer.Exit(keeping.retry(Store(_existing(results_dir)), keys or [], failed))


def merge(
    sources: Annotated[list[Path], typer.Argument(help="Results folders of other machines.")],
    results_dir: Results = Path("results"),
) -> None:
    """Copy the records of other results folders. With a conflict, nothing is copied (exit code 1)."""
    from bench.records import merge as merging

    for source in sources:
        if source.is_dir() and not Store(source).keys():
            raise LookupError(f"{source} holds no job; expected a results folder")
    raise typer.Exit(merging.merge(sources, results_dir))


def verify(
    sample: Annotated[
        float, typer.Option(help="Share of the evaluations with stored images to evaluate again.")
    ] = 0.01,
    full: Annotated[bool, typer.Option("--full", help="Evaluate all of them again.")] = False,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
) -> None:
    """Verify checksums and evaluate stored images again. Exit code 4 if something changed."""
    from bench.data.datasets import data_root
    from bench.jobs import verify as verifying

    plugins(plugin)
    raise typer.Exit(verifying.verify(Store(_existing(results_dir)), sample, full, data_root(data_dir)))


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed and remove nothing.")] = False,
    results_dir: Results = Path("results"),
) -> None:
    """Remove files that no result needs. Temporary files, partial work of finished jobs, duplicate images."""
    from bench.records import maintenance as keeping

    keeping.gc(Store(_existing(results_dir)), dry_run)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no results folder {folder}; run `bench run` first or pass --results-dir")
    return folder
