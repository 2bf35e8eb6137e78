"""Seeds whose training failed: those that learned nothing, and those that lost what the other seeds have."""

from __future__ import annotations

import math
from collections.abc import Iterable

from bench.core.stats import wilson
from bench.data import datasets
from bench.records.record import train_metrics
from bench.records.store import Store
from bench.results.evaluations import EvaluationResult
from bench.results.seed_values import SeedValues

ENOUGH = 200  # images from which the share of the largest class is that of the test set


def unlearned_seeds(store: Store, clean: dict[int, EvaluationResult]) -> dict[int, str]:
    """Seeds whose clean accuracy is that of a guess, each with what shows it: `clean 15.0 %, loss 2.30 = ln 10`.

    A guess is the largest class. It is exceeded by at least half, or, with few classes, by 1/18 of what is missing to
    1: more than 15 % of 10 classes, more than 52.8 % of 2. Where the classes are unknown no seed is named.
    """
    found = {}
    for seed, e in sorted(clean.items()):
        classes, guess = _guess(store, e) if e.state == "done" else (0, math.nan)
        if e.accuracy <= min(1.5 * guess, guess + (1 - guess) / 18):
            found[seed] = f"clean {100 * e.accuracy:.1f} %{_loss(store, e, classes)}"
    return found


def _guess(store: Store, e: EvaluationResult) -> tuple[int, float]:
    """The number of classes, and the share of the largest; NaN where no labels are stored."""
    facts = datasets.KNOWN.get(e.dataset)
    labels = store.samples(e.key, ("label",)).get("label", [])
    if not len(labels):
        return (facts.classes, 1 / facts.classes) if facts else (0, math.nan)
    counts = [int((labels == label).sum()) for label in set(labels.tolist())]
    classes = facts.classes if facts else len(counts)
    return classes, max(1 / classes, max(counts) / len(labels) if len(labels) >= ENOUGH else 0.0)


def _loss(store: Store, e: EvaluationResult, classes: int) -> str:
    """The loss at the end of the training, beside that of equal probabilities where it is that."""
    terms = train_metrics(store.record(e.train_key)).final_terms or {}
    known = [value for value in terms.values() if value is not None]
    if not known:
        return ""
    loss, guess = sum(known), math.log(classes)
    sign = "=" if f"{loss:.2f}" == f"{guess:.2f}" else "≈" if abs(loss - guess) < guess / 20 else ""
    return f", loss {loss:.2f}" + (f" {sign} ln {classes}" if sign else "")


def collapsed_seeds(columns: Iterable[SeedValues]) -> set[int]:
    """Seeds of which one accuracy, with its 95 % interval, is below a tenth of the mean of the other seeds."""
    return {
        seed
        for column in columns
        for seed, value in column.values.items()
        if value < (others := column.without([seed]).mean) / 10
        and wilson(round(value * column.n), column.n)[1] < others
    }
