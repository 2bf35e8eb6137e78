"""Reads YAML strictly: aliases, tags and duplicate keys are errors, only true and false are booleans, and the line of
every key is known."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from bench.core.epsilon import underflows

MAX_BYTES, MAX_DEPTH = 1_000_000, 20


def read(path: Path) -> tuple[dict[str, Any], dict[tuple[Any, ...], int]]:
    """The values of a YAML file, and the line of each key by its path from the top.

    Raises FileNotFoundError, or ValueError in one line with file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no spec file {path}")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a spec may have {MAX_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        _check_syntax(text, path)
        node = yaml.compose(text, Loader=_Loader)
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{path}: expected a mapping such as 'defenses: [noisy]'")
        lines: dict[tuple[Any, ...], int] = {}
        _find_lines(node, (), lines, path)
        values: dict[str, Any] = _Loader("").construct_document(node)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = str(getattr(error, "problem", error)).splitlines()[0]
        raise ValueError(f"{path}{f', line {mark.line + 1}' if mark else ''}: {problem}") from None
    return values, lines


def _check_syntax(text: str, path: Path) -> None:
    """Raise ValueError for aliases, tags and deep nesting, before the parser expands them."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        place = f"{path}, line {event.start_mark.line + 1 if event.start_mark else '?'}"
        if isinstance(event, yaml.AliasEvent):  # a few lines of aliases can expand to gigabytes
            raise ValueError(f"{place}: aliases (*{event.anchor}) are not allowed")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise ValueError(f"{place}: tag {tag} is not allowed; write plain values")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"{place}: nested deeper than {MAX_DEPTH} levels")


class _Loader(yaml.SafeLoader):
    """SafeLoader in which only true and false are booleans, 1e-3 is a number and 010 is not eight."""


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | str:
    """A float, or the text of a number too small for one, which the checks of the spec refuse by its key."""
    return str(node.value) if underflows(node.value) else float(node.value)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag.endswith(":null")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9]\d{0,17})$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$"), list("-+.0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def _find_lines(node: yaml.Node, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int], file: Path) -> None:
    """Add the line of every key. Raises ValueError for duplicate keys, which YAML allows, and for keys without text."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            _find_lines(item, (*path, place), lines, file)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            here, name = key.start_mark.line + 1, str(key.value)
            if key.tag != "tag:yaml.org,2002:str":
                raise ValueError(f"{file}, line {here}: a key must be text; put quotes around it")
            if name in seen:
                raise ValueError(f"{file}, line {here}: duplicate key '{name}' (first on line {seen[name]})")
            seen[name] = here
            lines[(*path, name)] = here
            _find_lines(value, (*path, name), lines, file)
