"""File name -> class. The only place that imports plug-in files; the planner reads them by `ast`, in its catalog."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from bench.core.attack import Evaluation
from bench.core.defense import Defense
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.models.common import Inputs
from bench.planning import catalog

# what a method that ignores the threat gets in its place
NO_THREAT = Threat("Linf", Epsilon(0))


def module(kind: catalog.Kind, name: str) -> ModuleType:
    """Import the plug-in file of this name, from the packages or from a `--plugin` path."""
    path = catalog.get(kind, name).path
    package = catalog.PACKAGES[kind]
    spec = importlib.util.find_spec(f"{package}.{name}")
    if spec is not None and spec.origin == str(path):
        return importlib.import_module(f"{package}.{name}")
    full = f"bench_plugin_{name}"
    held = sys.modules.get(full)
    if held is None or held.__file__ != str(path):  # another file of that name may have been read before
        spec = importlib.util.spec_from_file_location(full, path)
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        sys.modules[full] = loaded
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[full]  # as Python does, or the next to ask would get half a module
            raise
    return sys.modules[full]


def load(kind: catalog.Kind, name: str) -> type[Any]:
    """The one Defense or Evaluation class of a plug-in file. Raises ValueError where there is not exactly one."""
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
        raise ValueError(f"{kind}/{name}.py must define exactly one {base.__name__}, found {len(found)}")
    return found[0]


def make(kind: catalog.Kind, name: str, settings: dict[str, Any], threat: dict[str, str] | None) -> Any:
    """A defense or evaluation with validated settings; `threat` as in a job ({norm, eps}) or None."""
    ball = NO_THREAT if threat is None else Threat(threat["norm"], Epsilon(threat["eps"]))  # type: ignore[arg-type]
    return TypeAdapter(load(kind, name)).validate_python({"threat": ball, **settings})


def build_model(name: str, settings: dict[str, Any], inputs: Inputs) -> nn.Module:
    """An untrained architecture for these inputs."""
    net: nn.Module = module("models", name).build(inputs, **settings)
    return net
