"""Tables are derived from records and per-sample arrays only; every number here can be checked by hand."""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import STANDARD, STEPS, all_rows, draws, evaluated, full, golden_store, only, trained
from harness import Bench
from paths import TESTS
from report_page import log

from bench.core.stats import paired_difference, wilson
from bench.data import datasets
from bench.planning.labels import label
from bench.records.store import Store
from bench.report.canvas import FEWEST
from bench.report.training import training_curves
from bench.results.evaluations import COLUMNS, frame
from bench.results.labels import different_n
from bench.results.significance import Difference, difference
from bench.results.worst_case import minima
from bench.tables.columns import paper
from bench.tables.leaderboard import markdown, write_leaderboard
from bench.tables.markdown import BEGIN, END, escape
from bench.tables.summary import _best, matrix

GOLDEN = TESTS / "golden" / "leaderboard.md"
# attacks without a file, so that no edit of a plug-in changes these tables: `steep` and `onestep`


def test_worst_case_is_the_minimum_of_each_sample_not_of_means(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [1, 1, 1, 1, 1, 0])
    evaluated(store, train, "steep", [1, 1, 0, 0, 1, 0], STEPS)
    evaluated(store, train, "onestep", [0, 0, 1, 1, 1, 0])
    row = only(store)
    assert row.accuracy.worst.values == {0: pytest.approx(1 / 6)}
    assert row.accuracy.worst.n == 6
    assert [c.mean for c in row.accuracy.attacks.values()] == pytest.approx([1 / 2, 1 / 2])
    assert row.accuracy.clean.mean == pytest.approx(5 / 6)
    assert row.accuracy.worst.interval() == pytest.approx(wilson(1, 6))


def test_against_noise_the_attack_is_chosen_by_some_draws_and_judged_by_others(store: Store) -> None:
    train = trained(store, deploys="randomised")
    evaluated(store, train, "clean", [1, 1, 1, 0], columns=draws([0.9, 0.9, 0.9, 0.9], [0.8, 0.8, 0.8, 0.8]))
    evaluated(store, train, "steep", [0, 1, 1, 1], columns=draws([0.5, 0.4, 0.9, 1.0], [0.6, 0.5, 0.9, 0.1]))
    evaluated(store, train, "onestep", [1, 1, 0, 0], columns=draws([0.6, 0.6, 0.8, 1.0], [0.1, 0.2, 0.4, 0.0]))
    row = only(store)
    # chosen: steep, steep, onestep, clean; the minimum of `correct` would be 1 of 4, of `share` 0.175
    assert row.accuracy.worst.values == {0: 0.25}
    assert row.accuracy.worst.values[0] == np.mean([0, 1, 0, 0])
    assert row.accuracy.single.values[0] == pytest.approx(np.mean([0.6, 0.5, 0.4, 0.8]))
    assert "| Single draw |" in markdown(store)
    assert "57.50" in markdown(store)


def test_a_coin_scores_about_half_however_many_attacks_there_are(store: Store) -> None:
    rng, n = np.random.default_rng(0), 1000
    train = trained(store, deploys="randomised")
    for attack in ("clean", "steep", "onestep", "third", "fourth", "fifth"):
        shares = draws(list(rng.binomial(100, 0.5, n) / 100), list(rng.binomial(100, 0.5, n) / 100))
        evaluated(store, train, attack, list(rng.integers(0, 2, n)), columns=shares)
    row = only(store)
    assert 0.45 < row.accuracy.worst.mean < 0.55
    assert 0.49 < row.accuracy.single.mean < 0.51


def test_a_security_curve_is_a_column_of_every_budget_it_walks_through(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [1, 1, 1, 0])
    evaluated(store, train, "steep", [1, 1, 0, 0], eps="0.2")
    broken = {"broken_at": np.array([np.inf, 0.2, 0.1, 0.0])}
    key = evaluated(store, train, "curve", [1, 0, 0, 0], {"budgets": ["0", "0.1", "0.2"]}, eps="0.2", columns=broken)
    table = frame(store)
    assert table[table.key == key].set_index("eps").accuracy.to_dict() == {"0": 0.75, "0.1": 0.5, "0.2": 0.25}
    found = {row.eps: row for row in all_rows(store)}
    assert {eps: row.accuracy.worst.mean for eps, row in found.items()} == {"0": 0.75, "0.1": 0.5, "0.2": 0.25}
    assert list(found["0.1"].accuracy.attacks) == ["curve"]
    assert paired(store, [key], [key], eps=0.1).n == 4


def test_a_curve_of_a_randomised_model_has_draws_of_its_own_at_every_budget(store: Store) -> None:
    train = trained(store, deploys="randomised")
    evaluated(store, train, "clean", [1, 1], columns=draws([0.9, 0.8], [0.9, 0.8]))
    at = np.array([[0.85, 0.5, 0.1], [0.85, 0.7, 0.3]])
    columns = {"broken_at": np.array([np.inf, 0.2]), "select_at": at, "share_at": at + 0.01}
    settings = {"budgets": ["0.1", "0"]}  # in any order; that of the threat is always among them
    evaluated(store, train, "curve", [1, 0], settings, eps="0.2", columns={**columns, **draws([0.1] * 2, [0.1] * 2)})
    found = {row.eps: row.accuracy.single.mean for row in all_rows(store)}
    assert found["0"] == pytest.approx((0.86 + 0.8) / 2)  # the second image is worse without the attack
    assert found["0.1"] == pytest.approx((0.51 + 0.71) / 2)


def test_the_worst_case_is_never_above_any_column(store: Store) -> None:
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        train = trained(store, name)
        for attack in ("clean", "steep", "onestep"):
            evaluated(store, train, attack, rng.integers(0, 2, 50).tolist())
    for row in all_rows(store):
        assert row.accuracy.worst.mean <= min(
            row.accuracy.clean.mean, *(cell.mean for cell in row.accuracy.attacks.values())
        )


def test_clean_errors_count_as_not_robust(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [0, 1, 1, 1])
    evaluated(store, train, "steep", [1, 1, 0, 1], STEPS)
    assert only(store).accuracy.worst.mean == pytest.approx(2 / 4)


