"""Evaluations that do not measure robustness (flatness): their own table, and lines at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable

from bench.core.stats import mean_std
from bench.records.store import Store
from bench.results.evaluations import EvaluationResult, Evaluations
from bench.results.grouping import grouped
from bench.results.rows import Row

ABOUT = ("dataset", "split", "model", "defense_label", "train_norm", "train_eps", "seed", "attack_label", "norm", "eps")
NO_MEASURE = ("index", "label", "forwards", "backwards")


def by_attack(store: Store, known: Evaluations) -> dict[str, list[dict[str, object]]]:
    """Lines of CSV for each such attack: what was measured on what, and the mean of each column over images (and
    directions), or how many of its values are not finite."""
    found: dict[str, list[dict[str, object]]] = {}
    for entry in known.measuring:
        line = {name: getattr(entry, name) for name in (*ABOUT, "n", "state", "reason")}
        means = _means(store, entry.key) if entry.state == "done" else {}
        found.setdefault(entry.attack, []).append({**line, **means})
    return dict(sorted(found.items()))


def notes(known: Evaluations, rows: Iterable[Row] = ()) -> list[str]:
    """One line per configuration, evaluation and budget: mean over seeds, or why it is absent. Not for the columns that
    `rows` have of their own."""
    own = {e.key for row in rows for by_seed in row.provenance.measured.values() for e in by_seed.values()}
    listed = [e for e in known.measuring if e.key not in own]
    ordered = sorted(listed, key=lambda e: (e.defense_label, e.attack_label, e.eps_value))
    lines = []
    for entries in grouped(ordered, lambda e: (e.config, e.attack_label, e.norm, e.eps)).values():
        first, values = entries[0], [e.measured for e in entries if math.isfinite(e.measured)]
        where = f"{first.defense_label}: {first.attack_label}"
        budget = f" at {first.norm} {first.eps}" if first.norm else ""
        if values:
            mean, std = mean_std(values)
            spread = f" (std {std:.3g} over {len(values)} seeds)" if len(values) > 1 else ""
            lines.append(f"{where}{budget}: mean {first.measures} {mean:.4g}{spread}")
        lines += [f"{where}{budget}, seed {e.seed}: {_why(e)}" for e in entries if not math.isfinite(e.measured)]
    return lines


def _why(entry: EvaluationResult) -> str:
    """Why there is no number."""
    if entry.state == "done":
        return f"{entry.measures} is not finite"
    return ": ".join(part for part in (entry.state, entry.reason) if part)


def _means(store: Store, key: str) -> dict[str, object]:
    import numpy as np

    found: dict[str, object] = {}
    for name, values in store.samples(key).items():
        if name not in NO_MEASURE:
            bad = int(values.size - np.isfinite(values).sum())
            found[name] = f"{bad} of {values.size} not finite" if bad else float(values.mean())
    return found
