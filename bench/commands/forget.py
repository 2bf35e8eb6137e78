"""`bench forget`: parses, prints and asks; bench.records.forget removes."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import DataDir, Plugin, Results, existing, plugins
from bench.commands.matrix import prepare
from bench.planning.typed import Options
from bench.progress.live import title
from bench.records.forget import Removal, never_ran, removal, remove, with_dependents
from bench.records.maintenance import resolve
from bench.records.store import Store
from bench.terminal import counted, say

SHOWN = 10  # jobs that are named

What = Annotated[
    list[str] | None, typer.Argument(help="YAML specs, and job keys or how they begin.", show_default=False)
]


def forget(
    what: What = None,
    unrun: Annotated[bool, typer.Option("--never-ran", help="Every job that was planned only.")] = False,
    finished: Annotated[bool, typer.Option("--finished", help="Remove finished jobs too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    results_dir: Results = Path("results"),
    data_dir: DataDir = None,
    plugin: Plugin = None,
) -> None:
    """Remove jobs of a stopped or changed run. A job goes with all that need it; finished ones only by --finished.

    Example: bench forget --never-ran
    """
    plugins(plugin)
    if unrun == bool(what):
        raise ValueError("name either specs and jobs (SPEC or KEY ...) or --never-ran; `bench status` names jobs")
    store = Store(existing(results_dir))
    wanted = set(never_ran(store)) if unrun else set[str]()
    for word in what or ():
        if Path(word).suffix in (".yaml", ".yml"):
            wanted.update(job.key for job in prepare(Options(spec=Path(word)), data_dir).jobs)
        else:
            key = resolve(store, word)
            if store.done(key) and not finished:
                raise ValueError(f"{key} is finished; --finished removes finished jobs too")
            wanted |= with_dependents(store, [key])
    found = removal(store, wanted, finished)
    for line in _lines(store, found):
        say(line)
    if not found.keys:
        raise typer.Exit(0)
    if not (yes or sys.stdin.isatty()):
        raise ValueError("nothing was removed; --yes removes these")
    if not (yes or typer.confirm("Remove them?")):
        raise typer.Exit(1)
    left = remove(store, found.keys)
    say(f"{counted(len(found.keys) - len(left), 'job')} removed")
    if left:
        say(f"taken by another process meanwhile, and left alone: {', '.join(left)}")
        raise typer.Exit(1)


def _lines(store: Store, found: Removal) -> list[str]:
    """What goes and what stays, in words."""
    jobs = store.jobs()
    states = {key: record.state if (record := store.record(key)) else "without a result" for key in found.keys}
    kinds = ", ".join(f"{count} {state}" for state, count in sorted(Counter(states.values()).items()))
    lines = [f"to remove {counted(len(found.keys), 'job')}{': ' * bool(kinds)}{kinds}"]
    lines += [f"  {key}  {title(jobs[key], jobs)}, {states[key]}" for key in found.keys[:SHOWN]]
    lines += [f"  and {len(found.keys) - SHOWN} more"] if len(found.keys) > SHOWN else []
    for keys, why in (
        (found.finished, "finished (--finished removes them too)"),
        (found.needed, "needed by jobs that stay"),
        (found.packed, "in packs, which `bench pack` writes"),
    ):
        lines += [f"to keep   {counted(len(keys), 'job')}: {why}"] if keys else []
    return lines
