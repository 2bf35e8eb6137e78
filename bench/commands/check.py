"""`bench check`: the contract tests of plug-ins."""

from __future__ import annotations

from typing import Annotated

import typer

from bench.commands.arguments import Plugin, plugins
from bench.planning import catalog


def check(
    name: Annotated[str | None, typer.Argument(help="A defense or attack.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every plug-in.")] = False,
    plugin: Plugin = None,
) -> None:
    """Test a defense or attack against its contract. These are the requirements of the harness on every plug-in."""
    plugins(plugin)
    if (name is None) == (not everything):
        raise ValueError("bench check takes a NAME or --all")
    kinds: tuple[catalog.Kind, ...] = ("defenses", "attacks")
    wanted = [(kind, each) for kind in kinds for each in catalog.names(kind) if everything or each == name]
    if not wanted:
        known = [each for kind in kinds for each in catalog.names(kind)]
        hint = catalog.suggest(str(name), known) or " `bench list` names them; a file elsewhere needs --plugin FILE"
        raise LookupError(f"no defense or attack '{name}'.{hint}")
    from bench import contract  # with it comes torch
    from bench.plugins import load

    failed = 0
    for kind, each in wanted:
        cls = load(kind, each)
        results = (contract.check_defense if kind == "defenses" else contract.check_attack)(cls)
        bad = [(what, detail) for what, ok, detail in results if not ok]
        print(f"{'FAIL' if bad else 'ok  '} {kind}/{each}: {len(results) - len(bad)}/{len(results)} checks")
        for what, detail in bad:
            print(f"     {what}: {detail}")
        failed += bool(bad)
    raise typer.Exit(1 if failed else 0)
