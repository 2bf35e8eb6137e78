"""`bench compare`: what two defenses differ in, image by image, worked out by hand on small stores."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from factories import STANDARD, draws, evaluated, trained
from harness import Bench

from bench.core.stats import bootstrap_difference, mcnemar, paired_difference
from bench.records.store import Store
from bench.results.scope import scoped
from bench.tables.compare import Comparison, CostRatio, costs, lines, show
from bench.tables.selection import NO_ROW, RowFilter, pairs
from bench.tables.sweep import sweep

CLEAN_A, CLEAN_B = [1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1, 0, 1]
STEEP_A, STEEP_B = [1, 1, 1, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0, 1, 1]


def two(store: Store, **other: Any) -> tuple[str, str]:
    """guard and other_guard: clean and steep of 8 images each; gives the training keys."""
    first = trained(store, "guard", seconds=30.0, metrics={"work_per_image_f": 12.0})
    second = trained(store, "other_guard", **{"seconds": 10.0, "metrics": {"work_per_image_f": 3.0}, **other})
    for train, clean, steep in ((first, CLEAN_A, STEEP_A), (second, CLEAN_B, STEEP_B)):
        evaluated(store, train, "clean", clean)
        evaluated(store, train, "steep", steep)
    return first.key, second.key


def compared(store: Store, a: str = "guard", b: str = "other_guard", **where: Any) -> dict[str, Comparison]:
    (pair,) = pairs(store, a, b, RowFilter(**where))
    return {line.what: line for line in lines(store, pair)}


def costed(store: Store) -> dict[str, CostRatio]:
    (pair,) = pairs(store, "guard", "other_guard", RowFilter())
    return {cost.what: cost for cost in costs(pair)}


def test_every_shared_attack_and_the_worst_case_are_paired_image_by_image(store: Store) -> None:
    two(store)
    found = compared(store)
    assert list(found) == ["worst case", "clean", "steep"]
    steep = found["steep"].found
    assert steep is not None
    a, b = ([bool(value) for value in column] for column in (STEEP_A, STEEP_B))
    assert steep[:3] == paired_difference(a, b)
    assert (steep.p, steep.only_a, steep.only_b, steep.n) == (mcnemar(3, 1), 3, 1, 8)
    worst = found["worst case"]
    assert (worst.a, worst.b) == (5 / 8, 3 / 8)  # the wrong clean images count on either side
    assert worst.found is not None
    assert (worst.found.only_a, worst.found.only_b, worst.found.difference) == (4, 2, 2 / 8)


def test_attacks_on_other_numbers_of_images_are_compared_on_the_first_they_share(store: Store) -> None:
    for name, column in (("guard", [1, 1, 0, 1]), ("other_guard", [0, 1, 1, 0, 1, 1, 1, 1])):
        evaluated(store, trained(store, name), "steep", column)
    line = compared(store)["steep"]
    assert line.found is not None
    assert (line.found.n, line.a, line.b, line.found.difference) == (4, 0.75, 0.5, 0.25)


def test_where_there_is_no_difference_it_is_said_why(store: Store) -> None:
    first, second = trained(store, "guard"), trained(store, "other_guard")
    evaluated(store, first, "steep", [1, 1, 0], test_hash="one")
    evaluated(store, second, "steep", [1, 1, 1], test_hash="other")
    evaluated(store, first, "onestep", [1, 1, 0])
    evaluated(store, second, "onestep", state="error", n=3)
    found = compared(store)
    assert {what: line.why for what, line in found.items()} == {
        "worst case": "mixed test sets, incomplete", "steep": "evaluated on other images",
        "onestep": "other_guard: error",
    }  # fmt: skip
    assert all(line.found is line.a is line.b is None for line in found.values())


def test_single_draws_of_randomised_models_get_a_bootstrap_over_images(store: Store) -> None:
    shares = {"guard": [0.5, 0.9, 0.2, 0.4], "other_guard": [0.1, 0.8, 0.3, 0.4]}
    for name, share in shares.items():
        evaluated(store, trained(store, name, deploys="randomised"), "steep", [1, 1, 0, 0], columns=draws(share, share))
    line = compared(store)["single draw"]
    assert line.found is not None
    expected = bootstrap_difference(*(np.array(share, dtype=np.float32) for share in shares.values()))
    assert line.found[:3] == pytest.approx(expected)
    assert (line.a, line.b, line.found.p) == (pytest.approx(0.5), pytest.approx(0.4), None)


def test_a_key_is_one_seed_and_so_is_the_option(store: Store) -> None:
    keys = {}
    for name in ("guard", "other_guard"):
        for seed in (0, 1):
            train = trained(store, name, seed)
            keys[name, seed] = train.key
            evaluated(store, train, "steep", [1, seed, 0, int(name == "guard")], STANDARD)
    label = "steep (version=standard)"
    for given in ({"seed": 1}, {"a": keys["guard", 1], "b": keys["other_guard", 1]}):
        line = compared(store, **given)[label]  # type: ignore[arg-type]
        assert line.found is not None
        assert (line.a, line.b, line.found.seeds, line.found.only_a) == (0.75, 0.5, (1, 1), 1)
    both = compared(store)[label]
    assert both.found is not None
    assert (both.a, both.b, both.found.seeds, both.found.p) == (0.625, 0.375, (2, 2), None)
    crossed = compared(store, a=keys["guard", 0], b=keys["other_guard", 1])[label]
    assert (crossed.a, crossed.b) == (0.5, 0.5)


def test_costs_have_a_ratio_on_equal_devices_only_and_work_always(store: Store) -> None:
    two(store)
    found = costed(store)
    assert (found["training seconds"].ratio, found["training work, F an image"].ratio) == (3.0, 4.0)


@pytest.mark.parametrize(
    ("other", "why"), [({"device": "GPU y"}, "other devices: CPU x, GPU y"), ({"workers": 2}, "other jobs")]
)
def test_times_that_cannot_be_compared_have_no_ratio(store: Store, other: dict[str, Any], why: str) -> None:
    two(store, **other)
    found = costed(store)
    assert (found["training seconds"].a, found["training seconds"].b) == (30.0, 10.0)
    assert (found["training seconds"].ratio, found["training work, F an image"].ratio) == (None, 4.0)
    assert why in found["training seconds"].why


def test_times_beside_other_jobs_are_left_out_where_both_sides_have_others(store: Store) -> None:
    """Blended they would be 60 and 30 s; work does not depend on what else the machine did."""
    for name, seconds, work in (("guard", (30.0, 90.0), (12.0, 8.0)), ("other_guard", (10.0, 50.0), (4.0, 1.0))):
        for seed in (0, 1):
            metrics = {"work_per_image_f": work[seed], "inference_ms_per_image": seconds[seed] / 10}
            train = trained(store, name, seed, seconds=seconds[seed], workers=1 + 3 * seed, metrics=metrics)
            evaluated(store, train, "steep", [1, 0])
    found = costed(store)
    alone = "of the trainings that had the machine to themselves"
    assert found["training seconds"] == CostRatio("training seconds", 30.0, 10.0, 3.0, alone)
    assert found["inference ms an image"] == CostRatio("inference ms an image", 3.0, 1.0, 3.0, alone)
    assert found["training work, F an image"] == CostRatio("training work, F an image", 10.0, 2.5, 4.0)
    assert f"training seconds: {alone}" in show(store, "guard", "other_guard", RowFilter(), False)
    (pair,) = pairs(store, "guard", "other_guard", RowFilter(seed=0))
    assert {cost.why for cost in costs(pair)} == {""}  # nothing was left out of this seed


def test_work_that_was_not_counted_has_no_ratio(store: Store) -> None:
    two(store, metrics={})
    assert costed(store)["training work, F an image"] == CostRatio(
        "training work, F an image", 12.0, None, None, "not measured"
    )


def test_a_budget_of_the_option_is_the_same_however_it_is_written(store: Store) -> None:
    for name in ("guard", "other_guard"):
        train = trained(store, name)
        for eps in ("1/10", "0.2"):
            evaluated(store, train, "steep", [1, 0], eps=eps)
    assert len(pairs(store, "guard", "other_guard", RowFilter())) == 2
    (pair,) = pairs(scoped(store, eps=["0.1"]), "guard", "other_guard", RowFilter(norm="linf"))
    assert pair.rows[0].eps == "1/10"


def test_names_that_mean_nothing_or_several_things_get_one_line(store: Store, bench: Bench) -> None:
    key_a, _ = two(store)
    twin = trained(store, "guard", threat={"eps": "0.3"})
    evaluated(store, twin, "steep", [1] * 8)
    evaluated(store, trained(store, "far"), "steep", [1] * 8, eps="0.5")
    for names, expected in (
        (("gaurd", "other_guard"), "no row is named 'gaurd'. Did you mean guard"),
        (("zzz", "other_guard"), "no row is named 'zzz'. Known: far, guard, other_guard"),
        (("guard", "other_guard"), "Give the training key of one\n"),
        (("far", "other_guard"), "share no budget: toy Linf eps 0.5 against toy Linf eps 0.1"),
    ):
        done = bench("compare", *names, "--results-dir", store.root)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert expected in done.err
    ambiguous = bench("compare", "guard", "other_guard", "--results-dir", store.root).err
    assert key_a in ambiguous
    assert twin.key in ambiguous
    assert bench("compare", key_a, "other_guard", "--results-dir", store.root).code == 0
    rival = trained(store, "other_guard", threat={"eps": "0.3"})
    evaluated(store, rival, "steep", [1] * 8)
    both = bench("compare", "guard", "other_guard", "--results-dir", store.root).err  # the keys of both sides at once
    assert both.count("\n") == 1
    assert both.endswith("Give the training key of one of each\n")
    assert all(key in both for key in (key_a, twin.key, rival.key))


def test_what_was_never_evaluated_makes_no_name_ambiguous(store: Store, bench: Bench) -> None:
    two(store)
    planned = trained(store, "guard", threat={"eps": "0.3"}, state="missing")
    evaluated(store, planned, "steep", state="missing", n=8)
    assert bench("compare", "guard", "other_guard", "--results-dir", store.root).code == 0


def test_a_star_is_mcnemars_with_one_seed_a_side_and_the_intervals_with_several(store: Store) -> None:
    """Five images that one alone loses: p is 2/32, though Newcombe's interval leaves out 0; of six p is 2/64."""
    for name, lost in (("guard", 50), ("other_guard", 55)):
        evaluated(store, trained(store, name), "steep", [0] * lost + [1] * (100 - lost))
    found = compared(store)["steep"].found
    assert found is not None
    assert (found.low > 0, found.p, found.significant) == (True, 0.0625, False)
    assert "+5.00 *" not in show(store, "guard", "other_guard", RowFilter(), False)
    for name, lost in (("guard", 49), ("other_guard", 55)):
        evaluated(store, trained(store, name, 1), "steep", [0] * lost + [1] * (100 - lost))
    six = compared(store, seed=1)["steep"].found
    assert six is not None
    assert (six.p, six.significant) == (0.03125, True)
    assert "+6.00 *" in show(store, "guard", "other_guard", RowFilter(seed=1), False)
    both = compared(store)["steep"].found
    assert both is not None
    assert (both.p, both.low > 0, both.significant) == (None, True, True)


