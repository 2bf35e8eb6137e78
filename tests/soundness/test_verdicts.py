"""Verdicts from crafted records: each check that could make a row unsound or invalid has one that only it reports."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import (
    ATTACKS,
    CW,
    FLOOR,
    STANDARD,
    Images,
    N,
    attacked,
    audited,
    evaluated,
    finding,
    imported,
    right,
    sound,
    trained,
)
from harness import Bench

from bench.planning import catalog
from bench.planning.labels import label
from bench.records.store import IMAGES, Store
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import Check, Finding
from bench.soundness.evidence import Column, on_shared, worst_of
from bench.soundness.verdicts import judged_rows
from bench.tables.leaderboard import markdown, write_leaderboard
from bench.tables.ranking import flags, not_made, open_checks, unreliable, verdict_text
from bench.tables.summary import matrix


def all_rows(store: Store) -> list[Row]:
    return judged_rows(store, split=None)


def only(store: Store) -> Row:
    (row,) = all_rows(store)
    return row


def codes(row: Row, levels: str) -> set[str]:
    return {finding.code for finding in row.findings if finding.level in tuple(levels)}


def test_a_sound_row_is_ok_and_every_check_has_an_answer(store: Store) -> None:
    for seed in range(3):
        sound(store, seed=seed)
    row = only(store)
    assert row.verdict == "OK"
    assert codes(row, "FUX") == set()
    assert {f.code for f in row.findings} == set(CHECKS) - {"C20"}
    assert codes(row, "I") == set()
    assert "| 1 | pgd\\_at |" in markdown(store)
    assert "| OK | none |" in markdown(store)


def weak_pgd(store: Store) -> None:
    """Every iterative attack leaves more images than one step does."""
    sound(store, attacks={"fgsm": ("fgsm", {}, right(0.48))})


def rising(store: Store) -> None:
    """The same attacks break fewer images at twice the budget."""
    train, _ = sound(store)
    pgd = {"pgd": ("pgd", FLOOR, right(0.53)), "cw": ("pgd", {**FLOOR, **CW}, right(0.53))}
    keys = attacked(store, train, {**pgd, "autoattack": ("autoattack", STANDARD, right(0.52))}, eps="0.2")
    audited(store, train, evaluations=keys)


def noise_wins(store: Store) -> None:
    """Uniform draws break more images than all attacks of the row; the audit's own attack is stronger."""
    columns = {"noise@0.1": right(0.48), "pgd-ce@0.1": right(0.44)}
    sound(store, Finding("C12", "ok", 0.0, 0.01, eps="0.1"), columns=columns)


def search_wins(store: Store, share: float = 0.04) -> None:
    """Square, the last stage of AutoAttack, breaks `share` of all images, which no gradient attack does."""
    stage = np.array([-1] * 500 + [1] * 500)
    stage[500 - round(share * N) : 500] = 4
    suite = ("autoattack", STANDARD, (stage == -1).astype(int).tolist(), stage)
    sound(store, attacks={"autoattack": suite})


def image_outside(store: Store) -> None:
    """One stored image lies outside the ball."""
    train, keys = sound(store)
    audited(store, train, Finding("C16", "X", 0.2, 1e-6, "norm 0.3", attack=keys[0]), evaluations=keys[:1])


def certificate_too_high(store: Store) -> None:
    """90 % certified at a radius at which an attack leaves 60 % of the same images."""
    train = trained(store, "pgd_at", threat={"norm": "L2", "eps": "0.5"})
    evaluated(store, train, "clean", right(0.9))
    evaluated(store, train, "certify", right(0.9, 200), columns={"radius": np.full(200, 0.5)})
    keys = attacked(
        store, train, {kind: (*given[:2], right(0.12)) for kind, given in ATTACKS.items()}, norm="L2", eps="0.5"
    )
    audited(store, train, threat=("L2", "0.5"))
    audited(store, train, evaluations=keys)


def chosen_blindly(store: Store) -> None:
    """The weights of the best epoch, and no hash of the images that chose it."""
    sound(store, weights="best", data={"validation": 100}, metrics={"best_epoch": 1})


def noise_without_average(store: Store) -> None:
    """Noise at test time, and only attacks that see one draw of it."""
    sound(store, name="pni", deploys="randomised", attacks={"autoattack": None})


SEVERE_RECORDS: dict[str, tuple[str, Callable[[Store], None]]] = {
    "C1": ("UNSOUND", noise_without_average),
    "C7": ("UNSOUND", weak_pgd),
    "C8": ("UNSOUND", rising),
    "C12": ("UNSOUND", noise_wins),
    "C13": ("UNSOUND", search_wins),
    "C16": ("INVALID", image_outside),
    "C25": ("INVALID", certificate_too_high),
    "C27": ("UNSOUND", chosen_blindly),
}


def severe(row: Row) -> tuple[set[str], str]:
    return codes(row, "UX"), row.verdict


@pytest.mark.parametrize("code", SEVERE_RECORDS)
def test_a_severe_record_is_reported_by_its_check_only(store: Store, code: str) -> None:
    expected, write = SEVERE_RECORDS[code]
    write(store)
    row = max(all_rows(store), key=lambda row: row.eps_value)
    assert severe(row) == ({code}, expected)


def test_every_check_of_records_that_can_be_severe_has_such_a_record() -> None:
    severe_codes = {check.code for check in CHECKS.values() if check.source != "harness" and check.worst in ("U", "X")}
    assert {c.code for c in CHECKS.values() if c.source in ("records", "images")} & severe_codes <= set(SEVERE_RECORDS)


@pytest.mark.parametrize(
    "check", [c for c in CHECKS.values() if c.source == "model" and c.worst in ("U", "X")], ids=lambda c: c.code
)
def test_a_severe_finding_of_an_audit_reaches_the_row(store: Store, check: Check) -> None:
    blind = {"autoattack": None, "fgsm": None}  # with these the records would have a say in C4 and C7
    sound(store, Finding(check.code, check.worst, 0.5, 0.1, "planted"), attacks=blind)
    row = only(store)
    assert severe(row) == ({check.code}, "INVALID" if check.worst == "X" else "UNSOUND")