def test_clean_and_certify_stand_in_every_eps_row(store: Store) -> None:
    train = trained(store, deploys="smoothed")
    evaluated(store, train, "clean", [1, 1, 1, 0])
    radius = {"radius": np.array([0.1, 0.3, 0.6, 2.0], dtype=np.float32)}
    evaluated(store, train, "certify", [1, 1, 1, 0], columns=radius)
    evaluated(store, train, "steep", [1, 1, 0, 0], norm="L2", eps="0.5")
    evaluated(store, train, "steep", [1, 0, 0, 0], norm="L2", eps="2")
    small, large = all_rows(store)
    assert (small.eps, large.eps) == ("0.5", "2")
    assert small.accuracy.clean == large.accuracy.clean
    assert small.accuracy.worst.mean == 0.5
    assert large.accuracy.worst.mean == 0.25
    # the wrong image with the largest radius is never certified; the eps of an L2 row is a radius too
    assert {r: c.mean for r, c in small.accuracy.certified.items()} == {0.0: 0.75, 0.25: 0.5, 0.5: 0.25, 1.0: 0.0}
    assert list(large.accuracy.certified) == [0.0, 0.25, 0.5, 1.0, 2.0]
    assert small.accuracy.acr.mean == large.accuracy.acr.mean == pytest.approx((0.1 + 0.3 + 0.6) / 4)


def test_certified_accuracy_at_radii_of_ones_own(store: Store, tmp_path: Path, bench: Bench) -> None:
    for seed, last in ((0, 0.82), (1, 0.4)):
        train = trained(store, seed=seed, deploys="smoothed")
        columns = {"radius": np.array([0.1, 128 / 255, last, 3.0], dtype=np.float64)}
        evaluated(store, train, "certify", [1, 1, 1, 0], columns=columns)
    outcome = bench("leaderboard", "--results-dir", store.root, "--radii", "0.45,128/255", "--output", "board.md")
    assert outcome.code == 0, outcome.err
    (line,) = csv.DictReader((store.root / "tables" / "leaderboard.csv").read_text().splitlines())
    shown = {name: float(value) for name, value in line.items() if "ertified" in name}
    mean = (0.1 + 128 / 255 + (0.82 + 0.4) / 2) / 4
    wanted = {"certified L2 0.45": 0.375, "certified L2 0.501961": 0.375, "average certified L2 radius": mean}
    assert shown == pytest.approx(wanted)
    board = Path("board.md").read_text()
    assert "| certified at L2 0.45 | certified at L2 0.501961 | average certified L2 radius |" in board
    assert "0.303 (std 0.074, n=4)" in board
    refusal = bench("leaderboard", "--results-dir", store.root, "--radii", "0.25,far")
    assert (refusal.code, refusal.err.count("\n")) == (2, 1)
    assert "'far' is not a number" in refusal.err


def test_certify_never_joins_the_worst_case(store: Store) -> None:
    train = trained(store, deploys="smoothed")
    evaluated(store, train, "steep", [1, 1, 1, 1])
    evaluated(store, train, "certify", [0, 0, 0, 0], columns={"radius": np.zeros(4)})
    assert only(store).accuracy.worst.mean == 1.0


def test_the_worst_case_runs_over_the_largest_shared_prefix(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [1] * 1000)
    evaluated(store, train, "steep", [1] * 500 + [0] * 500, STEPS)
    evaluated(store, train, "autoattack", [0] * 20 + [1] * 80, STANDARD)
    row = only(store)
    assert row.accuracy.worst.n == 100
    assert row.accuracy.worst.mean == pytest.approx(0.8)
    assert row.accuracy.attacks["steep (steps=40)"].n == 1000
    assert row.accuracy.attacks["steep (steps=40)"].mean == 0.5
    assert "50.00 (n=1000)" in markdown(store)


def test_a_prefix_ends_at_the_first_gap_and_the_order_in_the_file_does_not_matter(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "steep", [1, 0, 1, 1], columns={"index": np.array([3, 2, 1, 0])})
    evaluated(store, train, "onestep", [1, 1, 1, 1], columns={"index": np.array([0, 1, 2, 7])})
    row = only(store)
    assert row.accuracy.worst.n == 3
    assert row.accuracy.worst.mean == pytest.approx(2 / 3)


def test_no_shared_image_is_no_worst_case(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "steep", [1, 1], columns={"index": np.array([5, 6])})
    row = only(store)
    assert row.accuracy.worst.values == {}
    assert row.accuracy.worst.state() == "no shared images"


def test_seeds_are_kept_apart_and_their_mean_has_the_interval_of_one(store: Store) -> None:
    for seed, hits in enumerate((4, 5, 6)):
        evaluated(store, trained(store, seed=seed), "steep", [1] * hits + [0] * (10 - hits), STEPS)
    row = only(store)
    assert row.accuracy.worst.values == {0: 0.4, 1: 0.5, 2: 0.6}
    assert row.accuracy.worst.std == pytest.approx(0.1)
    assert row.accuracy.worst.interval() == pytest.approx(wilson(5, 10))  # not of 30: seeds share their images
    assert "50.00 (std 10.00)" in markdown(store)
    assert "3/3 (0: 40.00, 1: 50.00, 2: 60.00)" in markdown(store)
    table = frame(store)
    assert sorted(table["accuracy"]) == [0.4, 0.5, 0.6]
    assert len(table) == 3


def test_only_seeds_with_the_full_attack_set_make_the_headline(store: Store) -> None:
    for seed in range(3):
        train = trained(store, seed=seed)
        evaluated(store, train, "steep", [1] * 9 + [0], STEPS)
        if seed == 1:
            evaluated(store, train, "autoattack", [1] * 2 + [0] * 8, STANDARD)
    row = only(store)
    assert row.accuracy.worst.values == {1: 0.2}
    assert row.seeds == (0, 1, 2)
    assert row.accuracy.worst.absent[0] == ("incomplete", f"{label('attacks', 'autoattack', STANDARD)} not planned")
    assert "| 1/3 |" in markdown(store)
    assert "20.00 (1/3 seeds)" in markdown(store)


