"""`bench status`: parses; bench.progress.status prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Results, opened
from bench.commands.matrix import prepare
from bench.commands.options import ScopeOptions, takes_groups
from bench.data.datasets import data_root
from bench.planning.typed import Options
from bench.progress import status as survey


@takes_groups
def status(
    scope: ScopeOptions,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show which jobs are done, running and failed. Works during a run, from another terminal."""
    store = opened(results_dir)
    planned = prepare(Options(spec=scope.spec), data_dir).jobs if scope.spec else []
    if scope != ScopeOptions(spec=scope.spec):
        store = scope.of(store, data_dir)
        planned = [job for job in planned if job.key in store.keys()]
    survey.status(store, planned, as_json, data_root(data_dir))