def pgd(share: float, **settings: Any) -> dict[str, Any]:
    return {"pgd": ("pgd", {**FLOOR, **settings}, right(share))}


def one_step(share: float) -> dict[str, Any]:
    return {"fgsm": ("fgsm", {}, right(share))}


WEAK = {kind: (*given[:2], right(0.3)) for kind, given in ATTACKS.items()}
SQUARE = {"autoattack": None, "square": ("square", {}, right(0.45))}  # PGD on the margin leaves 51.5 %
LEVELS: dict[str, tuple[str, tuple[Finding, ...], dict[str, Any], str, float | None]] = {
    "Square alone is a search": ("C13", (), {"attacks": SQUARE}, "U", 0.065),
    "FGSM of the audit": ("C7", (), {"attacks": {"fgsm": None}, "columns": {"fgsm@0.1": right(0.4)}}, "U", 0.1),
    "C7 of the audit only": ("C7", (Finding("C7", "U", 0.1, 0.01, eps="0.1"),), {}, "F", 0.1),
    "noise 1 pp below": ("C12", (), {"columns": {"noise@0.1": right(0.49)}}, "ok", None),
    "noise 1.1 pp below": ("C12", (), {"columns": {"noise@0.1": right(0.489)}}, "ok", None),
    "noise 2.1 pp below": ("C12", (), {"columns": {"noise@0.1": right(0.479)}}, "U", 0.021),
    "C12 of the audit only": (
        "C12", (Finding("C12", "U", 0.1, 0.01, eps="0.1"),), {"columns": {"noise@0.1": right(0.6)}}, "F", -0.1,
    ),
    "zero gradients and a search": ("C4", (Finding("C4", "U", 0.5, 0.1, eps="0.1"),), {}, "F", 0.5),
    "zero gradients": ("C4", (Finding("C4", "U", 0.5, 0.1, eps="0.1"),), {"attacks": {"autoattack": None}}, "U", 0.5),
    "losses differ by 5 pp": ("C15", (), {"attacks": pgd(0.565, loss="ce")}, "ok", 0.05),
    "losses differ by 5.1 pp": ("C15", (), {"attacks": pgd(0.566, loss="ce")}, "ok", 0.051),
    "losses differ by 7 pp": ("C15", (), {"attacks": pgd(0.585, loss="ce")}, "F", 0.07),
    "the margin is weaker": ("C15", (), {"attacks": {"cw": ("pgd", {**FLOOR, **CW}, right(0.6))}}, "F", 0.08),
    "one step 20 pp above": ("C26", (), {"name": "fast_at", "clean": 0.88, "attacks": one_step(0.7)}, "ok", 0.2),
    "one step 21 pp above": ("C26", (), {"name": "fast_at", "clean": 0.88, "attacks": one_step(0.71)}, "ok", 0.21),
    "one step 24 pp above": ("C26", (), {"name": "fast_at", "clean": 0.88, "attacks": one_step(0.74)}, "F", 0.24),
    "one step as clean": ("C26", (), {"name": "fast_at", "clean": 0.88, "attacks": one_step(0.88)}, "F", 0.38),
    "weak under both": ("C26", (), {"name": "fast_at", "attacks": {**WEAK, **one_step(0.7)}}, "ok", 0.4),
}  # fmt: skip


@pytest.mark.parametrize("case", LEVELS)
def test_outcomes_of_a_row_give_the_level(store: Store, case: str) -> None:
    code, audit, given, level, value = LEVELS[case]
    sound(store, *audit, **given)
    found = finding(only(store), code)
    assert found.level == level
    assert value is None or found.value == pytest.approx(value)
    assert level != "F" or only(store).verdict == "FLAG"


@pytest.mark.parametrize(("broken", "level"), [(3, "ok"), (10, "F"), (21, "F"), (40, "U")], ids=str)
def test_square_may_add_few_images_of_a_thousand(store: Store, broken: int, level: str) -> None:
    search_wins(store, broken / N)
    found = finding(only(store), "C13")
    assert (found.level, found.value) == (level, pytest.approx(broken / N))


def test_a_suite_that_continues_after_square_does_not_separate_gradient_attacks(store: Store) -> None:
    stage = np.array([-1] * 400 + [4] * 100 + [1] * 500)
    sound(store, attacks={"autoattack": ("autoattack", {"version": "plus"}, (stage == -1).tolist(), stage)})
    assert finding(only(store), "C13").level == "not checked"


@pytest.mark.parametrize(("more", "level"), [(10, "ok"), (11, "ok"), (21, "U")])
def test_iterative_attacks_may_leave_one_point_more_than_one_step(store: Store, more: int, level: str) -> None:
    sound(store, attacks={"fgsm": ("fgsm", {}, right((500 - more) / N))})
    row = only(store)
    assert finding(row, "C7").level == level
    # each PGD is behind by more, which alone is noise: flagged, with its name
    flagged = [f for f in row.findings if f.code == "C7" and f.attack]
    assert {f.level for f in flagged} == {"F"}
    assert len(flagged) == 2


def test_one_weak_pgd_is_flagged_and_the_set_is_sound(store: Store) -> None:
    sound(store, attacks={"pgd": ("pgd", FLOOR, right(0.7))})
    row = only(store)
    assert finding(row, "C7").level == "ok"
    (weak,) = [f for f in row.findings if f.code == "C7" and f.attack]
    assert weak.attack == label("attacks", "pgd", FLOOR)
    assert row.verdict == "FLAG"