@pytest.mark.parametrize("state", ["error", "diverged", "unsupported"])
def test_a_cell_without_a_number_says_so_and_is_never_zero_or_robust(store: Store, state: str) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [1, 1])
    evaluated(store, train, "onestep", [1, 0])
    evaluated(store, train, "steep", state=state, n=2, settings=STEPS)
    table = frame(store)
    cell = table[table["attack"] == "steep"].iloc[0]
    assert cell["state"] == state
    assert math.isnan(cell["accuracy"])
    assert math.isnan(cell["low"])
    row = only(store)
    assert row.accuracy.attacks["steep (steps=40)"].state() == state
    assert row.accuracy.attacks["steep (steps=40)"].values == {}
    if state == "unsupported":  # does not apply to this model: the rest is judged
        assert row.accuracy.worst.mean == 0.5
    else:  # the attack might have won: without it there is no worst case
        assert row.accuracy.worst.values == {}
        assert row.accuracy.worst.state() == "incomplete"
        assert "no worst case" in row.provisional
        assert "| – |" in markdown(store)
    assert f"| {state} |" in markdown(store)
    reasons = {"error": "out of memory", "diverged": "out of memory", "unsupported": "needs gradients"}
    assert reasons[state] in markdown(store)
    header, (line,), notes, _ = matrix(store, list(table["key"]))
    assert line[header.index("steep (steps=40)")] == state
    assert f"guard, seed 0, steep (steps=40): {state}: " in " ".join(notes)


def test_what_was_only_planned_changes_no_number_and_is_one_note(store: Store) -> None:
    def results() -> tuple[str, list[list[str]], int]:
        return markdown(store), matrix(store, store.keys()).lines, len(all_rows(store))

    for name in ("guard", "other"):
        train = trained(store, name)
        for seed in (0, 1):
            train = trained(store, name, seed)
            evaluated(store, train, "clean", [1, 1, 1, 0])
            evaluated(store, train, "onestep", [1, 1, 0, 0])
    before = results()
    for seed in (0, 1):  # as after a run that was stopped: an attack, a budget, a seed and a defense have no record
        evaluated(store, trained(store, seed=seed), "steep", state="missing", n=4)
        evaluated(store, trained(store, seed=seed), "onestep", state="missing", n=4, eps="0.2")
    for name, attack in (("guard", "clean"), ("guard", "onestep"), ("later", "clean"), ("later", "onestep")):
        evaluated(store, trained(store, name, 2, state="missing"), attack, state="missing", n=4)
    note = "8 evaluations planned but not run: in no table (`bench forget --never-ran` removes them)"
    text, lines, count = results()
    assert (text.replace(f"\n{escape(note)}.\n", ""), lines, count) == before
    assert note in matrix(store, store.keys()).notes
    assert sum("never-ran" in line for line in text.splitlines()) == 1


def test_a_seed_that_lacks_an_attack_of_the_others_is_in_no_worst_case(store: Store) -> None:
    for seed in (0, 1):
        train = trained(store, seed=seed)
        evaluated(store, train, "clean", [1, 1])
        evaluated(store, train, "onestep", [1, 0], state="done" if seed else "missing", n=2)
    row = only(store)
    assert (row.seeds, row.accuracy.worst.values) == ((0, 1), {1: 0.5})
    assert row.accuracy.worst.absent == {0: ("incomplete", "onestep missing")}


@pytest.mark.parametrize("state", ["error", "diverged"])
def test_a_failed_training_blocks_its_evaluations(store: Store, state: str) -> None:
    train = trained(store, state=state)
    key = evaluated(store, train, "steep", state="missing", n=5)
    entry = frame(store, [train.key, key]).iloc[0]
    assert (entry["state"], entry["train_state"]) == ("blocked", state)
    assert entry["reason"] == f"training {state}: Diverged: loss is NaN"
    assert "| blocked |" in markdown(store)
    assert "loss is NaN" in markdown(store)


def test_an_evaluation_before_its_training_is_missing_not_blocked(store: Store) -> None:
    key = evaluated(store, trained(store, state="missing"), "steep", state="missing", n=5)
    entry = frame(store, [key]).iloc[0]
    assert (entry["state"], entry["train_state"], entry["n"]) == ("missing", "missing", 5)


def test_nothing_but_clean_is_not_attacked_rather_than_robust(store: Store) -> None:
    evaluated(store, trained(store), "clean", [1, 1])
    row = only(store)
    assert row.norm is None
    assert row.accuracy.worst.values == {}
    assert row.accuracy.worst.state() == "not attacked"
    assert "## toy, no attack" in markdown(store)


def test_attacks_that_are_all_unsupported_are_no_attack(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [1, 1])
    evaluated(store, train, "steep", state="unsupported", n=2)
    assert only(store).accuracy.worst.state() == "not attacked"


def test_damaged_samples_are_no_number(store: Store) -> None:
    train = trained(store)
    key = evaluated(store, train, "steep", [1, 1])
    (store.folder(key) / "samples.npz").write_bytes(b"PK")
    entry = frame(store).iloc[0]
    assert entry["state"] == "unreadable"
    assert math.isnan(entry["accuracy"])
    assert "match" in entry["reason"]
    assert only(store).accuracy.worst.state() == "incomplete"
    assert "| unreadable |" in markdown(store)


def test_a_changed_job_is_named_and_hides_no_other(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "onestep", [1, 0])
    key = evaluated(store, train, "steep", [1, 1])
    path = store.folder(key) / "job.json"
    path.write_text(path.read_text().replace('"n": 2', '"n": 3'))
    assert set(frame(store)["state"]) == {"done", "unreadable"}
    assert f"cannot be read and are in no table: {key}" in markdown(store)
    assert any(key in note for note in matrix(store, [key])[2])


def test_a_key_without_a_job_is_unreadable_when_asked_for_and_a_stray_folder_is_passed_over(store: Store) -> None:
    (store.root / ("0" * 12)).mkdir()
    assert len(frame(store)) == 0
    assert frame(store, ["0" * 12]).iloc[0]["state"] == "unreadable"


def test_the_certificate_that_is_done_is_shown(store: Store) -> None:
    train = trained(store, deploys="smoothed")
    evaluated(store, train, "certify", state="error", n=2, settings={"n": 10})
    evaluated(store, train, "certify", [1, 1], {"n": 99}, columns={"radius": np.array([0.3, 0.6])})
    assert only(store).accuracy.certified[0.5].mean == 0.5
    assert "## toy, no attack" in markdown(store)


