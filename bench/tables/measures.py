"""Evaluations that judge no robustness (flatness, say): a table of their own, and a line at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench.core.stats import mean_std
from bench.records.store import Store
from bench.results.evaluations import Entry

if TYPE_CHECKING:
    import pandas as pd

ABOUT = ("dataset", "split", "model", "defense_label", "train_norm", "train_eps", "seed", "attack_label", "norm", "eps")
NO_MEASURE = ("index", "label", "forwards", "backwards")


def by_attack(store: Store, table: pd.DataFrame) -> dict[str, list[dict[str, object]]]:
    """For each measuring evaluation of a `frame` lines of CSV: what was measured on what, and the mean of each column
    over images (and directions), or how many of its values are not finite."""
    found: dict[str, list[dict[str, object]]] = {}
    for entry in _entries(table):
        line = {name: entry[name] for name in (*ABOUT, "n", "state", "reason")}
        means = _means(store, entry["key"]) if entry["state"] == "done" else {}
        found.setdefault(entry["attack"], []).append({**line, **means})
    return dict(sorted(found.items()))


def notes(table: pd.DataFrame) -> list[str]:
    """One line for each configuration, evaluation and budget: mean over seeds, or why there is none."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in sorted(_entries(table), key=lambda e: (e["defense_label"], e["attack_label"], e["eps_value"])):
        groups.setdefault(tuple(entry[k] for k in ("config", "attack_label", "norm", "eps")), []).append(entry)
    lines = []
    for entries in groups.values():
        first, values = entries[0], [e["measured"] for e in entries if math.isfinite(e["measured"])]
        where = f"{first['defense_label']}: {first['attack_label']}"
        budget = f" at {first['norm']} {first['eps']}" if first["norm"] else ""
        if values:
            mean, std = mean_std(values)
            spread = f" (std {std:.3g} over {len(values)} seeds)" if len(values) > 1 else ""
            lines.append(f"{where}{budget}: mean {first['measures']} {mean:.4g}{spread}")
        lines += [f"{where}{budget}, seed {e['seed']}: {_why(e)}" for e in entries if not math.isfinite(e["measured"])]
    return lines


def _why(entry: Entry) -> str:
    """What stands where there is no number."""
    if entry["state"] == "done":
        return f"{entry['measures']} is not finite"
    return ": ".join(part for part in (entry["state"], entry["reason"]) if part)


def _entries(table: pd.DataFrame) -> Iterator[Entry]:
    for entry in table[table["measures"].notna()].to_dict("records"):
        yield {str(name): value for name, value in entry.items()}


def _means(store: Store, key: str) -> dict[str, object]:
    import numpy as np

    found: dict[str, object] = {}
    for name, values in store.samples(key).items():
        if name not in NO_MEASURE:
            bad = int(values.size - np.isfinite(values).sum())
            found[name] = f"{bad} of {values.size} not finite" if bad else float(values.mean())
    return found
