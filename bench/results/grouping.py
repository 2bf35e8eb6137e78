"""Items that have something in common, and nested settings by path."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")
K = TypeVar("K")


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items with equal keys together, keys and items in order of appearance."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def flattened(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by the names on the path to each value: `{"train.lr": 0.1}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flattened(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return found
