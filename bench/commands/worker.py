"""`bench worker KEY`: the command that tasks of Slurm and Ray run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Plugin, Results, plugins
from bench.data.datasets import data_root
from bench.jobs.attempt import HELD, WORDS, attempt


def worker(
    key: Annotated[str, typer.Argument(help="A job key: 12 hexadecimal digits.")],
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plugin: Plugin = None,
    over_is_done: Annotated[
        bool,
        typer.Option("--over-is-done", help="Exit with 0, not 5, if the job is done already: other jobs wait for it."),
    ] = False,
) -> None:
    """Run one job of a results folder. Executors call this command.

    Exits with 5 and does nothing if another process runs the job or it is done.
    """
    plugins(plugin)
    state = attempt(results_dir, key, data_root(data_dir), device)
    print(f"{key} {WORDS.get(state, state)}")
    if state in WORDS:
        raise typer.Exit(0 if state == "over" and over_is_done else HELD)
    raise typer.Exit(0 if state in ("done", "unsupported") else 1)
