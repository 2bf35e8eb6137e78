"""Reads train.jsonl: numbers of each epoch, for the live view, the report and trackers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence

from bench.atomic import parse_json
from bench.records.packs import LOG
from bench.records.store import Store

TOTAL = "total"  # the sum of the terms; older lines hold the terms only
VALIDATION = "validation"
ABOUT = ("epoch", "seconds")
_BARS = "▁▂▃▄▅▆▇█"

Line = dict[str, float]


def read(store: Store, key: str) -> list[Line]:
    """The finite numbers of each finished epoch, in order; empty if the training has no log.

    Ignores lines that are not JSON objects: the last one may be incomplete.
    """
    found = []
    data = b""
    with contextlib.suppress(ValueError):
        data = store.read(key, LOG) or b""
    for text in data.splitlines():
        try:
            line = parse_json(text, finite=False)
        except ValueError:
            continue
        if isinstance(line, dict):
            numbers = {name: float(v) for name, v in line.items() if type(v) in (int, float) and math.isfinite(v)}
            if "epoch" in numbers:
                found.append(numbers)
    return found


def total(line: Line, terms: Iterable[str] = ()) -> float:
    """The loss of an epoch: its stored sum, or else the sum of these terms; NaN if one of them is missing."""
    if TOTAL in line:
        return line[TOTAL]
    names = list(terms)
    return sum(line.get(name, math.nan) for name in names) if names else math.nan


def sparkline(values: Sequence[float], width: int = 12) -> str:
    """The last values as bars, scaled from their minimum to their maximum; blank if not finite."""
    shown = list(values)[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        _BARS[round((value - low) / span * (len(_BARS) - 1)) if span > 0 else 0] if math.isfinite(value) else " "
        for value in shown
    )
