"""Rows share a rank unless their outcomes on the same images differ beyond chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from factories import STANDARD, all_rows, draws, evaluated, full, only, trained

from bench.core.stats import bootstrap_difference, mcnemar, paired_difference, wilson
from bench.records.store import Store
from bench.results.significance import better, difference, same_images
from bench.tables.columns import cell_text
from bench.tables.ranking import ranked


def ranks(store: Store) -> list[tuple[str, str]]:
    return [(rank, row.method) for rank, row in ranked(all_rows(store))]


def broken(total: int, *spans: range) -> list[int]:
    lost = {k for span in spans for k in span}
    return [int(k not in lost) for k in range(total)]


def attacked(store: Store, name: str, correct: list[int], **other: Any) -> None:
    evaluated(store, trained(store, name, other.pop("seed", 0)), "autoattack", correct, STANDARD, **other)


def test_a_row_shares_the_rank_of_a_leader_that_is_not_significantly_better(store: Store) -> None:
    # five images that one alone loses: p = 2/32; six: p = 2/64
    attacked(store, "best", broken(1000, range(500)))
    attacked(store, "five", broken(1000, range(505)))
    attacked(store, "six", broken(1000, range(506)))
    attacked(store, "last", broken(1000, range(507)))
    assert ranks(store) == [("1", "best"), ("1", "five"), ("3", "six"), ("3", "last")]


def screened(n: int, audited: int, survivors: int) -> dict[str, Any]:
    """Columns of a suite that judged the first `audited` of the images that survived its screen."""
    place = np.arange(n)
    return {"audited": place < audited, "screened": (place >= audited) & (place < survivors)}


def fast(store: Store, name: str, hits: int, audited: int, **settings: Any) -> None:
    correct = [1] * hits + [0] * (1000 - hits)
    settings = {"mode": "full", "audit": audited, **settings}
    evaluated(store, trained(store, name), "autoattack_fast", correct, settings, columns=screened(1000, audited, hits))


def test_a_row_whose_suite_judged_a_sample_is_better_only_beyond_what_the_sample_leaves_open(store: Store) -> None:
    """0 of 100 broken leave 3.6 % of the 400 others open: 1.4 points."""
    fast(store, "audited", 500, 100)
    attacked(store, "near", broken(1000, range(490, 1000)))
    attacked(store, "far", broken(1000, range(470, 1000)))
    rows = {row.method: row for row in all_rows(store)}
    worst = rows["audited"].accuracy.worst
    assert worst.unjudged == pytest.approx(0.4 * 0.0362, rel=0.01)
    assert worst.interval()[0] < 0.46 < wilson(500, 1000)[0]
    assert ranks(store) == [("1", "audited"), ("1", "near"), ("3", "far")]
    assert "(audited" in cell_text(rows["audited"], rows["audited"].accuracy.autoattack)
    assert "audited" not in cell_text(rows["near"], rows["near"].accuracy.autoattack)


@pytest.mark.parametrize(
    ("audited", "settings", "ranks_as_autoattack"),
    [(100, {}, True), (99, {}, False), (500, {}, True), (0, {"audit": 0}, False), (100, {"mode": "quick"}, False)],
)
def test_a_suite_counts_as_autoattack_if_it_judged_all_or_100(
    store: Store, audited: int, settings: dict[str, Any], ranks_as_autoattack: bool
) -> None:
    fast(store, "model", 500, audited, **settings)
    row = only(store)
    assert bool(row.accuracy.autoattack.values) == ranks_as_autoattack
    assert bool(row.provisional) != ranks_as_autoattack


def test_what_counts_is_the_images_not_the_accuracies(store: Store) -> None:
    attacked(store, "best", broken(1000, range(500)))
    attacked(store, "same", broken(1000, range(510)))  # 10 images fewer, and never one more
    attacked(store, "other", broken(1000, range(200, 710)))  # as many fewer, but others
    # sorted by accuracy, then by name
    assert ranks(store) == [("1", "best"), ("1", "other"), ("3", "same")]


def test_only_the_higher_of_two_rows_is_better(store: Store) -> None:
    attacked(store, "high", broken(1000, range(500)))
    attacked(store, "low", broken(1000, range(600)))
    rows = {row.method: row for row in all_rows(store)}
    assert better(rows["high"], rows["low"])
    assert not better(rows["low"], rows["high"])


def test_a_group_is_measured_by_its_leader_not_by_its_last_row(store: Store) -> None:
    for k in range(4):
        attacked(store, f"row{k}", broken(1000, range(500 + 4 * k)))
    assert [rank for rank, _ in ranks(store)] == ["1", "1", "3", "3"]


def test_provisional_rows_tie_among_themselves_on_the_images_that_both_saw(store: Store) -> None:
    attacked(store, "ranked", broken(1000, range(900)))
    attacked(store, "short", broken(100, range(50)))
    attacked(store, "longer", broken(200, range(49), range(100, 160)))
    attacked(store, "worse", broken(200, range(70), range(100, 160)))
    assert ranks(store) == [("1", "ranked"), ("1†", "short"), ("1†", "longer"), ("3†", "worse")]


def test_rows_that_saw_other_images_are_told_apart_by_their_intervals(store: Store) -> None:
    attacked(store, "best", broken(1000, range(500)), test_hash="one")
    attacked(store, "near", broken(1000, range(520)), test_hash="other")
    attacked(store, "far", broken(1000, range(600)), test_hash="other")
    first, second, third = (row for _, row in ranked(all_rows(store)))
    assert [same_images(first, second), same_images(second, third)] == [False, True]
    assert ranks(store) == [("1", "best"), ("1", "near"), ("3", "far")]


def test_of_one_seed_a_side_mcnemar_decides(store: Store) -> None:
    attacked(store, "a", [1, 1, 1, 0, 1, 0, 1, 1])
    attacked(store, "b", [1, 0, 0, 1, 0, 0, 0, 1])
    a, b = all_rows(store)
    found = difference(a.accuracy.robust, b.accuracy.robust)
    assert found is not None
    first, second = a.accuracy.robust[0].tolist(), b.accuracy.robust[0].tolist()
    assert found[:3] == paired_difference(first, second)
    assert (found.p, found.only_a, found.only_b) == (mcnemar(4, 1), 4, 1)
    assert (found.n, found.seeds, found.significant) == (8, (1, 1), False)


def test_of_several_seeds_those_that_both_have_are_compared_image_by_image(store: Store) -> None:
    rng = np.random.default_rng(0)
    columns = {(name, seed): rng.integers(0, 2, 60) for name in ("a", "b") for seed in range(3)}
    for (name, seed), column in columns.items():
        if (name, seed) != ("b", 2):
            attacked(store, name, column.tolist(), seed=seed)
    a, b = all_rows(store)
    found = difference(a.accuracy.robust, b.accuracy.robust)
    first, second = ((columns[name, 0] + columns[name, 1]) / 2 for name in ("a", "b"))
    assert found is not None
    assert found[:3] == bootstrap_difference(first, second)
    assert (found.p, found.only_a, found.seeds) == (None, None, (2, 2))
    assert difference({}, b.accuracy.robust) is None


def test_shares_of_draws_are_kept_for_a_bootstrap_over_images(store: Store) -> None:
    train = trained(store, deploys="randomised")
    evaluated(store, train, "clean", [1, 1, 0], columns=draws([0.9, 0.9, 0.4], [0.8, 0.7, 0.3]))
    evaluated(store, train, "steep", [0, 1, 1], columns=draws([0.2, 0.95, 0.9], [0.3, 0.9, 0.9]))
    row = only(store)
    assert row.accuracy.share[0] == pytest.approx([0.3, 0.7, 0.3])
    assert row.accuracy.robust[0].tolist() == [False, True, False]
    found = difference(row.accuracy.share, {0: np.zeros(3)})
    assert found is not None
    assert (found.difference, found.p) == (pytest.approx(1.3 / 3), None)
    assert found.low > 0
    assert found.significant


def test_full_rows_keep_which_images_stand(store: Store) -> None:
    full(store, trained(store), 400)
    row = only(store)
    assert (len(row.accuracy.robust[0]), int(row.accuracy.robust[0].sum()), row.accuracy.share) == (1000, 400, {})