def test_evaluations_of_other_test_images_are_not_mixed(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [1, 1], test_hash="aaa")
    evaluated(store, train, "steep", [1, 0], STEPS, test_hash="bbb")
    row = only(store)
    assert row.accuracy.worst.values == {}
    assert row.accuracy.worst.state() == "mixed test sets"
    assert "aaa" in row.accuracy.worst.absent[0][1]
    assert "bbb" in row.accuracy.worst.absent[0][1]
    assert "| mixed test sets |" in markdown(store)


def test_subsets_of_other_sizes_hash_apart_but_their_labels_must_agree(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [1] * 4, columns={"label": np.array([3, 1, 4, 1])})
    evaluated(store, train, "steep", [1, 0], columns={"label": np.array([3, 1])})
    assert only(store).accuracy.worst.mean == 0.5
    evaluated(store, train, "onestep", [1, 1, 1], columns={"label": np.array([3, 2, 4])})
    assert only(store).accuracy.worst.state() == "mixed test sets"


def test_seeds_with_other_test_images_are_not_averaged(store: Store) -> None:
    for seed in range(2):
        evaluated(store, trained(store, seed=seed), "steep", [1, 0], test_hash=f"seed{seed}")
    row = only(store)
    assert row.accuracy.attacks["steep"].state() == row.accuracy.worst.state() == "mixed test sets"


@pytest.mark.parametrize(
    ("second", "names"),
    [
        ({"content": "b" * 16}, {"folder:pets aaaaaaaa", "folder:pets bbbbbbbb"}),
        ({"content": None}, {"folder:pets aaaaaaaa", "folder:pets unknown"}),
        ({"content": "a" * 16, "size": 16}, {"folder:pets 8 px", "folder:pets 16 px"}),
        ({"content": "a" * 16}, {"folder:pets"}),
    ],
)
def test_image_folders_of_one_name_have_tables_of_their_own(
    store: Store, second: dict[str, Any], names: set[str]
) -> None:
    first = {"name": "folder:pets", "size": 8, "content": "a" * 16}
    for data in (first, {**first, **second}):
        train = trained(store, seed=len(store.keys()), data=data)  # otherwise two seeds of one row
        full(store, train, 500)
        log(store, train, *[{"loss": 1.0}] * FEWEST)
    assert {row.dataset for row in all_rows(store)} == names
    assert len(all_rows(store)) == len(names)
    assert set(frame(store).dataset) == names
    assert set(re.findall(r"^## (.*), Linf", markdown(store), re.M)) == names
    assert {plot.dataset for plot in training_curves(store, all_rows(store))} == names


def test_a_larger_run_and_a_newer_revision_replace_a_smaller_and_an_older_one(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "steep", [0] * 2)
    evaluated(store, train, "steep", [1] * 4)
    assert only(store).accuracy.worst.mean == 1.0
    assert only(store).accuracy.worst.n == 4
    evaluated(store, train, "steep", state="error", n=6)  # a failed larger run does not hide what is known
    assert only(store).accuracy.worst.n == 4
    evaluated(store, train, "steep", state="missing", n=4, revision=2)  # but an old revision no longer counts
    assert only(store).accuracy.attacks["steep"].state() == "missing"


def test_a_collapsed_seed_is_counted_and_stays_in_the_mean(store: Store) -> None:
    for seed, hits in enumerate((60, 50, 1)):
        evaluated(store, trained(store, seed=seed), "steep", [1] * hits + [0] * (100 - hits))
    row = only(store)
    assert row.accuracy.collapsed == (2,)
    assert row.accuracy.worst.mean == pytest.approx(0.37)
    # beside the mean over all, what the two others give
    assert "1 collapsed (seed 2; the others 55.00 (std 7.07))" in markdown(store)
    assert "2: 1.00" in markdown(store)


def test_a_constant_predictor_is_collapsed_though_it_is_robust_at_chance(store: Store) -> None:
    for seed, hits in enumerate((90, 10)):
        train = trained(store, seed=seed, data={"name": "digits"})
        evaluated(store, train, "clean", [1] * hits + [0] * (100 - hits))
        evaluated(store, train, "steep", [1] * min(hits, 30) + [0] * (100 - min(hits, 30)))
    assert only(store).accuracy.collapsed == (1,)


def test_noise_near_zero_is_no_collapse(store: Store) -> None:
    for seed, hits in enumerate((2, 0, 1)):
        evaluated(store, trained(store, seed=seed), "steep", [1] * hits + [0] * (100 - hits))
    assert only(store).accuracy.collapsed == ()


def test_a_row_is_ranked_with_1000_images_and_autoattack_standard(store: Store) -> None:
    full(store, trained(store), 300)
    assert only(store).provisional == ()
    assert only(store).accuracy.autoattack.mean == 0.3


@pytest.mark.parametrize(
    ("n", "version", "deploys", "reason"),
    [
        (999, "standard", "deterministic", "worst case over 999 images, ranking needs 1000"),
        (1000, "custom", "deterministic", "AutoAttack standard is not in the attack set"),
        (1000, "rand", "deterministic", "AutoAttack standard is not in the attack set"),
        (1000, "standard", "randomised", "randomized protocol lacks eot, closed_form, transfer"),
        (1000, "standard", "smoothed", "randomized protocol lacks eot, closed_form, transfer"),
    ],
)
def test_a_row_is_provisional_with_the_reason(store: Store, n: int, version: str, deploys: str, reason: str) -> None:
    train = trained(store, deploys=deploys)
    evaluated(store, train, "steep", [1] * n)
    evaluated(
        store, train, "autoattack", [1] * n, {"version": version, "eot": 20}, metrics={"backwards_per_image": 400.0}
    )
    assert only(store).provisional == (reason,)
    assert f"a = {escape(reason)}" in markdown(store)
    assert f"; order provisional: {escape(reason)}" in markdown(store)
    assert "†" not in markdown(store)  # a mark is for exceptions
    assert any(reason in note for note in matrix(store, store.keys())[2])


def test_a_test_set_under_1000_images_is_ranked_when_whole(store: Store) -> None:
    name, facts = min(datasets.KNOWN.items(), key=lambda item: item[1].test)
    needed = min(1000, facts.test)
    full(store, trained(store, data={"name": name}), 10, needed)
    assert only(store).provisional == ()
    full(store, trained(store, "other", data={"name": name}), 10, needed - 1)
    assert [len(row.provisional) for row in all_rows(store)] == [0, 1]