def test_an_audit_of_an_imported_model_from_before_c30_is_none_on_other_images(store: Store) -> None:
    model = imported(store)
    evaluated(store, model, "clean", right(0.9))
    audited(store, model, evaluations=attacked(store, model))
    audited(store, model, level="full", absent=("C30",))
    row = only(store)
    assert row.verdict == "NOT CHECKED"
    assert {f.code for f in row.findings if f.level == "not checked"} == {"C14", "C27", "C28", "C30"}
    assert "the same `bench eval` again" in finding(row, "C30").note
    audited(store, model, engine=2)  # the newer one counts, though the older one is a full one
    assert (only(store).verdict, finding(only(store), "C30").level) == ("OK", "ok")
    elsewhere = Finding("C30", "U", 0.3, 0.1, "training images", eps="0.2"), Finding("C30", "ok", eps="0.1")
    audited(store, model, *elsewhere, engine=3, threat=("Linf", "0.1", "0.2"))
    assert finding(only(store), "C30").level == "ok"
    audited(store, model, Finding("C30", "U", 0.3, 0.1, "training images", eps="0.1"), engine=4)
    assert severe(only(store)) == ({"C30"}, "UNSOUND")


def test_c30_does_not_concern_what_bench_trained_whatever_the_audit(store: Store) -> None:
    train = trained(store, "pgd_at")
    evaluated(store, train, "clean", right(0.9))
    audited(store, train, evaluations=attacked(store, train))
    audited(store, train, absent=("C30",))
    row = only(store)
    assert (row.verdict, finding(row, "C30").level) == ("OK", "n/a")
    assert "without test images" in finding(row, "C30").note


def test_columns_of_an_audit_of_other_images_are_not_compared(store: Store) -> None:
    train = trained(store, "pgd_at")
    labels = np.arange(N) % 10
    evaluated(store, train, "autoattack", right(0.5), STANDARD, columns={"label": labels})
    audited(store, train, columns={"noise@0.1": right(0.2), "label": labels + 1})
    assert finding(only(store), "C12").level == "ok"  # as the audit says of itself


def test_a_finding_at_another_budget_does_not_apply_to_the_row(store: Store) -> None:
    sound(store, Finding("C12", "U", 0.1, 0.01, eps="0.2"))
    row = only(store)
    assert finding(row, "C12").level == "not checked"
    assert row.verdict == "NOT CHECKED"


@pytest.mark.parametrize("code", ["C9", "C19"])
def test_what_an_audit_measures_at_one_budget_holds_for_the_model_at_all(store: Store, code: str) -> None:
    sound(store, Finding(code, "U", 0.3, 0.1, eps="1"))
    assert severe(only(store)) == ({code}, "UNSOUND")


def test_a_row_without_a_budget_needs_no_attack_of_an_audit(store: Store) -> None:
    train = trained(store, "smoothing", eps=None, deploys="smoothed")
    evaluated(store, train, "certify", right(0.9, 20), columns={"radius": np.full(20, 0.5)})
    assert only(store).verdict == "NOT CHECKED"
    audited(store, train, Finding("C9", "not checked"), Finding("C12", "n/a"), threat=("Linf",))
    assert only(store).verdict == "OK"
    audited(store, train, Finding("C3", "not checked"), threat=("Linf",), level="full")
    assert only(store).verdict == "NOT CHECKED"


def test_one_attack_whose_accuracy_rises_with_the_budget_is_flagged(store: Store) -> None:
    train, _ = sound(store)
    attacked(store, train, {"pgd": ("pgd", FLOOR, right(0.54))}, eps="0.2")
    row = max(all_rows(store), key=lambda row: row.eps_value)
    (rise,) = [f for f in row.findings if f.code == "C8" and f.attack]
    assert (rise.level, rise.value) == ("F", pytest.approx(0.02))
    assert finding(row, "C8").level == "ok"


def test_budgets_with_other_attacks_are_not_compared_as_a_whole(store: Store) -> None:
    train, _ = sound(store)
    attacked(store, train, {"autoattack": None}, eps="0.2")
    row = max(all_rows(store), key=lambda row: row.eps_value)
    assert codes(row, "FU") - {"C16"} == set()


def test_another_model_at_a_smaller_budget_is_no_comparison(store: Store) -> None:
    sound(store)
    train, _ = sound(store, name="trades", attacks=dict.fromkeys(ATTACKS))
    better = {kind: (*given[:2], right(0.7)) for kind, given in ATTACKS.items()}
    audited(store, train, evaluations=attacked(store, train, better, eps="0.2"))
    row = max(all_rows(store), key=lambda row: row.eps_value)
    assert (row.method, row.verdict, finding(row, "C8").level) == ("trades", "OK", "ok")  # of the audit


@pytest.mark.parametrize(("share", "level"), [(0.495, "ok"), (0.494, "ok"), (0.486, "F")])
def test_transferred_images_may_add_half_a_point(
    store: Store, fresh_catalog: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, share: float, level: str
) -> None:
    """An attack on images made on other models says so in its file; here one in the style of `transfer`."""
    lines = [
        "from dataclasses import dataclass",
        "@dataclass",
        "class Moved(Attack):",
        "    needs_images: ClassVar[bool] = True",
    ]
    (tmp_path / "moved.py").write_text("\n".join(lines))
    monkeypatch.setenv("BENCH_PLUGINS", str(tmp_path / "moved.py"))
    sound(store, attacks={"moved": ("moved", {}, right(share))})
    found = finding(only(store), "C14")
    assert (found.level, found.value) == (level, pytest.approx(0.5 - share))


def test_equal_settings_of_the_audit_replace_unequal_ones_of_the_row(store: Store) -> None:
    unequal = {"pgd": ("pgd", {"steps": 20}, right(0.6))}
    sound(store, attacks=unequal)
    assert (finding(only(store), "C15").level, "not at equal" in finding(only(store), "C15").note) == ("F", True)
    equal = {"pgd-ce@0.1": right(0.53), "pgd-cw@0.1": right(0.52)}
    sound(store, name="trades", attacks=unequal, columns=equal)
    (other,) = [row for row in all_rows(store) if row.defense == "trades"]
    assert finding(other, "C15").value == pytest.approx(0.01)


def test_few_images_and_seeds_are_information(store: Store) -> None:
    train = trained(store, "pgd_at")
    evaluated(store, train, "autoattack", right(0.5, 100), STANDARD)
    row = only(store)
    assert (finding(row, "C22").level, finding(row, "C22").note) == ("I", "quick: 100 images")
    assert (finding(row, "C23").level, finding(row, "C23").note) == ("I", "1 seed")
    assert codes(row, "F") == set()


