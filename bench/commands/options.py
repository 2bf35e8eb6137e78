"""Groups of options that several commands take, each declared once as a dataclass; `takes_groups` expands them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import typer

from bench.executors.clusters import Machine


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
class ModelOptions:
    """A model of the user's as named on the command line. `name`: of its row, where a command asks for one."""

    model: Annotated[
        str | None,
        typer.Argument(help="A checkpoint (.safetensors, .pt, .pth) or FILE.py:FUNCTION.", show_default=False),
    ] = None
    checkpoint: Annotated[Path | None, typer.Option(help="Weights: safetensors, or a weights-only .pt.")] = None
    arch: Annotated[str | None, typer.Option(help="Its architecture; see `bench list models`.")] = None
    arch_set: Annotated[list[str], typer.Option(help="A setting of the architecture, such as width=32; repeat.")] = (
        field(default_factory=list)
    )
    model_file: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION; the function returns a net from [0,1] images to logits.")
    ] = None
    normalise: Annotated[
        str | None, typer.Option(help="none, dataset or MEAN/STD (default: the checkpoint's, else the data set's).")
    ] = None
    randomised: Annotated[
        bool, typer.Option("--randomised", help="The model is stochastic: it draws noise at test time.")
    ] = False
    name: str | None = None

    @property
    def given(self) -> bool:
        """Whether any option names a model."""
        words = (self.model, self.checkpoint, self.arch, self.model_file, self.normalise)
        return any(word is not None for word in words) or bool(self.arch_set)


@dataclass(frozen=True)
class MachineOptions:
    """Where jobs run on this machine, as typed."""

    workers: Annotated[int | None, typer.Option(min=1, help="Jobs at a time (default: one per core or GPU slot).")] = (
        None
    )
    jobs_per_gpu: Annotated[
        int | None, typer.Option(min=1, help="Jobs that share a GPU (default: by their measured memory).")
    ] = None
    gpus: Annotated[str | None, typer.Option(help="Such as 0,2 (default: the GPUs that are idle).")] = None
    time_limit: Annotated[str | None, typer.Option(help="Such as 30m; a job that takes longer is killed.")] = None
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto"

    def machine(self) -> Machine:
        """The typed values checked. Raises ValueError."""
        return Machine.of(self.device, self.workers, self.jobs_per_gpu, self.gpus, self.time_limit)


@dataclass(frozen=True)
class OutputOptions:
    """What a run prints."""

    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and the final table only.")] = False
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON event per line on stdout.")] = False

    def mode(self, terminal: bool) -> str:
        """The mode of bench.progress.live.View. `terminal`: stdout is one."""
        return "json" if self.as_json else "quiet" if self.quiet else "live" if terminal else "plain"
