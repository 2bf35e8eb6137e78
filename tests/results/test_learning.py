"""A seed that learned nothing is named with what shows it, also where the classes are few or unequal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from factories import evaluated, only, right, trained

from bench.records.store import Store
from bench.results.labels import collapses


def labels(*counts: int) -> dict[str, Any]:
    return {"label": np.repeat(np.arange(len(counts)), counts)}


@pytest.mark.parametrize(
    ("data", "columns", "clean", "shown"),
    [
        ("digits", None, 0.15, "clean 15.0 %, loss 2.30 = ln 10"),
        ("digits", None, 0.151, None),
        ("cifar100", None, 0.015, "clean 1.5 %, loss 2.30"),
        ("toy", labels(500, 500), 0.52, "clean 52.0 %, loss 2.30"),
        ("toy", labels(500, 500), 0.53, None),
        ("toy", labels(900, 100), 0.9, "clean 90.0 %, loss 2.30"),
        ("toy", labels(900, 100), 0.91, None),
        ("toy", None, 0.1, None),
    ],
)
def test_what_a_guess_reaches_is_not_learned(
    store: Store, data: str, columns: dict[str, Any] | None, clean: float, shown: str | None
) -> None:
    train = trained(store, data={"name": data}, metrics={"final_terms": {"adv": 1.3, "ce": 1.0, "kl": None}})
    evaluated(store, train, "clean", right(clean), columns=columns)
    assert only(store).accuracy.unlearned == ({0: shown} if shown else {})


@pytest.mark.parametrize(("loss", "said"), [(2.3026, ", loss 2.30 = ln 10"), (2.36, ", loss 2.36 ≈ ln 10"), (None, "")])
def test_the_loss_is_compared_with_that_of_equal_probabilities(store: Store, loss: float | None, said: str) -> None:
    train = trained(store, data={"name": "digits"}, metrics={"final_terms": {"ce": loss}})
    evaluated(store, train, "clean", right(0.1))
    assert only(store).accuracy.unlearned == {0: f"clean 10.0 %{said}"}


def test_a_line_names_each_seed_once(store: Store) -> None:
    for seed, (clean, robust) in enumerate(((0.1, 0.1), (0.9, 0.6), (0.9, 0.001))):
        train = trained(store, seed=seed, data={"name": "digits"})
        evaluated(store, train, "clean", right(clean))
        evaluated(store, train, "steep", right(robust))
    row = only(store)
    assert row.accuracy.collapsed == (0, 2)
    assert collapses([row, row]) == [
        "guard: seed 0 did not learn: clean 10.0 %; seed 2 collapsed, far below the other seeds"
    ]