@pytest.mark.parametrize(
    ("settings", "backwards", "level"),
    [({"steps": 49, "restarts": 5}, None, "F"), (FLOOR, None, "ok"), ({}, 249.0, "F"), ({}, 250.0, "ok")],
)
def test_pgd_50_with_5_restarts_is_the_weakest_attack_allowed(
    store: Store, settings: Any, backwards: Any, level: str
) -> None:
    train = trained(store, "pgd_at")
    metrics = {"backwards_per_image": backwards} if backwards else {}
    evaluated(store, train, "pgd", right(0.5), settings, metrics=metrics)
    assert finding(only(store), "C24").level == level


def test_a_row_below_the_floor_is_provisional(store: Store) -> None:
    sound(store, attacks={"pgd": ("pgd", {"steps": 10}, right(0.52)), "autoattack": None, "cw": None})
    assert "too little attack (C24)" in only(store).provisional
    sound(store, name="trades")
    assert [row.provisional for row in all_rows(store) if row.defense == "trades"] == [()]


def test_autoattack_against_noise_is_its_suite_rand_whatever_was_asked(store: Store) -> None:
    train = trained(store, "pni", deploys="randomised")
    hits = right(0.5)
    for name, settings in (("pgd", {"steps": 10}), ("autoattack", {**STANDARD, "eot": 20})):
        columns = draws(hits, hits) | ({"stage": np.array([-hit or 2 for hit in hits])} if name != "pgd" else {})
        evaluated(store, train, name, hits, settings, columns=columns, metrics={"backwards_per_image": 249})
    row = only(store)
    assert {code: finding(row, code).level for code in ("C1", "C13", "C24")} == {
        "C1": "I", "C13": "not checked", "C24": "F",
    }  # fmt: skip
    evaluated(store, train, "square", right(0.45), columns=draws(right(0.45), right(0.45)))
    assert finding(only(store), "C13").level == "U"


@pytest.mark.parametrize(("attack", "settings"), [("eot", {"draws": [1]}), ("autoattack", {**STANDARD, "eot": 1})])
def test_an_average_over_one_draw_is_no_average(store: Store, attack: str, settings: dict[str, Any]) -> None:
    train = trained(store, "pni", deploys="randomised")
    hits = right(0.5)
    for name, own in (("closed_form", {}), ("transfer", {}), ("eot", {"draws": [1, 4]})):
        state = "unsupported" if name == "closed_form" else "done"
        evaluated(store, train, name, hits, own, columns=draws(hits, hits), state=state)
    before = only(store)
    assert finding(before, "C1").level == "I"
    assert not any("lacks" in reason for reason in before.provisional)
    other = trained(store, "rse", deploys="randomised")
    evaluated(store, other, "transfer", hits, columns=draws(hits, hits))
    evaluated(store, other, attack, hits, settings, columns=draws(hits, hits))
    (row,) = [row for row in all_rows(store) if row.defense == "rse"]
    assert finding(row, "C1").level == "U"
    assert any("lacks eot, closed_form" in reason for reason in row.provisional)


def test_no_attack_was_too_weak_if_no_image_is_robust(store: Store) -> None:
    evaluated(store, trained(store, "standard", eps=None), "pgd", right(0.0))
    assert finding(only(store), "C24").level == "ok"


def test_standard_training_and_larger_budgets_are_no_overfitting_to_one_step(store: Store) -> None:
    strong_step = {"fgsm": ("fgsm", {}, right(0.88))}
    sound(store, name="standard", eps=None, attacks=strong_step)
    sound(store, name="fast_at", eps="0.05", attacks=strong_step)
    assert {finding(row, "C26").level for row in all_rows(store)} == {"n/a"}


def test_a_sudden_drop_in_training_is_flagged_for_the_last_weights(store: Store) -> None:
    metrics = {"sudden_drop_epoch": 2, "validation_hash": "other"}
    sound(store, name="fast_at", data={"validation": 100}, metrics=metrics)
    sound(store, name="fast_at", data={"validation": 100}, metrics=metrics, weights="best")
    found = {row.method: finding(row, "C26").level for row in all_rows(store)}
    assert found == {"fast_at": "F", "fast_at [best epoch by validation]": "ok"}


def test_weights_chosen_on_the_very_test_images_are_unsound(store: Store) -> None:
    metrics = {"validation_hash": f"hash{N}"}
    sound(store, weights="best", data={"validation": 100}, metrics=metrics)
    assert severe(only(store)) == ({"C27"}, "UNSOUND")


def test_the_most_severe_finding_and_seed_determine_the_verdict(store: Store) -> None:
    sound(store, seed=0)
    sound(store, Finding("C2", "F", note="sums to 1"), seed=1)
    assert (only(store).verdict, finding(only(store), "C2").note) == ("FLAG", "seed 1: sums to 1")
    sound(store, Finding("C19", "U", 0.5, 0.95), Finding("C2", "F"), seed=2)
    assert only(store).verdict == "UNSOUND"
    sound(store, Finding("C3", "X", 3.0, 0.0, "3 NaN"), seed=3)
    assert only(store).verdict == "INVALID"


def test_a_seed_outside_the_worst_case_need_not_be_audited_but_its_failures_count(store: Store) -> None:
    sound(store)
    other = trained(store, "pgd_at", 1)
    evaluated(store, other, "fgsm", right(0.6))
    row = only(store)
    assert set(row.provenance.keys) == {0}
    assert row.verdict == "OK"
    audited(store, other, Finding("C9", "U", 0.3, 0.01))
    assert only(store).verdict == "UNSOUND"


def without_audit(store: Store) -> None:
    attacked(store, trained(store, "pgd_at"))


def failed_audit(store: Store) -> None:
    train = trained(store, "pgd_at")
    audited(store, train, state="error")
    audited(store, train, evaluations=attacked(store, train))


def without_images(store: Store) -> None:
    train = trained(store, "pgd_at")
    attacked(store, train)
    audited(store, train)


