"""The package face: data frames for notebooks, whose columns docs/schema.md describes, and nothing heavy to import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from factories import draws, evaluated, trained

import bench
from bench.records.store import Store
from bench.results.evaluations import COLUMNS

SCHEMA = (Path(__file__).parent.parent / "docs" / "schema.md").read_text()


def test_every_column_of_the_frame_is_documented_with_its_type_and_unit() -> None:
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]+) \| ([^|]+) \|$", SCHEMA, flags=re.MULTILINE)
    assert [(name, kind) for name, kind, _, _ in listed] == list(COLUMNS.items())
    assert all(unit.strip() != "–" for name, kind, unit, _ in listed if kind == "float64")


def test_load_is_one_row_an_evaluation(store: Store) -> None:
    train = trained(store, metrics={"work_per_image_f": 6.0})
    key = evaluated(store, train, "steep", [1, 1, 1, 0])
    lost = evaluated(store, train, "onestep", state="missing", n=4)
    table = bench.load(str(store.root)).set_index("key")
    assert list(table.columns) == [name for name in COLUMNS if name != "key"]
    assert table.loc[key, ["state", "accuracy", "work_per_image_f"]].tolist() == ["done", 0.75, 6.0]
    assert table.loc[lost, "state"] == "missing"


def test_samples_are_one_row_an_image_by_its_place_in_the_test_set(store: Store) -> None:
    train = trained(store, deploys="randomised")
    columns = {**draws([0.5, 0.75, 1.0], [0.25, 0.5, 1.0]), "index": np.array([2, 0, 1])}
    columns["share_at"] = np.array([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    key = evaluated(store, train, "steep", [0, 1, 1], columns=columns)
    images = bench.samples(key, store.root)
    assert images.index.tolist() == [0, 1, 2]
    assert images["correct"].tolist() == [True, True, False]
    assert images["share"].tolist() == [0.5, 1.0, 0.25]
    assert images.loc[0, "share_at"].tolist() == [0.3, 0.4]
    assert all(f"`{name}`" in SCHEMA for name in [*images.columns, "select_at"])


def test_what_has_no_samples_says_so(store: Store, tmp_path: Path) -> None:
    train = trained(store)
    with pytest.raises(LookupError, match=f"{train.key} is a job of kind 'train'"):
        bench.samples(train.key, store.root)
    with pytest.raises(LookupError, match="has no samples: it is missing"):
        bench.samples(evaluated(store, train, "steep", state="missing", n=3), store.root)
    with pytest.raises(LookupError, match="no job 0123456789ab"):
        bench.samples("0123456789ab", store.root)
    with pytest.raises(FileNotFoundError, match=r"no results folder .*nowhere"):
        bench.load(tmp_path / "nowhere")


def test_importing_bench_imports_nothing_heavy() -> None:
    code = "import bench, sys; print({'pandas', 'numpy', 'scipy', 'torch', 'pydantic', 'typer'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_worst_case_of_one_training_is_the_leaderboards(store: Store) -> None:
    train = trained(store, seed=3)
    evaluated(store, train, "clean", [1, 1, 1, 1, 0])
    evaluated(store, train, "steep", [1, 0, 1, 1, 1])
    evaluated(store, train, "onestep", [1, 1, 1], eps="0.1")
    evaluated(store, train, "steep", [0, 0, 1, 1, 1], eps="0.2")
    losses = {"loss": np.zeros(5)}
    evaluated(store, train, "flatness", [1] * 5, columns=losses, metrics={"metric": "loss"})
    columns = {"broken_at": np.array([0.05, 0.2, 0.15, np.inf, 0.2])}
    evaluated(store, train, "curve", [0] * 5, {"budgets": ["0.1", "0.2"]}, columns=columns)
    found = bench.worst(train.key, "0.1", store.root)
    assert found["right"].tolist() == [False, False, True]
    assert list(found.columns) == ["right"]
    assert found.equals(bench.worst(train.key, 0.1, store.root))
    for budget, why in (("0.3", "no evaluation of its last weights"), ("1/3", "no evaluation")):
        with pytest.raises(LookupError, match=rf"{train.key} has no worst case at eps {budget}: {why}"):
            bench.worst(train.key, budget, store.root)
    evaluated(store, train, "onestep", state="missing", n=3, eps="0.2")
    assert len(bench.worst(train.key, "0.2", store.root)) == 5  # what was only planned does not count
    evaluated(store, train, "onestep", state="error", n=4, eps="0.2")
    with pytest.raises(LookupError, match=r"at eps 0\.2: incomplete: onestep error"):
        bench.worst(train.key, "0.2", store.root)


def test_the_worst_case_of_a_model_that_draws_is_judged_by_other_draws_than_chose_it(store: Store) -> None:
    coin = trained(store, deploys="randomised")
    evaluated(store, coin, "steep", [1, 0], columns=draws([0.2, 0.9], [0.6, 0.8]))
    evaluated(store, coin, "onestep", [0, 1], columns=draws([0.3, 0.1], [0.1, 0.5]))
    found = bench.worst(coin.key, "0.1", store.root)
    assert found["share"].tolist() == pytest.approx([0.6, 0.5])
    assert found["right"].tolist() == [True, True]


def test_the_documented_worst_case_is_the_leaderboards() -> None:
    """The very lines of docs/schema.md, on the committed records."""
    root = Path(__file__).parent.parent
    (code,) = re.findall(r"```python\n(images = .*?)```", SCHEMA, flags=re.DOTALL)
    code = code.replace('"0.1")', f'"0.1", {str(root / "results")!r})')
    done = subprocess.run([sys.executable, "-c", f"import bench\n{code}"], capture_output=True, text=True, check=True)
    share, n = done.stdout.split()
    (row,) = (
        line for line in (root / "results" / "tables" / "leaderboard.csv").read_text().splitlines()
        if line.startswith("mnist,Linf,0.1,deterministic,") and ",pgd_at,lenet5," in line
    )  # fmt: skip
    assert share in row.split(",")
    assert n in row.split(",")