def test_ranked_rows_stand_before_provisional_ones_best_first(store: Store) -> None:
    full(store, trained(store, "weak"), 100)
    full(store, trained(store, "strong"), 400)
    full(store, trained(store, "tied"), 400)
    full(store, trained(store, "quick"), 9, 10)
    short, _, whole = markdown(store).partition("<details>")
    for text, ranks in ((short, ["1–2", "=", "3", "1†"]), (whole, ["1", "1", "3", "1†"])):
        lines = [line.strip("| ").split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")]
        names = ["strong", "tied", "weak", "quick"]
        assert lines[2:] == [[rank, name] for rank, name in zip(ranks, names, strict=True)]
    assert "; † order provisional: worst case over 10 images, ranking needs 1000" in short


def test_randomised_and_certified_rows_have_sections_of_their_own(store: Store) -> None:
    for deploys in ("deterministic", "randomised", "smoothed"):
        evaluated(store, trained(store, deploys, deploys=deploys), "steep", [1, 0])
    text = markdown(store)
    places = [text.index(f"### {title}") for title in ("Deterministic", "Randomized at test time", "Certified")]
    assert places == sorted(places)


def test_training_time_is_compared_with_standard_on_the_same_footing(store: Store) -> None:
    for seed, seconds in enumerate((10.0, 20.0)):
        evaluated(store, trained(store, "standard", seed, seconds=seconds, eps=None), "steep", [1, 0])
    evaluated(store, trained(store, "guard", seconds=45.0), "steep", [1, 0])
    evaluated(store, trained(store, "gpu", seconds=45.0, device="H100"), "steep", [1, 0])
    evaluated(store, trained(store, "longer", seconds=45.0, train={"epochs": 9}), "steep", [1, 0])
    found = {row.method: row for row in all_rows(store)}
    assert found["standard"].cost.train_seconds == 15.0
    assert found["standard"].cost.ratio == 1.0
    assert found["guard"].cost.ratio == 3.0
    assert math.isnan(found["gpu"].cost.ratio)
    assert math.isnan(found["longer"].cost.ratio)
    assert "45.0 (3.00×)" in markdown(store)
    assert "| 45.0 |" in markdown(store)


def test_each_seed_is_compared_with_standard_as_it_was_trained_itself(store: Store) -> None:
    """Alone standard takes 10 s and beside other jobs 40 s, guard 30 s and 80 s: 3 and 2 times as long."""
    for name, seed, seconds, workers in (
        ("standard", 0, 10.0, 1), ("standard", 1, 30.0, 4), ("standard", 2, 50.0, 4),
        ("guard", 0, 30.0, 1), ("guard", 1, 80.0, 4), ("late", 1, 80.0, 4), ("partly", 0, 30.0, 1),
    ):  # fmt: skip
        evaluated(store, trained(store, name, seed, seconds=seconds, workers=workers), "steep", [1, 0])
    evaluated(store, trained(store, "partly", 1, seconds=80.0, device="H100"), "steep", [1, 0])
    found = {row.method: row for row in all_rows(store)}
    assert {name: pytest.approx(row.cost.ratio) for name, row in found.items()} == {
        "standard": 1.0, "guard": 2.5, "late": 2.0, "partly": 3.0,
    }  # fmt: skip
    assert (found["guard"].cost.train_seconds, found["guard"].cost.shared) == (55.0, True)
    assert "| 30.0 (1.00×) |" in markdown(store)
    assert "| 55.0 (2.50×) |" in markdown(store)


def test_times_from_a_shared_machine_are_marked_and_no_ratio_of_them_stands_in_the_short_table(store: Store) -> None:
    for name in ("standard", "guard"):
        evaluated(store, trained(store, name, seconds=10.0, workers=4), "steep", [1, 0])
    assert "‡" not in markdown(store)
    assert "Times are not comparable: the machine did other jobs meanwhile." in markdown(store)
    assert "; no × where the machine did other jobs meanwhile." in markdown(store)
    assert "× |" not in markdown(store)
    for name, seconds in (("standard", 10.0), ("a", 11.0), ("b", 12.0), ("c", 13.0)):
        evaluated(store, trained(store, name, 1, seconds=seconds), "steep", [1, 0])
    lines = markdown(store).splitlines()
    assert {line.split(" | ")[1] for line in lines if "‡ |" in line} == {"standard", "guard"}  # of all columns
    assert "‡ not comparable with other times: the machine did other jobs meanwhile." in lines
    short = [line.split(" | ") for line in lines if line.endswith("× |")]
    assert [(cells[1], cells[-1]) for cells in short] == [("a", "1.10× |"), ("b", "1.20× |"), ("c", "1.30× |")]


def test_a_row_names_its_architecture_where_it_is_not_that_of_most(store: Store) -> None:
    for name, model in (("standard", "tiny"), ("guard", "tiny"), ("late", "wide")):
        evaluated(store, trained(store, name, model={"name": model}), "steep", [1, 0])
    text = markdown(store)
    assert "\nArchitecture tiny (2 of 3 rows); " in text
    short = text.partition("<details>")[0]
    assert {line.split(" | ")[1] for line in short.splitlines() if "× 1" in line} == {"standard", "guard", "late, wide"}


def test_train_jobs_that_differ_in_more_than_the_seed_are_told_apart(store: Store) -> None:
    for lr in (0.1, 0.2):
        evaluated(store, trained(store, train={"lr": lr}), "steep", [1, 0])
    assert [row.method for row in all_rows(store)] == ["guard [lr=0.1]", "guard [lr=0.2]"]


def test_a_young_setting_that_a_job_leaves_out_reads_as_its_default(store: Store) -> None:
    for train in ({}, {"average": "ema"}):
        evaluated(store, trained(store, train=train), "steep", [1, 0])
    assert [row.method for row in all_rows(store)] == ["guard [average=ema]", "guard [average=none]"]


def paired(
    store: Store, keys_a: list[str] | tuple[str, ...], keys_b: list[str] | tuple[str, ...], eps: float = 0.0
) -> Difference:
    a, b = minima(store, [keys_a, keys_b], eps)
    found = difference({0: a.robust}, {0: b.robust})
    assert found is not None
    return found


def test_paired_difference_on_shared_images(store: Store) -> None:
    a, b = trained(store, "a"), trained(store, "b")
    keys_a = [evaluated(store, a, "clean", [1, 1, 1, 1, 0, 1]), evaluated(store, a, "steep", [1, 1, 1, 0])]
    keys_b = [evaluated(store, b, "steep", [1, 0, 0, 0, 1, 1])]
    found = paired(store, keys_a, keys_b)
    assert found.n == 4
    assert found.difference == pytest.approx(0.5)
    expected = paired_difference([True, True, True, False], [True, False, False, False])
    assert found[:3] == pytest.approx(expected)
    row_a, row_b = all_rows(store)
    assert paired(store, row_a.provenance.keys[0], row_b.provenance.keys[0]) == found
    other = evaluated(store, b, "onestep", [1, 1, 1, 1], test_hash="other")
    with pytest.raises(ValueError, match="saw test images"):
        paired(store, keys_a, [other])


def test_matrix_has_a_line_for_each_defense_and_eps(store: Store) -> None:
    keys = []
    for name in ("standard", "guard"):
        train = trained(store, name, eps=None, seconds=5.0)
        keys += [train.key, evaluated(store, train, "clean", [1] * 80 + [0] * 20)]
        for eps in ("0.1", "0.2"):
            keys.append(evaluated(store, train, "steep", [1] * 50 + [0] * 50, STEPS, eps=eps))
    header, lines, notes, best = matrix(store, keys)
    assert header == ["defense", "eps", "clean", "worst case", "verdict", "steep (steps=40)", "train s", "× standard"]
    low, high = wilson(80, 100)
    clean = f"80.0 ±{50 * (high - low):.1f}"
    assert clean == "80.0 ±7.8"
    assert [line[:3] for line in lines] == [
        ["standard", "Linf 0.1", clean], ["standard", "Linf 0.2", clean],
        ["guard", "Linf 0.1", clean], ["guard", "Linf 0.2", clean],
    ]  # fmt: skip
    assert all(line[-2:] == ["5.0", "1.00"] and line[3].endswith("†") for line in lines)
    assert best == {(line, k) for line in range(4) for k in (2, 3, 5)}  # all tie
    assert notes[0] == "percent ± half a 95 % interval; images: 100 each"
    assert notes[1] == "† worst case over 100 images, ranking needs 1000 (all)"


def test_the_best_value_under_each_budget_is_marked_and_an_unsound_row_has_none(store: Store) -> None:
    for name, correct in (("standard", 40), ("guard", 60), ("mask", 80)):
        train = trained(store, name)
        evaluated(store, train, "clean", [1] * 90 + [0] * 10)
        evaluated(store, train, "steep", [1] * correct + [0] * (100 - correct), STEPS)
    rows = {row.defense: row for row in all_rows(store)}
    found = [rows["standard"], rows["guard"], replace(rows["mask"], verdict="UNSOUND")]
    assert list(_best(found, lambda row: row.accuracy.worst)) == [1]
    assert list(_best(found, lambda row: row.accuracy.clean)) == [0, 1]  # a tie
    assert list(_best(found[1:], lambda row: row.accuracy.worst)) == []  # no other row to compare with


def test_the_table_of_a_model_trained_elsewhere_has_no_column_of_training(store: Store) -> None:
    keys = [evaluated(store, trained(store, seconds=0.0), "steep", [1, 0])]
    assert matrix(store, keys).header == ["defense", "clean", "worst case", "verdict", "steep"]


def test_matrix_shows_certified_accuracy_and_seeds(store: Store) -> None:
    keys = []
    for seed in range(2):
        train = trained(store, seed=seed, deploys="smoothed")
        keys.append(evaluated(store, train, "certify", [1, 1, 0, 0], columns={"radius": np.array([0.3, 0.6, 1, 1])}))
        keys.append(evaluated(store, train, "steep", [1, 1, 1, 0], state="done" if seed else "missing", n=4))
    header, ((_, _, worst, *_, quarter, half, acr, _, _),), notes, best = matrix(store, keys)
    assert best == frozenset()  # nothing to compare with
    assert header[-5:-2] == ["certified 0.25", "certified 0.5", "ACR"]
    assert acr == "0.225"  # (0.3 + 0.6 + 0 + 0) / 4: a wrong image's radius is worth nothing
    assert any(note.startswith("ACR: average certified L2 radius in pixel units") for note in notes)
    assert quarter.startswith("50.0 ±")
    assert half.startswith("25.0 ±")
    assert worst.endswith(" (1/2)†")
    assert any(note.startswith("(k/s): ") for note in notes)


def test_matrix_keeps_to_the_keys_asked_for(store: Store) -> None:
    evaluated(store, trained(store, "other"), "steep", [1, 0])
    key = evaluated(store, trained(store), "steep", [1, 0])
    assert [line[0] for line in matrix(store, [key])[1]] == ["guard"]
    assert matrix(store, [])[1] == []


def test_frame_has_the_documented_columns_also_when_empty(store: Store) -> None:
    assert list(frame(store).columns) == list(COLUMNS)
    assert len(frame(store)) == 0
    train = trained(store)
    evaluated(store, train, "clean", [1, 1, 1, 0])
    entry = frame(store).iloc[0]
    assert all(name in (frame.__doc__ or "") for name in COLUMNS)
    assert entry["eps"] is None
    assert math.isnan(entry["eps_value"])
    assert entry["train_eps"] == "0.1"
    assert (entry["low"], entry["high"]) == pytest.approx(wilson(3, 4))
    assert (entry["peak_memory_mb"], entry["inference_ms"], entry["attack_seconds"]) == (300.0, 0.5, 2.0)


def test_labels_of_plugins_that_are_gone_show_all_settings() -> None:
    assert label("attacks", "no_such_attack", {"steps": 40, "loss": "cw"}) == "no_such_attack (loss=cw, steps=40)"


def test_markdown_is_byte_identical_and_keeps_the_rest_of_the_file(store: Store, tmp_path: Path) -> None:
    full(store, trained(store), 300)
    path = tmp_path / "docs" / "leaderboard.md"
    first = write_leaderboard(store, path, tmp_path / "tables")
    names = ["leaderboard.md", *(f"{name}.csv" for name in ("evaluations", "leaderboard", "cells", "checks"))]
    assert [p.name for p in first] == [
        *names, "timing.csv", "timing_attacks.csv", "leaderboard.tex", "methods.bib", "leaderboard.json",
    ]  # fmt: skip
    before = [p.read_bytes() for p in first]
    assert [p.read_bytes() for p in write_leaderboard(store, path, tmp_path / "tables")] == before
    path.write_bytes(b"# mine\r\n" + path.read_bytes() + b"after\n")
    write_leaderboard(store, path)
    assert path.read_bytes() == b"# mine\r\n" + before[0] + b"after\n"


def test_markers_are_added_once_and_a_broken_pair_is_refused(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "leaderboard.md"
    path.write_text("mine")
    write_leaderboard(store, path)
    text = path.read_text()
    assert text.startswith(f"mine\n{BEGIN}\n")
    assert text.endswith(f"{END}\n")
    assert "No evaluations yet." in text
    for broken in (f"{BEGIN}\n", f"{END}\n{BEGIN}\n", f"{BEGIN}{END}{BEGIN}{END}"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="must hold one"):
            write_leaderboard(store, path)
        assert path.read_text() == broken


HOSTILE = "a|b`c`[x](http://e)<script>*_~~\\|\r\n| 99 | &amp;" + END


def test_hostile_names_stay_inside_their_cell(store: Store, tmp_path: Path) -> None:
    evaluated(store, trained(store, HOSTILE, data={"name": "=cmd|' /C calc'!A0"}), "steep", [1, 0])
    plain = escape(HOSTILE)
    assert plain.startswith("a\\|b\\`c\\`\\[x\\](http&#58;//e)&lt;script&gt;\\*\\_\\~\\~\\\\\\|")
    assert "&amp;amp;" in plain
    path = tmp_path / "leaderboard.md"
    write_leaderboard(store, path)
    text = path.read_text()
    assert text.count(END) == 1
    assert "<script>" not in text
    for part in text.split("<details>"):
        header, _, line = [line for line in part.splitlines() if line.startswith("| ")]
        unescaped = [re.findall(r"(?<!\\)(?:\\\\)*\|", text) for text in (header, line)]
        assert len(unescaped[0]) == len(unescaped[1])
    write_leaderboard(store, path)
    assert path.read_text() == text


def test_csv_cells_start_no_formula(store: Store, tmp_path: Path) -> None:
    for name in ("=1+1", "+cmd", "-cmd", "@sum"):
        evaluated(store, trained(store, name, data={"name": f"{name}"}), name, [1, 0])
    written = [path for path in write_leaderboard(store, tmp_path / "l.md", tmp_path) if path.suffix == ".csv"]
    assert len(written) == 6
    for path in written:
        with path.open(newline="") as file:
            cells = [cell for line in csv.reader(file) for cell in line]
        assert not [cell for cell in cells if cell[:1] in ("=", "+", "-", "@")]
        assert "'=1+1" in cells
        assert "'@sum" in cells


def test_csv_holds_numbers_and_states(store: Store, tmp_path: Path) -> None:
    train = trained(store)
    evaluated(store, train, "steep", [1, 0, 0, 0])
    evaluated(store, trained(store, seed=1), "steep", state="error", n=4)
    evaluated(store, trained(store, seed=2, state="missing"), "steep", state="missing", n=4)
    _, evaluations, board, *_ = write_leaderboard(store, tmp_path / "l.md", tmp_path)
    with evaluations.open(newline="") as file:
        done, failed, missing = sorted(csv.DictReader(file), key=lambda line: line["state"])
    assert (done["accuracy"], done["eps"], done["seed"], done["n"]) == ("0.25", "0.1", "0", "4")
    assert (failed["accuracy"], failed["reason"]) == ("", "RuntimeError: out of memory")
    assert (missing["state"], missing["dirty"], missing["train_seconds"]) == ("missing", "", "")
    with board.open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["worst_case"], line["attack steep"], line["seed_values"]) == ("0.25", "0.25", "0:0.25")
    assert (line["seeds_done"], line["seeds_planned"], line["clean"]) == ("1", "2", "not run")


def test_what_was_judged_on_validation_images_is_in_the_frame_but_never_ranked(store: Store, tmp_path: Path) -> None:
    job = trained(store)
    evaluated(store, job, "clean", [1] * 90 + [0] * 10)
    evaluated(store, job, "clean", [1] * 100, split="validation")
    table = frame(store)
    assert dict(zip(table["split"], table["accuracy"], strict=True)) == {"test": 0.9, "validation": 1.0}
    assert table["config"].nunique() == 2  # so that the two are never one row
    written = markdown(store)
    assert "90.0" in written
    assert "100.0" not in written
    write_leaderboard(store, tmp_path / "board.md", tmp_path)
    assert "validation" not in (tmp_path / "leaderboard.csv").read_text()
    told = {split: " ".join(matrix(store, list(part["key"]))[2]) for split, part in table.groupby("split")}
    assert "evaluated on validation images" in told["validation"]
    assert "validation" not in told["test"]


def test_the_caption_says_which_epoch_the_weights_are_of(store: Store, tmp_path: Path) -> None:
    evaluated(
        store, trained(store, data={"validation": 100}, metrics={"best_epoch": 1}), "clean", [1] * 9, weights="best"
    )
    path = tmp_path / "leaderboard.md"
    write_leaderboard(store, path, tmp_path)
    assert "; weights of the epoch best on validation images; clean on 9 images." in path.read_text()


def test_the_caption_of_one_image_is_in_the_singular(store: Store) -> None:
    evaluated(store, trained(store), "clean", [1])
    assert "; clean on 1 image." in markdown(store)


def test_methods_that_an_attack_does_not_apply_to_share_a_line(store: Store) -> None:
    for name in ("guard", "other_guard"):
        train = trained(store, name)
        evaluated(store, train, "clean", [1, 0])
        evaluated(store, train, "steep", state="unsupported", n=2)
    _, _, notes, _ = matrix(store, list(frame(store)["key"]))
    (line,) = (note for note in notes if "unsupported" in note)
    assert line.startswith("guard, other_guard, seed 0, steep: unsupported: ")


def test_golden_leaderboard(store: Store, tmp_path: Path) -> None:
    golden_store(store)
    path = tmp_path / "leaderboard.md"
    write_leaderboard(store, path)
    # the paper of `standard` is its own file's business
    text = path.read_text().replace(f"| tiny | {escape(paper('standard') or '–')} |", "| tiny | VENUE |")
    text = text.replace("| tiny | unknown |", "| tiny | VENUE |")
    if os.environ.get("BENCH_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_importing_the_tables_needs_no_pandas() -> None:
    code = "import sys, bench.tables.summary, bench.tables.leaderboard\n"
    code += "assert not {'pandas', 'numpy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_minimal_norm_attack_shows_its_median_distance(store: Store) -> None:
    nan, inf = float("nan"), float("inf")
    for seed, distance in ((0, [0.05, 0.2, 0.4, inf, nan]), (1, [0.05, 0.2, 0.6, inf, 0.01])):
        train = trained(store, seed=seed)
        evaluated(store, train, "clean", [1, 1, 1, 1, 0])
        evaluated(store, train, "pgd", [0, 1, 1, 1, 0], STEPS)
        columns = {"distance": np.array(distance, np.float32), "clean": np.array([1, 1, 1, 1, 0], bool)}
        evaluated(store, train, "torchattacks", [0, 1, 1, 1, 0], {"method": "FAB"}, columns=columns)
    table = frame(store)
    by = table.set_index(["attack", "seed"])["median_distance"]
    assert by[("torchattacks", 0)] == pytest.approx(0.3)
    assert by[("torchattacks", 1)] == pytest.approx(0.4)
    assert by[["pgd", "clean"]].isna().all()
    header, (line,), notes, _ = matrix(store, list(table["key"]))
    shown = dict(zip(header, line, strict=True))
    (name,) = [name for name in header if name.startswith("torchattacks")]
    assert "(median 0.35)" in shown[name]
    assert "median" not in "".join(cell for other, cell in shown.items() if other != name)
    assert any(note.startswith("median: distance") for note in notes)
    text = markdown(store)
    assert "60.00 (median 0.35, std 0.00)" in text
    assert "Median: distance in the norm of eps" in text


def test_nothing_found_is_infinitely_far(store: Store) -> None:
    train = trained(store)
    columns = {"distance": np.array([np.inf, np.inf, 0.1], np.float32), "clean": np.ones(3, bool)}
    evaluated(store, train, "torchattacks", [1, 1, 0], {"method": "CW"}, columns=columns)
    assert frame(store)["median_distance"].tolist() == [np.inf]
    assert "(median inf" in markdown(store)


def test_a_worst_case_over_few_images_says_what_more_images_leave(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [1] * 190 + [0] * 10)
    evaluated(store, train, "steep", [1] * 120 + [0] * 80)
    evaluated(store, train, "autoattack", [1] * 90 + [0] * 10, STANDARD)
    other = trained(store, "other")
    evaluated(store, other, "steep", [1] * 190 + [0] * 10)
    evaluated(store, other, "autoattack", [1] * 90 + [0] * 10, STANDARD)
    note = (  # of the row whose first images were easy, and not of the other
        "attacks saw different numbers of images, and the worst case is over those that all attacks of a row share; "
        "one attack on more images leaves less: guard 90.00 on 100, 60.00 by steep alone on 200"
    )
    written = markdown(store)
    assert f"\n- {note}\n" in written
    assert "| 90.00 |" in written
    assert note in matrix(store, store.keys())[2]


def test_rows_whose_attacks_saw_the_same_images_need_no_note(store: Store) -> None:
    train = trained(store)
    evaluated(store, train, "clean", [1] * 95 + [0] * 5)
    evaluated(store, train, "autoattack", [1] * 90 + [0] * 10, STANDARD)
    assert "different numbers" not in markdown(store) + str(matrix(store, store.keys())[2])


def test_a_worst_case_above_one_attack_is_explained(store: Store) -> None:
    """On the first image the draws that choose find `steep` stronger, those that judge find `flat` stronger."""
    train = trained(store, deploys="randomised")
    evaluated(store, train, "flat", [0, 1, 0], columns=draws([0.7, 0.9, 0.2], [0.4, 0.9, 0.2]))
    evaluated(store, train, "steep", [1, 1, 1], columns=draws([0.6, 0.9, 0.9], [0.6, 0.9, 0.9]))
    note = (
        "the worst case chooses each image's attack by some noise draws and judges it by others, so that no luck counts"
    )
    note += "; one attack alone may leave less: guard 66.67, 33.33 by flat alone"
    assert f"\n- {note}\n" in markdown(store)
    assert note in matrix(store, store.keys())[2]


def test_a_worst_case_below_all_attacks_needs_no_note(store: Store) -> None:
    train = trained(store, deploys="randomised")
    evaluated(store, train, "flat", [0, 1], columns=draws([0.3, 0.9], [0.2, 0.9]))
    evaluated(store, train, "steep", [1, 1], columns=draws([0.6, 0.9], [0.6, 0.9]))
    assert "noise draws" not in markdown(store) + str(matrix(store, store.keys())[2])


def test_a_note_names_the_rows_whose_first_images_were_easiest(store: Store) -> None:
    for name, hits in (("guard", 150), ("other", 120), ("third", 100), ("fourth", 170)):
        train = trained(store, name)
        evaluated(store, train, "steep", [1] * hits + [0] * (200 - hits))
        evaluated(store, train, "autoattack", [1] * 100, STANDARD)
    (note,) = different_n(all_rows(store))
    told = matrix(store, store.keys())[2][0]
    assert told == "Linf 0.1: percent ± half a 95 % interval; images: steep 200, autoattack 100, worst case 100"
    named = note.partition("leaves less: ")[2].split("; ")
    assert [words.split()[0] for words in named] == ["third", "other", "guard", "and"]
    assert named[-1] == "and 1 more row"


def test_what_more_images_leave_is_asked_of_the_same_seeds(store: Store) -> None:
    for seed, hits in ((0, 180), (1, 20)):
        train = trained(store, seed=seed)
        evaluated(store, train, "steep", [1] * hits + [0] * (200 - hits))
        if seed == 0:
            evaluated(store, train, "autoattack", [1] * 80 + [0] * 20, STANDARD)
    assert list(only(store).accuracy.worst.values) == [0]
    assert "leaves less" not in markdown(store)
