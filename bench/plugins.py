"""Imports plug-in files and makes their objects. Nothing else imports them; planning reads their source by `ast`.

On import it binds the packages `attacks` and `defenses` to the folders beside bench. A folder of that name in the
working folder, beside a user's model or on PYTHONPATH is searched after them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from bench.core.attack import Evaluation
from bench.core.defense import Defense
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.models.common import Inputs
from bench.planning import catalog
from bench.planning.job_fields import JobThreat, PluginChoice
from bench.planning.plugin_source import MistakeError, place_of

AUTHORS = ("bench_plugin_", "bench_model_", "defenses.", "attacks.")  # modules that hold code of an author
# the threat of a method that uses none
NO_THREAT = Threat("Linf", Epsilon(0))


class PackagePath:
    """Where Python looks for submodules of a built-in package: in bench's own folder, then in folders of the same name
    on `sys.path` as it is at that moment, so that a user's `from attacks.mine import ...` still works."""

    def __init__(self, own: Path) -> None:
        self.own = own

    def __iter__(self) -> Iterator[str]:
        """The folders, bench's own first."""
        yield str(self.own)
        for place in sys.path:
            folder = Path(place, self.own.name)
            if folder != self.own and folder.is_dir():
                yield str(folder)


def bind(kind: catalog.Kind) -> None:
    """Make `import attacks` (or `defenses`) mean the folder beside bench, even if another one was imported before."""
    name, own = catalog.PACKAGES[kind], catalog.built_in(kind)
    held = sys.modules.get(name)
    if held is None or Path(held.__file__ or "").parent != own:
        for other in [other for other in sys.modules if other == name or other.startswith(f"{name}.")]:
            del sys.modules[other]
        spec = importlib.util.spec_from_file_location(name, own / "__init__.py", submodule_search_locations=[str(own)])
        assert spec is not None
        held = sys.modules[name] = importlib.util.module_from_spec(spec)
    held.__path__ = PackagePath(own)  # type: ignore[assignment]


bind("attacks")
bind("defenses")


def module(kind: catalog.Kind, name: str) -> ModuleType:
    """Import the plug-in file of this name, from the packages or from a `--plugin` path."""
    path = catalog.get(kind, name).path
    package = catalog.PACKAGES[kind]
    if kind == "models" or path.parent == catalog.built_in(kind):
        return importlib.import_module(f"{package}.{name}")
    full = f"bench_plugin_{name}"
    held = sys.modules.get(full)
    if held is None or held.__file__ != str(path):  # another file of that name may have been loaded before
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[full] = loaded
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[full]  # as Python does; otherwise the next import would give half a module
            raise
    return sys.modules[full]


def load(kind: catalog.Kind, name: str) -> type[Any]:
    """The one Defense or Evaluation class of a plug-in file. Raises MistakeError for none or several."""
    base = Defense if kind == "defenses" else Evaluation
    loaded = module(kind, name)
    found = [
        value
        for value in vars(loaded).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == loaded.__name__
        and not value.__name__.startswith("_")
    ]
    if len(found) != 1:
        line = inspect.getsourcelines(found[1])[1] if found else 1
        raise MistakeError.at(
            catalog.get(kind, name).path, line, f"expected exactly one {base.__name__} in the file, found {len(found)}"
        )
    return found[0]


def threat_of(threat: JobThreat) -> Threat:
    """The threat of a job with its tensor operations."""
    return Threat(threat.norm, Epsilon(threat.eps))  # type: ignore[arg-type]


def make(kind: catalog.Kind, chosen: PluginChoice, threat: JobThreat | None) -> Any:
    """The defense or evaluation that a job names, with validated settings and the job's threat.

    Raises LookupError in one line for a job with a retired setting away from its last value.
    """
    settings = catalog.get(kind, chosen.name).current(chosen.settings)
    ball = NO_THREAT if threat is None else threat_of(threat)
    return TypeAdapter(load(kind, chosen.name)).validate_python({"threat": ball, **settings})


def build_model(name: str, settings: dict[str, Any], inputs: Inputs, trained: bool = False) -> nn.Module:
    """An untrained architecture for these inputs. `trained`: stored weights will be loaded into it, so that those that
    a training begins at are not fetched (`settings_once_trained` in its file)."""
    architecture = module("models", name)
    known = getattr(architecture, "settings_once_trained", {}) if trained else {}
    net: nn.Module = architecture.build(inputs, **{**settings, **known})
    return net


def line_of(error: BaseException) -> str:
    """The line of an author's file from which an error came; empty if it came from none."""
    if isinstance(error, SyntaxError) and error.filename:
        return place_of(Path(error.filename), error.lineno or 1)
    walked = traceback.walk_tb(error.__traceback__)
    places = [place_of(Path(frame.f_code.co_filename), line) for frame, line in walked if _of_an_author(frame)]
    return places[-1] if places else ""


def line_after(fault: Callable[[FrameType, Any], bool], call: Callable[[], object]) -> str:
    """The first line of an author's file after which `fault(frame, returned)` is true, found by repeating a call.

    `returned` is what a function returns at its end, None before it. Empty if there is no such line.
    """
    found: list[str] = []

    def trace(frame: FrameType, event: str, value: Any) -> Any:
        if found or not _of_an_author(frame):
            return None
        done = frame.f_lineno  # the line that has run when the next event comes

        def watch(frame: FrameType, event: str, value: Any) -> Any:
            nonlocal done
            if not found and event in ("line", "return") and fault(frame, value if event == "return" else None):
                found.append(place_of(Path(frame.f_code.co_filename), done))
            done = frame.f_lineno
            return watch

        return watch

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with suppress(Exception):
            call()
    finally:
        sys.settrace(before)
    return found[0] if found else ""


def _of_an_author(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(AUTHORS)