def some_images(store: Store) -> None:
    train = trained(store, "pgd_at")
    keys = attacked(store, train)
    audited(store, train)
    audited(store, train, evaluations=keys[:-1])


def one_check_left_out(store: Store) -> None:
    sound(store, Finding("C19", "not checked", note="took too long"))


def audit_of_other_weights(store: Store) -> None:
    train = trained(store, "pgd_at")
    audited(store, train, weights="best")
    audited(store, train, evaluations=attacked(store, train))


@pytest.mark.parametrize(
    ("write", "code", "why"),
    [
        (without_audit, "C3", "no audit"),
        (failed_audit, "C3", "audit error: out of memory"),
        (without_images, "C16", "images not checked again: autoattack, fgsm, pgd"),
        (some_images, "C16", "images not checked again: autoattack"),
        (one_check_left_out, "C19", "took too long"),
        (audit_of_other_weights, "C3", "no audit"),
    ],
)
def test_what_was_not_measured_is_not_checked(store: Store, write: Any, code: str, why: str) -> None:
    write(store)
    row = only(store)
    assert row.verdict == "NOT CHECKED"
    assert finding(row, code).level == "not checked"
    assert why in finding(row, code).note
    assert re.search(rf"\| NOT CHECKED \| ({code} )?not checked \|", markdown(store))
    few = len(open_checks(row)) == 1
    assert verdict_text(row) == ("NOT CHECKED (" + code + ")" if few else "NOT CHECKED")
    (line,) = [line for line in not_made([row]) if why in line]
    assert (f"{code} {CHECKS[code].title}" in line) == few


def test_an_audit_without_images_leaves_earlier_findings(store: Store) -> None:
    train, keys = sound(store)
    gone = [Finding("C16", "not checked", note="its adversarial images are absent or damaged", attack=k) for k in keys]
    audited(store, train, *gone, evaluations=tuple(reversed(keys)))
    assert only(store).verdict == "OK"
    assert finding(only(store), "C16").note == "images of 4 attacks checked again"
    audited(store, train, Finding("C16", "X", 0.2, attack=keys[0]), evaluations=keys[:2])
    assert only(store).verdict == "INVALID"


@pytest.mark.parametrize(("largest", "verdict"), [(0.1, "OK"), (0.1 + 1e-5, "INVALID"), (float("nan"), "INVALID")])
def test_images_that_are_not_kept_were_measured_when_they_were_made(store: Store, largest: float, verdict: str) -> None:
    train = trained(store, "pgd_at")
    evaluated(store, train, "clean", right(0.9))
    audited(store, train)
    size = np.full(N, 0.05, dtype=np.float32)
    keys = []
    for name, settings, correct in ATTACKS.values():
        columns = {"size": size.copy(), "stage": np.array([-hit or 1 for hit in correct], dtype=np.int8)}
        keys.append(evaluated(store, train, name, correct, settings, columns=columns, files={IMAGES: "0" * 64}))
        size[7] = largest  # of every attack but the first
    row = only(store)
    assert row.verdict == verdict
    assert verdict == "INVALID" or verdict_text(row) == "OK (images not kept)"
    assert "images not kept" in next(f.note for f in row.findings if f.code == "C16")
    (store.folder(keys[0]) / IMAGES).write_bytes(b"there, and so they must be scored again")
    assert only(store).verdict == ("INVALID" if verdict == "INVALID" else "NOT CHECKED")


def test_images_of_an_evaluation_without_stored_sizes_are_not_checked(store: Store) -> None:
    train, _ = sound(store)
    evaluated(store, train, "square", right(0.55), files={IMAGES: "0" * 64})
    assert only(store).verdict == "NOT CHECKED"
    assert "square" in finding(only(store), "C16").note


def unlearned(store: Store, seed: int) -> None:
    """A model of one class: robust at chance, also in a ball that holds every image."""
    chance = {kind: (*given[:2], right(0.1)) for kind, given in ATTACKS.items()}
    data, metrics = {"name": "digits"}, {"final_terms": {"ce": 2.303}}
    threats = Finding("C9", "U", 0.1, 0.01, "10.0 % correct at eps 1"), Finding("C10", "F", 0.1, 0.005)
    sound(store, *threats, clean=0.1, attacks=chance, seed=seed, data=data, metrics=metrics)


def test_a_model_that_did_not_learn_has_a_verdict_of_its_own(store: Store) -> None:
    unlearned(store, 0)
    row = only(store)
    assert (row.verdict, codes(row, "FUX")) == ("DID NOT LEARN", set())
    assert [f.note for f in row.findings if f.code == "C9"] == ["10.0 % correct at eps 1; the seed did not learn"]
    assert "| did not learn | pgd\\_at |" in markdown(store)
    assert "- pgd\\_at: seed 0 did not learn: clean 10.0 %, loss 2.30 = ln 10\n" in markdown(store)
    header, (line,), notes, _ = matrix(store, store.keys())
    assert line[header.index("verdict")] == "DID NOT LEARN"
    assert "pgd_at: seed 0 did not learn: clean 10.0 %, loss 2.30 = ln 10" in notes


def test_one_seed_of_several_that_did_not_learn_is_a_flag(store: Store) -> None:
    unlearned(store, 0)
    sound(store, seed=1, data={"name": "digits"})
    row = only(store)
    assert verdict_text(row) == "FLAG (seed 0 did not learn)"
    assert row.accuracy.worst.mean == pytest.approx((0.1 + 0.5) / 2)


@pytest.mark.parametrize(
    ("write", "said"), [(sound, "none"), (without_images, "C16 not checked"), (without_audit, "not checked")]
)
def test_missing_answers_are_named(store: Store, write: Any, said: str) -> None:
    write(store)
    assert flags(only(store)) == said


def test_a_full_audit_replaces_a_quick_one(store: Store) -> None:
    train, _ = sound(store, Finding("C10", "F", 0.1, 0.005))
    assert only(store).verdict == "FLAG"
    audited(store, train, level="full")
    assert only(store).verdict == "OK"


