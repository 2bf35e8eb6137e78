"""Shared by the benchmarks: times in the order A-B-B-A, the stored record, its part of docs/performance.md.

A benchmark first runs its gate; then `alternate(peer, ours)` times the two sides and gives the median and range of the
paired ratios peer / ours. `store` writes one JSON file below benchmarks/results, and `write_docs` the tables of all
stored records between the markers `<!-- ID: written by benchmarks/ID.py -->` and `<!-- ID: end -->`, and all bars into
the summary at the top of the page; the prose around them is written by hand.
"""

from __future__ import annotations

import fcntl
import json
import math
import re
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench.jobs.provenance import device_name, git, versions

HERE = Path(__file__).resolve().parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs" / "performance.md"
CPU = torch.device("cpu")
BARS = "| bar | measured | met |"
Record = dict[str, Any]
T = TypeVar("T")


def seconds(step: Callable[[], T], device: torch.device = CPU, seed: int = 0, repeats: int = 1) -> tuple[float, T]:
    """Time of one call, mean over repeats, and what the last one gave: CPU time of the process, on a GPU wall clock
    between two synchronizations. Every measurement starts from the same random state for the same seed."""
    clock = time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        clock = time.perf_counter
    torch.manual_seed(seed)
    started = clock()
    for _ in range(repeats):
        given = step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (clock() - started) / repeats, given


def spread(ratios: list[float]) -> Record:
    """Median of the paired ratios, and their range."""
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "pairs": ratios}


def alternate(
    peer: Callable[[], Any], ours: Callable[[], Any], device: torch.device = CPU, pairs: int = 6, repeats: int = 1
) -> Record:
    """Both sides timed `pairs` times in the order A-B-B-A, after one call each for warm-up, whose seconds stand apart.

    Gives `spread` of peer / ours, `peer_ms` and `ours_ms` (medians, for context) and `warm_up_s`.
    """
    sides: dict[str, Callable[[], Any]] = {"peer": peer, "ours": ours}
    started = time.perf_counter()
    for one in sides.values():
        seconds(one, device)
    warm = time.perf_counter() - started
    times: dict[str, list[float]] = {"peer": [], "ours": []}
    for k in range(pairs):
        for side in list(sides)[:: -1 if k % 2 else 1]:
            times[side].append(seconds(sides[side], device, k, repeats)[0])
    ratios = [a / b for a, b in zip(times["peer"], times["ours"], strict=True)]
    context = {f"{side}_ms": 1000 * statistics.median(used) for side, used in times.items()}
    return {**spread(ratios), **context, "warm_up_s": warm}


def conditions(name: str, device: str = "cpu") -> Record:
    """What a record begins with: benchmark, date, device, clock, threads, commit, package versions."""
    return {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "device": device_name(device),
        "clock": "wall, synchronized" if device.startswith("cuda") else "process CPU time",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "versions": versions(),
        **dict(zip(("commit", "dirty"), git(), strict=True)),
    }


def rounded(value: Any) -> Any:
    """Floats to five significant digits: what is stored is what is meant."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def store(record: Record, file: str) -> Record:
    """Write benchmarks/results/FILE; gives the record as stored."""
    RESULTS.mkdir(exist_ok=True)
    kept: Record = rounded(record)
    (RESULTS / file).write_text(json.dumps(kept, indent=1) + "\n")
    return kept


def bar(text: str, value: float | None, least: float) -> Record:
    """A bar that a ratio must reach; a gate that failed gives no ratio and meets none."""
    return {"bar": text, "value": value, "met": value is not None and value >= least}


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines]) + "\n"


def bar_table(bars: list[Record]) -> str:
    lines = [[b["bar"], "-" if b["value"] is None else f"{b['value']:.2f}", "yes" if b["met"] else "no"] for b in bars]
    return table(["bar", "measured", "met"], lines)


def ranged(row: Record) -> str:
    """A ratio with its range over the pairs, for a table cell."""
    if row["ratio"] is None:
        return "gate failed"
    if len(row.get("pairs", ())) == 1:
        return f"{row['ratio']:.2f} (one pair)"
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def heading(record: Record) -> str:
    """On what, when and from which code a record was taken."""
    about = f"{record['device']}, torch {record['torch']}, {record['threads']} thread, {record['clock']}"
    used = f"; {record['took_s']['cpu']:.0f} s of CPU time" if "took_s" in record else ""
    return f"### {about}\n\nCommit {record['commit']}, {record['date']}{used}.\n\n"


def write_docs(name: str, written: Callable[[Record], str]) -> None:
    """Put the text of all stored records NAME*.json between the markers of the page.

    Raises ValueError where the page lacks them.
    """
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}*.json"))]
    start, end = f"<!-- {name}: written by benchmarks/{name}.py -->", f"<!-- {name}: end -->"
    with DOCS.open() as page:
        fcntl.flock(page, fcntl.LOCK_EX)  # `make bench` runs two benchmarks at a time
        text = DOCS.read_text()
        if text.count(start) != 1 or text.count(end) != 1:
            raise ValueError(
                f"{DOCS.name} must hold '{start}' and '{end}' once each; add both lines where the tables go"
            )
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        body = "\n".join(written(record) for record in records) or "No record is stored yet.\n"
        DOCS.write_text(summarized(f"{head}{start}\n\n{body}\n{end}{tail}"))


def summarized(page: str) -> str:
    """The page with its first table written again: each bar of each benchmark, in one place."""
    lines, start, end = [], "<!-- summary: written by benchmarks/paired.py -->", "<!-- summary: end -->"
    for name, body in re.findall(
        r"<!-- (\w+): written by benchmarks/\1\.py -->\n(.*?)<!-- \1: end -->", page, re.DOTALL
    ):
        device, within = "", False
        for line in body.splitlines():
            if line.startswith("### "):
                device = line.removeprefix("### ").partition(",")[0]
            within = line == BARS or (within and line.startswith("|"))
            if within and line != BARS and "---" not in line:
                lines.append([f"`{name}`", device, *(cell.strip() for cell in line.strip("|").rsplit("|", 2))])
    head, _, rest = page.partition(start)
    table_of = table(["benchmark", "device", "bar", "measured", "met"], lines)
    return f"{head}{start}\n\n{table_of}\n{end}{rest.partition(end)[2]}"
