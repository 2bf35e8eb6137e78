"""Numbers and tables as text: for a terminal, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from bench.terminal import columns, plain, printable, wrapped

FORMULA = tuple("=+-@＝＋－＠")  # what a spreadsheet may take for a formula at the start of a cell


def percent(share: float, digits: int = 2) -> str:
    """0.4512 -> '45.12'."""
    return f"{100 * share:.{digits}f}"


def decimals(value: float, digits: int) -> str:
    """The number with this many decimals; – for NaN."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def aligned(table: list[list[str]], width: int | None = None) -> list[str]:
    """Lines of equal columns: the first is text, the others are right-aligned. A line that ends early has no columns
    after its first. Columns beyond `width` (default: that of the terminal) go into further tables below."""
    width, full = width or columns() or 10**6, [line for line in table if len(line) == len(table[0])]
    widths = [max(len(line[k]) for line in full) for k in range(len(table[0]))]
    first, groups = max(len(line[0]) for line in table), [list[int]()]
    for k in range(1, len(widths)):
        if groups[-1] and first + sum(widths[j] + 2 for j in [*groups[-1], k]) > width:
            groups.append([])
        groups[-1].append(k)
    lines = list[str]()
    for place, group in enumerate(groups):
        lines += [""] * (place > 0)
        for line in table if place == 0 else full:
            lines.append("  ".join([line[0].ljust(first), *(line[k].rjust(widths[k]) for k in group if k < len(line))]))
    return lines


def printed(lines: list[str]) -> str:
    """Lines for a terminal, wrapped there, without characters that would steer it."""
    return "\n".join(wrapped(plain(line), columns()) for line in lines).rstrip()


def json_text(values: Any) -> str:
    """Indented JSON with sorted keys; null for NaN and infinity."""
    return json.dumps(_finite(values), indent=1, sort_keys=True, allow_nan=False)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def csv_text(lines: list[dict[str, object]]) -> str:
    """CSV with the union of the columns in order of appearance; no cell starts a spreadsheet formula."""
    header = list(dict.fromkeys(name for line in lines for name in line))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([_harmless(name) for name in header])
    writer.writerows([[_harmless(line.get(name)) for name in header] for line in lines])
    return file.getvalue()


def _harmless(value: object) -> str:
    if value is None or value != value:  # NaN
        return ""
    text = printable(str(value))
    return f"'{text}" if text[:1] in FORMULA and not isinstance(value, (int, float)) else text