def test_an_audit_in_another_norm_confirms_nothing_but_its_failures_hold(store: Store) -> None:
    train = trained(store, "pgd_at")
    audited(store, train, evaluations=attacked(store, train, norm="L2"))
    audited(store, train, Finding("C12", "U", 0.1, 0.01, eps="0.1"))
    row = only(store)
    assert (row.verdict, finding(row, "C9").level) == ("NOT CHECKED", "not checked")
    assert finding(row, "C12").level == "not checked"
    audited(store, train, Finding("C6", "U", 4.0, 0.0), level="full")
    assert severe(only(store)) == ({"C6"}, "UNSOUND")
    audited(store, train, threat=("L2", "0.1"))
    assert only(store).verdict == "OK"


def ranks(store: Store) -> dict[str, str]:
    whole = markdown(store).partition("<details>")[2]
    lines = [line.split(" | ")[:2] for line in whole.splitlines() if line.startswith("| ")]
    return {name: rank.removeprefix("| ") for rank, name in lines[2:]}


def test_unsound_and_invalid_rows_are_last_and_have_no_rank(store: Store) -> None:
    sound(store, name="trades")
    best = {kind: (*given[:2], right(0.8)) for kind, given in ATTACKS.items()}
    sound(store, Finding("C9", "U", 0.4, 0.1, "0.4 at eps 1"), name="mart", attacks=best)
    sound(store, Finding("C3", "X", 5.0, 0.0, "5 NaN"), name="lsa", attacks=best)
    sound(store, Finding("C2", "F", note="sums to 1"), name="awp")
    sound(store, name="rat", attacks={"autoattack": None})
    assert ranks(store) == {"awp": "1 ⚑", "trades": "1", "rat": "1†", "mart": "unsound", "lsa": "invalid"}
    assert list(ranks(store)) == ["awp", "trades", "rat", "mart", "lsa"]
    text = markdown(store)
    assert "- mart at Linf eps 0.1 is unsound; it fails C9 (An unbounded attack succeeds): 0.4 at eps 1" in text
    assert "- lsa at Linf eps 0.1 is invalid; it fails C3 (All numbers are finite): 5 NaN" in text
    (legend,) = [line for line in text.splitlines() if line.startswith("- flags, checks not passed: ")]
    assert [name in legend for name in ("C2 ", "C3 ", f"C9 {CHECKS['C9'].title}", "C10 ")] == [True, True, True, False]
    assert "| UNSOUND | C9 U |" in text
    assert "| UNSOUND (C9) |" in text


def test_an_invalid_row_shows_no_number_in_any_table(store: Store, tmp_path: Path) -> None:
    odd = {kind: (*given[:2], right(0.377)) for kind, given in ATTACKS.items()}
    train, _ = sound(store, Finding("C3", "X", 1.0, 0.0, "1 NaN"), clean=0.377, attacks=odd)
    evaluated(store, train, "certify", right(0.377), columns={"radius": np.ones(N)})
    sound(store, name="trades")
    written = write_leaderboard(store, tmp_path / "leaderboard.md", tmp_path)
    for path in written:
        assert not re.search(r"0\.377|37\.70?", path.read_text()), path.name
    short, _, whole = written[0].read_text().partition("<details>")
    assert (
        "| – | [pgd\\_at](https://arxiv.org/abs/1706.06083) | invalid | invalid | – × 1 | INVALID (C3) | – |\n" in short
    )
    (line,) = [line for line in whole.splitlines() if line.startswith("| invalid |")]
    cells = line.split(" | ")
    header = next(text for text in whole.splitlines() if text.startswith("| Rank")).split(" | ")
    shown = dict(zip(header, cells, strict=True))
    row = next(row for row in all_rows(store) if row.verdict == "INVALID")
    held = [value for value in vars(row).values() if isinstance(value, SeedValues)]
    held += [cell for values in vars(row).values() if isinstance(values, dict) for cell in values.values()]
    assert not [cell for cell in held if isinstance(cell, SeedValues) and cell.values]
    for name in ("Standard accuracy", "AutoAttack robust accuracy", "Best known robust accuracy", "fgsm"):
        assert shown[name] == "invalid"
    assert {shown[name] for name in ("95 % interval", "n", "Training s (× standard)", "Seeds")} == {"–"}
    with (tmp_path / "evaluations.csv").open(newline="") as file:
        entries = list(csv.DictReader(file))
    assert {(e["state"], e["accuracy"]) for e in entries if e["defense"] == "pgd_at"} == {("invalid", "")}
    assert {e["state"] for e in entries if e["defense"] == "trades"} == {"done"}
    header_, lines, notes, _ = matrix(store, store.keys())
    (short,) = [line for line in lines if line[0] == "pgd_at"]
    assert short[header_.index("worst case")] == short[header_.index("clean")] == "invalid"
    assert short[header_.index("verdict")] == "INVALID (C3)"
    assert any("pgd_at at Linf eps 0.1 is invalid" in note for note in notes)


def test_clean_accuracy_stays_where_another_budget_is_valid(store: Store, tmp_path: Path) -> None:
    train, _ = sound(store, Finding("C18", "X", note="half a gray level", eps="0.1"))
    attacked(store, train, eps="0.2")
    write_leaderboard(store, tmp_path / "leaderboard.md", tmp_path)
    with (tmp_path / "evaluations.csv").open(newline="") as file:
        found = {(e["attack"], e["eps"]): e["state"] for e in csv.DictReader(file)}
    assert found["clean", ""] == "done"
    assert found["fgsm", "0.1"] == "invalid"
    assert found["fgsm", "0.2"] == "done"