def test_text_and_json_say_the_same_twice(store: Store, bench: Bench) -> None:
    two(store)
    text, as_json = (show(store, "guard", "other_guard", RowFilter(), flag) for flag in (False, True))
    assert text == show(store, "guard", "other_guard", RowFilter(), False)
    (found,) = json.loads(as_json)
    steep = next(line for line in found["lines"] if line["what"] == "steep")
    assert (steep["only_a"], steep["only_b"], steep["significant"]) == (3, 1, False)
    assert (found["eps"], found["a"]["method"], found["b"]["method"]) == ("0.1", "guard", "other_guard")
    shown = next(line.split() for line in text.splitlines() if line.startswith("steep"))
    assert shown[1:4] == ["75.00", "50.00", "+25.00"]
    assert shown[-5:] == [f"{steep['p']:.3f}", "3", "1", "8", "1"]
    assert math.isclose(steep["difference"], 0.25)


def test_a_name_cannot_steer_the_terminal(store: Store) -> None:
    for name in ("guard", "\x1b[2Jbad\n\u202e"):
        evaluated(store, trained(store, name), "steep", [1, 0])
    text = show(store, "guard", "\x1b[2Jbad\n\u202e", RowFilter(), False)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "B =  [2Jbad" in text


def test_before_the_first_evaluation_the_next_command_is_told(store: Store) -> None:
    trained(store, "guard")
    with pytest.raises(LookupError, match=NO_ROW):
        pairs(store, "guard", "standard", RowFilter())
    with pytest.raises(LookupError, match=NO_ROW):
        sweep(store, [], "guard", "beta", RowFilter())
