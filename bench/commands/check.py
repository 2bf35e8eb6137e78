"""`bench check`: the contract tests of plug-ins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.commands.arguments import Plugin, command, plugins
from bench.planning import catalog


def check(
    name: Annotated[str | None, typer.Argument(help="A defense or attack, or its file.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every plug-in.")] = False,
    plugin: Plugin = None,
) -> None:
    """Test a defense or attack against its contract. These are the requirements of the harness on every plug-in."""
    if name is not None and name.endswith(".py"):
        plugin, name = [*(plugin or []), name], Path(name).stem
    plugins(plugin)
    if (name is None) == (not everything):
        raise ValueError("bench check takes a NAME, a FILE or --all")
    kinds: tuple[catalog.Kind, ...] = ("defenses", "attacks")
    wanted = [(kind, each) for kind in kinds for each in catalog.names(kind) if everything or each == name]
    if not wanted:
        known = [each for kind in kinds for each in catalog.names(kind)]
        hint = catalog.suggest(str(name), known) or " `bench list` names them; for your own file type its path"
        raise LookupError(f"no defense or attack '{name}'.{hint}")
    from bench import contract  # with it comes torch

    failed = 0
    for kind, each in wanted:
        results = contract.check(kind, each)
        bad: dict[str, list[str]] = {}  # one mistake may fail many checks
        for result in results:
            if not result.ok:
                bad.setdefault(result.detail, []).append(result.name)
        passed = sum(result.ok for result in results)
        print(f"{'FAIL' if bad else 'ok  '} {kind}/{each}: {passed}/{len(results)} checks")
        for detail, (first, *others) in bad.items():
            print(f"     {detail} ({first}{f'; and {len(others)} more checks' if others else ''})")
        failed += bool(bad)
    if not everything:
        kind, each = wanted[0]
        path = catalog.files(kind)[each]
        mended = f"mend it, then {command('check', kind[:-1], path)}"
        print(f"next: {mended if failed else command('run', kind[:-1], path)}")
    raise typer.Exit(1 if failed else 0)