def test_checks_csv_holds_every_finding_of_every_row(store: Store, tmp_path: Path) -> None:
    without_audit(store)
    written = write_leaderboard(store, tmp_path / "leaderboard.md", tmp_path)
    (path,) = (path for path in written if path.name == "checks.csv")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["code"] for line in lines} == set(CHECKS) - {"C20"}
    assert all(line["level"] for line in lines)
    assert {line["level"] for line in lines if CHECKS[line["code"]].source == "images"} == {"not checked"}
    before = path.read_bytes()
    write_leaderboard(store, tmp_path / "leaderboard.md", tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("code", ["C1", "C2", "C4", "C6", "C13", "C19"])
def test_an_unreliable_autoattack_is_marked(store: Store, code: str) -> None:
    if code == "C13":
        search_wins(store, 0.01)
    else:
        sound(store, Finding(code, "U" if code == "C19" else "F"))
    assert unreliable(only(store)) == "yes"


def test_another_flag_does_not_concern_autoattack(store: Store) -> None:
    sound(store, Finding("C10", "F"))
    assert unreliable(only(store)) == "no"


def test_autoattack_is_reliable_only_where_it_ran_and_was_checked(store: Store) -> None:
    sound(store, name="trades")
    sound(store, name="mart", attacks={"autoattack": None})
    attacked(store, trained(store, "awp"))
    assert {row.defense: unreliable(row) for row in all_rows(store)} == {
        "trades": "no", "mart": "not checked", "awp": "not checked",
    }  # fmt: skip


def test_the_matrix_uses_the_audits_among_its_jobs_only(store: Store) -> None:
    train = trained(store, "pgd_at")
    keys = [evaluated(store, train, "clean", right(0.9)), *attacked(store, train)]
    audits = [audited(store, train), audited(store, train, evaluations=tuple(keys[1:]))]
    header, (line,), notes, _ = matrix(store, keys)
    assert line[header.index("verdict")] == "NOT CHECKED"
    assert [note for note in notes if re.fullmatch(r"not checked: \d+ checks: no audit \(pgd_at\)", note)], notes
    header, (line,), notes, _ = matrix(store, [*keys, *audits])
    assert line[header.index("verdict")] == "OK"
    assert not [note for note in notes if "not checked" in note]


def draws(correct: Images, vote: Images) -> dict[str, Any]:
    """Columns of a model with noise: the majority of many draws says `vote`, whatever one draw said."""
    select = np.where(np.array(vote) > 0, 0.9, 0.1).astype(np.float32)
    return {"vote": np.array(vote, dtype=bool), "select": select, "share": select}


def test_a_stochastic_model_is_evaluated_by_majorities(store: Store) -> None:
    train = trained(store, "pni", deploys="randomised")
    # by single draws seven steps would leave more images than one
    evaluated(store, train, "fgsm", right(0.5), columns=draws(right(0.5), right(0.6)))
    evaluated(store, train, "eot", right(0.6), {"draws": [4]}, columns=draws(right(0.6), right(0.5)))
    row = only(store)
    assert finding(row, "C7").level == "ok"
    assert finding(row, "C1").level == "I"
    audited(store, train, Finding("C1", "U", 3.0, 0.0, "3 labels flip"))
    assert finding(only(store), "C1").level == "I"  # the noise is declared
    assert finding(row, "C28").note == "yes: eot (draws=[4])"


def test_a_few_draws_of_noise_prove_nothing(store: Store) -> None:
    train = trained(store, "pni", deploys="randomised")
    evaluated(store, train, "fgsm", right(0.5))
    evaluated(store, train, "autoattack", right(0.6), {**STANDARD, "eot": 20})
    row = only(store)
    assert finding(row, "C7").level == finding(row, "C1").level == "not checked"
    assert "draws" in finding(row, "C7").note


@pytest.mark.usefixtures("fresh_catalog")
def test_every_defense_names_its_adaptive_attack_or_says_why_none_is_needed() -> None:
    known = set(catalog.names("attacks")) | {"closed_form", "eot"}
    for name in catalog.names("defenses"):
        says = catalog.get("defenses", name).constant("adaptive_attacks", "")
        assert says, name
        assert " " in says.replace(", ", "") or set(says.split(", ")) <= known, name


@pytest.mark.parametrize(
    ("defense", "attack", "level", "note"),
    [
        ("pgd_at", "fgsm", "ok", "argued: standard attacks are adaptive"),
        ("noisy", "fgsm", "F", "missing: closed_form was not run"),
        ("noisy", "closed_form", "ok", "yes: closed_form"),
        ("rse", "fgsm", "F", "missing: closed_form or eot was not run"),
        ("gone", "fgsm", "not checked", "the file of defense gone is missing"),
    ],
)
def test_adaptive_attacks_are_run_argued_or_missing(
    store: Store, defense: str, attack: str, level: str, note: str
) -> None:
    evaluated(store, trained(store, defense), attack, right(0.5))
    found = finding(only(store), "C28")
    assert found.level == level
    assert note in found.note


def test_a_base_defense_needs_its_adaptive_attack_too(store: Store) -> None:
    base = {"base": {"name": "noisy", "set": {}, "revision": 1}}
    evaluated(store, trained(store, "awp", defense={"set": base}), "fgsm", right(0.5))
    assert finding(only(store), "C28").level == "F"


def test_explain_describes_one_check_or_lists_all(bench: Bench) -> None:
    for words in (("C8",), ("c8",), ("8",)):
        out = bench("explain", *words).out
        assert out.startswith(f"C8: {CHECKS['C8'].title}")
        for part in (CHECKS["C8"].why, CHECKS["C8"].todo, CHECKS["C8"].threshold, CHECKS["C8"].measures):
            assert part in " ".join(out.split())
    listed = bench("explain").out
    assert [line.split()[0] for line in listed.splitlines()[: len(CHECKS)]] == list(CHECKS)


@pytest.mark.parametrize(("word", "near"), [("C33", "C3"), ("losses agre", "C15"), ("zero gradients", "C4")])
def test_explain_suggests_what_was_meant(bench: Bench, word: str, near: str) -> None:
    outcome = bench("explain", word)
    assert outcome.code == 2
    assert outcome.err.strip() == f"error: no check '{word}'. Did you mean '{near}'? Known: C1 to C30"


def test_verdicts_and_explanations_start_without_numpy() -> None:
    code = (
        "import sys, bench.soundness.verdicts, bench.tables.ranking, bench.commands.explain; "
        "assert not {'pandas', 'numpy', 'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_a_gate_turns_an_unsound_row_into_an_exit_code(bench: Bench) -> None:
    """PNI under FGSM alone: noise that no attack averages over."""
    words = ["run", "--dataset", "digits", "--defense", "pni", "--no-baseline", "--attack", "fgsm", "--eps", "0.1"]
    words += ["--epochs", "1", "--n", "10", "--train-n", "64", "--executor", "debug"]
    gated = bench(*words, "--gate")
    assert gated.code == 4
    assert "gate: pni at Linf eps 0.1 is unsound; it fails C1" in gated.err
    assert "UNSOUND (C1, " in gated.out
    assert bench(*words).code == 0
    # a row that nobody checked passes: the gate stops what is known to be wrong
    checked = [*words[:4], "standard", *words[5:]]
    assert bench(*checked, "--gate").code == 0


def test_a_seed_outside_the_worst_case_needs_no_adaptive_attack(store: Store) -> None:
    first, second = (trained(store, "pni", seed, deploys="randomised") for seed in range(2))
    for train in (first, second):
        evaluated(store, train, "fgsm", right(0.6), columns=draws(right(0.6), right(0.6)))
    evaluated(
        store, first, "eot", right(0.5), {"draws": [1, 4]}, columns=draws(right(0.5), right(0.5)),
        metrics={"backwards_per_image": 300},
    )  # fmt: skip
    row = only(store)
    assert set(row.provenance.keys) == {0}
    assert {code: finding(row, code).level for code in ("C1", "C24", "C28")} == {"C1": "I", "C24": "ok", "C28": "ok"}


def column(images: Images, hits: Images, select: list[float] | None = None) -> Column:
    return Column(np.array(images), np.array(hits, dtype=bool), None if select is None else np.array(select))


def test_columns_meet_on_the_images_that_they_share() -> None:
    first, second = on_shared(column([0, 1, 2, 3], [1, 0, 1, 1]), column([1, 3, 7], [1, 0, 1]))
    assert first.images.tolist() == second.images.tolist() == [1, 3]
    assert (first.correct.tolist(), second.correct.tolist()) == ([False, True], [True, False])
    assert worst_of(first, second).correct.tolist() == [False, False]
    assert np.isnan(on_shared(column([0], [1]), column([5], [1]))[0].share)


def test_the_worst_case_under_noise_is_the_attack_that_other_draws_chose() -> None:
    one, two = column([0, 1], [1, 0], [0.2, 0.9]), column([0, 1], [0, 1], [0.3, 0.4])
    chosen = worst_of(one, two)
    assert chosen.correct.tolist() == [True, True]  # image 0 by the first, image 1 by the second
    assert chosen.select is not None
    assert chosen.select.tolist() == [0.2, 0.4]
    assert worst_of(one, two._replace(select=None)).correct.tolist() == [False, False]


def test_clean_errors_count_in_the_worst_case_that_noise_is_compared_with(store: Store) -> None:
    train = trained(store, "pgd_at")
    evaluated(store, train, "clean", [0] * 200 + [1] * 800)
    keys = attacked(store, train)
    audited(store, train, columns={"noise@0.1": right(0.45)})
    audited(store, train, evaluations=keys)
    assert finding(only(store), "C12").level == "ok"  # 30 % under all, clean errors included


def test_outcomes_without_a_shared_image_are_not_compared(store: Store) -> None:
    train = trained(store, "pgd_at")
    evaluated(store, train, "fgsm", right(0.5))
    evaluated(store, train, "pgd", right(0.9), columns={"index": np.arange(N, 2 * N)})
    assert finding(only(store), "C7").level == "not checked"


def test_certified_accuracy_may_exceed_attacked_accuracy_within_their_intervals(store: Store) -> None:
    train = trained(store, "smoothing", eps=None, deploys="smoothed")
    evaluated(store, train, "certify", right(0.9, 200), columns={"radius": np.full(200, 0.6)})
    # what single draws decide is lower; the vote that was certified is the deployed rule
    columns = draws(right(0.86, 200), right(0.4, 200))
    evaluated(store, train, "eot", right(0.86, 200), norm="L2", eps="0.5", columns=columns)
    found = finding(only(store), "C25")
    assert (found.level, found.value) == ("ok", pytest.approx(0.04))


def test_an_image_broken_in_spite_of_a_proof_invalidates(store: Store) -> None:
    """No interval excuses it, and a proof is no part of the worst case."""
    train, _ = sound(store)
    evaluated(store, train, "interval", right(0.4))
    row = only(store)
    assert (finding(row, "C25").level, row.verdict) == ("ok", "OK")
    assert row.accuracy.worst.mean == pytest.approx(0.5)
    assert row.accuracy.proved["interval"].mean == pytest.approx(0.4)
    assert "proved by interval" in markdown(store)
    assert "proved by interval" in matrix(store, store.keys()).header
    evaluated(store, train, "interval", [*right(0.4)[:-1], 1], {"method": "crown"})
    found = finding(only(store), "C25")
    assert (found.level, found.note) == ("X", f"1 image of {2 * N} broken in spite of a proof")
    assert only(store).verdict == "INVALID"


def test_a_certificate_counts_up_to_its_own_radius(store: Store) -> None:
    train = trained(store, "smoothing", eps=None, deploys="smoothed")
    radius = np.where(np.arange(200) % 2, 0.6, 0.4)
    evaluated(store, train, "certify", [1] * 200, columns={"radius": radius})
    evaluated(
        store, train, "eot", right(0.7, 200), norm="L2", eps="0.5", columns=draws(right(0.7, 200), right(0.7, 200))
    )
    found = finding(only(store), "C25")
    assert (found.level, found.value) == ("ok", pytest.approx(0.5 - 0.7))


def test_square_is_not_credited_with_clean_errors(store: Store) -> None:
    train = trained(store, "pgd_at")
    evaluated(store, train, "clean", [0] * 100 + [1] * 900)
    attacked(store, train, {"autoattack": None, "square": ("square", {}, [0] * 100 + [1] * 900)})
    found = finding(only(store), "C13")
    assert (found.level, found.value) == ("ok", 0.0)
