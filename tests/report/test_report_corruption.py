"""Accuracy under corruption in the report, and as a column of rows and tables that no rank depends on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import all_rows, evaluated, full, only, trained
from harness import Bench
from report_page import Page

from bench.planning.job import Job
from bench.records.store import Store
from bench.report.corruption import corruption_maps
from bench.results.evaluations import evaluations
from bench.results.seed_values import SeedValues
from bench.soundness.verdicts import _without_numbers
from bench.tables.leaderboard import markdown, write_leaderboard
from bench.tables.measures import notes
from bench.tables.summary import matrix

SETTINGS = {"types": ["fog", "glass_blur"], "severities": [1, 3, 5], "seed": 0}
FOG = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
GLASS = [[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]


def corrupted(store: Store, train: Job, fog: Any = FOG, glass: Any = GLASS, **other: Any) -> str:
    """An evaluation by `corruption` of four images: which are right under each type, at three severities."""
    held = {"correct_fog": np.array(fog, dtype=bool), "correct_glass_blur": np.array(glass, dtype=bool)}
    columns = {**held, "corruption_accuracy": np.concatenate([*held.values()], 1).mean(1)}
    columns |= {"clean": np.array([1, 1, 1, 0], dtype=bool), **other.pop("columns", {})}
    about = {"columns": columns, "metrics": {"metric": "corruption_accuracy"}, **other}
    return evaluated(store, train, "corruption", [1] * len(fog), SETTINGS, **about)


def test_both_figures_have_the_mean_over_images_then_over_seeds_and_the_best_model_first(store: Store) -> None:
    keys = [corrupted(store, trained(store, seed=0)), corrupted(store, trained(store, seed=1), fog=[[1] * 3] * 4)]
    best = corrupted(store, trained(store, "best"), glass=[[1] * 3] * 4)
    corrupted(store, trained(store, "elsewhere", data={"name": "another"}))
    *_, by_type, by_severity = corruption_maps(store, evaluations(store).readable)
    assert list(by_type.header) == ["defense", "clean", "mean", "fog", "glass blur"]
    fog, glass = 7 / 12, 1 / 12
    expected = [[0.75, (fog + 1) / 2, fog, 1.0], [0.75, ((fog + 1) / 2 + glass) / 2, (fog + 1) / 2, glass]]
    np.testing.assert_allclose(by_type.shades, expected)
    assert [list(line) for line in by_type.lines] == [
        ["best trained at 0.1", "75.0", "79.2", "58.3", "100.0"],
        ["guard trained at 0.1", "75.0", "43.8", "79.2", "8.3"],
    ]
    assert [behind[0] for behind in by_type.behind] == [[best], keys]
    assert list(by_severity.header) == ["defense", "type", "severity 1", "severity 3", "severity 5", "mean"]
    assert [list(line[1:]) for line in by_severity.lines] == [
        ["fog", "100.0", "50.0", "25.0", "58.3"], ["glass_blur", "100.0", "100.0", "100.0", "100.0"],
        ["fog", "100.0", "75.0", "62.5", "79.2"], ["glass_blur", "25.0", "0.0", "0.0", "8.3"],
    ]  # fmt: skip
    for plot in (by_type, by_severity):
        assert (plot.dataset, plot.threat) == ("toy", "")  # of no threat
        assert "n 4; eps none; seeds 0, 1; device CPU x." in plot.caption
        assert "says nothing of images that an attacker chooses" in plot.caption
    shown = "\n".join(Page(by_severity.svg()).text)
    for said in ("guard trained at 0.1", "clean 75.0, mean 43.8", "glass blur", "severity"):
        assert said in shown
    assert by_severity.svg().count("<svg") == 2  # a panel for each model


def test_an_evaluation_of_that_name_with_other_columns_is_ignored(store: Store) -> None:
    corrupted(store, trained(store), columns={"correct_fog": np.ones(4)})
    corrupted(store, trained(store, "other"), columns={"correct_fog": np.ones((4, 2))})
    assert corruption_maps(store, evaluations(store).readable) == []


def test_a_row_has_it_beside_robustness_and_nothing_else_changes(store: Store) -> None:
    trains = [trained(store, seed=seed) for seed in range(2)]
    for train in trains:
        full(store, train, 400)
    before = only(store)
    assert before.accuracy.measured == {}
    for train, fog in zip(trains, (FOG, [[1] * 3] * 4), strict=True):
        corrupted(store, train, fog)
    row = only(store)
    (found,) = row.accuracy.measured.values()
    assert found.values == pytest.approx({0: 8 / 24, 1: 13 / 24})
    assert found.n == 4
    assert (row.accuracy.worst, row.accuracy.attacks) == (before.accuracy.worst, before.accuracy.attacks)
    assert (row.provisional, row.seeds, row.cost) == (before.provisional, before.seeds, before.cost)
    assert row.evaluations == before.evaluations


def test_tables_have_a_column_for_it(store: Store, tmp_path: Path) -> None:
    train, other = trained(store), trained(store, "other")
    full(store, train, 400)
    full(store, other, 300)
    key = corrupted(store, train)
    name = "accuracy under corruption (severities=[1, 3, 5], types=['fog', 'glass_blur'])"
    lines = [line.replace("\\", "").split(" | ") for line in markdown(store).splitlines() if line.startswith("| ")]
    (head,) = (line for line in lines if name in line)
    cells = [line[head.index(name)] for line in lines if len(line) == len(head)]
    assert "33.33 (n=4)" in cells
    assert "not run" in cells
    written = {path.name: path for path in write_leaderboard(store, tmp_path / "board.md", tmp_path / "tables")}
    by_method = {line["method"]: line for line in csv.DictReader(written["leaderboard.csv"].open())}
    assert float(by_method["guard"][name]) == pytest.approx(8 / 24)
    (cell,) = (line for line in csv.DictReader(written["cells.csv"].open()) if line["column"] == name)
    assert (float(cell["value"]), cell["state"], cell["keys"]) == (pytest.approx(8 / 24), "done", key)
    (means,) = csv.DictReader(written["corruption.csv"].open())
    assert float(means["correct_fog"]) == pytest.approx(7 / 12)
    assert float(means["clean"]) == 0.75
    head, shown, said, _ = matrix(store, list(store.jobs()))
    assert f"under {name[15:]}" in head
    assert [cells[head.index(f"under {name[15:]}")].split()[0] for cells in shown] == ["33.3", "not"]
    assert not [line for line in said if "corruption_accuracy" in line]
    assert [line for line in notes(evaluations(store)) if line.endswith("mean corruption_accuracy 0.3333")]


def test_a_failure_is_explained_and_leaves_the_row_complete(store: Store) -> None:
    train = trained(store)
    full(store, train, 400)
    before = only(store)
    evaluated(store, train, "corruption", state="error", n=4, settings=SETTINGS)
    row = only(store)
    (found,) = row.accuracy.measured.values()
    assert found == SeedValues(absent={0: ("error", "RuntimeError: out of memory")})
    assert row.provisional == before.provisional
    (said,) = (line for line in matrix(store, list(store.jobs())).notes if "corruption" in line)
    assert said.endswith("error: RuntimeError: out of memory")


def test_an_invalid_row_does_not_show_it(store: Store) -> None:
    """As none of its numbers."""
    train = trained(store)
    full(store, train, 400)
    corrupted(store, train)
    (row,) = all_rows(store)
    hidden = _without_numbers(row)
    assert [cell.state() for cell in hidden.accuracy.measured.values()] == ["invalid"]


def test_the_command_draws_them(bench: Bench, store: Store) -> None:
    train = trained(store)
    full(store, train, 400)
    corrupted(store, train)
    words = ("report", "--results-dir", store.root, "--output", "page.html", "--figures", "figures", "--no-images")
    assert bench(*words).code == 0
    page = Path("page.html").read_text()
    assert page.count("Under corruption") >= 1
    assert 'id="toy-data-corruption"' in page
    assert len(list(Path("figures").glob("corruption-*.png"))) == 2
