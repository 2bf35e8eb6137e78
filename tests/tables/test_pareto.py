"""Fronts among comparable rows only: against the definition, and one way after another of not being comparable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from factories import STANDARD, all_rows, evaluated, trained

from bench.records.store import Store
from bench.tables.pareto import describe_fronts, fronts, pareto

N = 1000


def test_the_front_is_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = [(float(x), float(y)) for x, y in rng.integers(0, 6, (12, 2))]
        kept = [
            k for k, (x, y) in enumerate(points) if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)
        ]
        assert pareto(points) == kept
    assert pareto([]) == []


def row(store: Store, name: str, clean: float, robust: float, seconds: float = 10.0, **other: Any) -> None:
    n, where = other.pop("n", N), {k: other.pop(k) for k in ("eps", "test_hash") if k in other}
    train = trained(store, name, seconds=seconds, metrics={"work_per_image_f": seconds}, **other)
    hits = round(clean * n)
    evaluated(store, train, "clean", [1] * hits + [0] * (n - hits), test_hash=where.get("test_hash", ""))
    hits = round(robust * n)
    evaluated(store, train, "autoattack", [1] * hits + [0] * (n - hits), STANDARD, **where)


def found(store: Store) -> dict[str, str]:
    rows = all_rows(store)
    on = fronts(rows)
    return {each.method: describe_fronts(on, each) for each in rows}


def test_each_kind_has_its_own_front(store: Store) -> None:
    row(store, "cheap", 0.9, 0.2, 1.0)
    row(store, "robust", 0.8, 0.6, 50.0)
    row(store, "beaten", 0.8, 0.5, 60.0)
    row(
        store, "middle", 0.7, 0.4, 5.0
    )  # less clean accuracy than `beaten`, and less robust: on the fronts of cost alone
    assert found(store) == {
        "cheap": "clean, seconds, work", "robust": "clean, seconds, work", "beaten": "none", "middle": "seconds, work",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("other", "told_of_it"),
    [
        ({"device": "GPU y"}, "none"),  # times cannot be compared, the rest can, and is beaten
        ({"workers": 3}, "none"),
        ({"data": {"train": 50}}, "none"),  # clean alone
        ({"data": {"name": "toy10"}}, "–"),
        ({"model": {"name": "huge"}}, "–"),
        ({"eps": "0.2"}, "–"),
        ({"test_hash": "others"}, "–"),
        ({"n": 500}, "–"),
        ({"n": 500, "test_hash": "hash1000"}, "–"),
    ],
)
def test_rows_on_other_footing_are_not_compared(store: Store, other: dict[str, Any], told_of_it: str) -> None:
    row(store, "a", 0.9, 0.5)
    row(store, "b", 0.8, 0.4, **other)
    assert found(store)["b"] == told_of_it


def test_times_of_another_device_beat_nobody(store: Store) -> None:
    row(store, "here", 0.9, 0.5, 10.0)
    row(store, "there", 0.95, 0.6, 1.0, device="GPU y")
    rows = {each.method: each for each in all_rows(store)}
    assert fronts(rows.values())[id(rows["here"])] == {"clean": False, "work": False}  # no seconds
    assert fronts([rows["here"]]) == {}
