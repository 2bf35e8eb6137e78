"""Groups of options: which fields a command takes, and what an option that is not given becomes."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Annotated

import typer

from bench.commands.options import Only, takes_groups


@dataclass(frozen=True)
class Group:
    names: Annotated[list[str], typer.Option(help="Names.")] = field(default_factory=list)
    count: Annotated[int | None, typer.Option(help="A number.")] = None
    flag: Annotated[bool, typer.Option("--flag", help="A flag.")] = False
    internal: str = "set by the command"


def test_the_fields_of_a_group_are_the_options_of_a_command() -> None:
    @takes_groups
    def command(group: Group, other: int = 3) -> tuple[Group, int]:
        """Does it."""
        return group, other

    parameters = inspect.signature(command).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "names": None,
        "count": None,
        "flag": False,
        "other": 3,
    }
    assert (command.__name__, command.__doc__) == ("command", "Does it.")
    assert command(names=None, count=2, flag=True, other=4) == (Group([], 2, True), 4)


def test_a_command_may_take_some_fields_of_a_group_only() -> None:
    @takes_groups
    def command(group: Annotated[Group, Only(("count",))]) -> Group:
        return group

    assert list(inspect.signature(command).parameters) == ["count"]
    assert command(count=5) == Group([], 5)
