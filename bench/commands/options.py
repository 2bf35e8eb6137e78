"""Groups of options that several commands take, each declared once as a dataclass; `takes_groups` expands them.

The others are `Options` and `ModelOptions` (bench.planning.typed), `Machine` and `Cluster` (bench.executors.clusters).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import typer

from bench.records.store import Store


class Only(NamedTuple):
    """In the annotation of a group: the names of the fields that the command takes; the others keep their default."""

    names: tuple[str, ...]


def takes_groups(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: each parameter whose type is a dataclass becomes the options that its annotated fields declare.

    An empty list stands for an option that was not given, which typer calls None.
    """
    own = inspect.signature(command, eval_str=True)
    groups, parameters = dict[str, tuple[type, list[str]]](), list[inspect.Parameter]()
    for parameter in own.parameters.values():
        kind, *marks = get_args(parameter.annotation) or (parameter.annotation,)
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        only = next((mark.names for mark in marks if isinstance(mark, Only)), None)
        options = _options(kind, only)  # type: ignore[arg-type]
        groups[parameter.name] = kind, [option.name for option in options]  # type: ignore[assignment]
        parameters += options

    def wrapped(**values: Any) -> Any:
        built = {}
        for name, (kind, names) in groups.items():
            given = {each: values.pop(each) for each in names if each in values}
            built[name] = kind(**{each: value for each, value in given.items() if value is not None})
        return command(**values, **built)

    wrapped.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": own.return_annotation}
    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    return wrapped


def _options(group: type, only: tuple[str, ...] | None) -> list[inspect.Parameter]:
    """The annotated fields of a dataclass as parameters; a list that is not given is None."""
    hints, found = get_type_hints(group, include_extras=True), []
    for each in dataclasses.fields(group):
        if hasattr(hints[each.name], "__metadata__") and (only is None or each.name in only):
            default = None if each.default is dataclasses.MISSING else each.default
            kind = inspect.Parameter.KEYWORD_ONLY
            found.append(inspect.Parameter(each.name, kind, default=default, annotation=hints[each.name]))
    return found


@dataclass(frozen=True)
class ScopeOptions:
    """What a table or figure is about; nothing given is all of the results folder."""

    spec: Annotated[Path | None, typer.Argument(help="A YAML spec: its jobs only.", show_default=False)] = None
    dataset: Annotated[str | None, typer.Option(help="A data set as the tables name it.")] = None
    eps: Annotated[list[str], typer.Option(help="Budgets attacked, such as 8/255 or 0.1,0.2.")] = field(
        default_factory=list
    )
    defense: Annotated[list[str], typer.Option(help="Defenses, to which `standard` is added.")] = field(
        default_factory=list
    )

    def of(self, store: Store, data_dir: Path | None = None) -> Store:
        """The store restricted to these. Raises LookupError or ValueError in one line."""
        from bench.commands.matrix import prepare
        from bench.planning.typed import Options
        from bench.results.scope import scoped

        if self == ScopeOptions():
            return store
        keys = [job.key for job in prepare(Options(spec=self.spec), data_dir).jobs] if self.spec else None
        eps, defenses = (
            [part.strip() for word in words for part in word.split(",")] for words in (self.eps, self.defense)
        )
        return scoped(store, keys, self.spec.stem if self.spec else "", self.dataset, eps, defenses)


@dataclass(frozen=True)
class OutputOptions:
    """What a run prints."""

    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and the final table only.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON event per line on stdout.")] = False

    def mode(self, terminal: bool) -> str:
        """The mode of bench.progress.live.View. `terminal`: stdout is one."""
        return "json" if self.as_json else "quiet" if self.quiet else "live" if terminal else "plain"
