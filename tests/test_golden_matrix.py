"""One matrix in which much goes wrong, in every output: what went wrong reads as what it is, and ties are ties.

The files in golden/matrix are written by `BENCH_GOLDEN=1 pytest tests/test_golden_matrix.py`; look at what changed.
"""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from factories import FLOOR, STANDARD, attacked, audited, draws, evaluated, right, sound, trained

from bench.planning.job import Job
from bench.records.record import JobError, Record
from bench.records.store import Store
from bench.results.scope import scoped
from bench.soundness.checks import Finding
from bench.tables import compare, timing
from bench.tables.columns import LONGEST_VENUE, paper
from bench.tables.leaderboard import board, write_leaderboard
from bench.tables.markdown import escape
from bench.tables.selection import RowFilter
from bench.tables.sweep import sweep
from bench.tables.sweep_text import text

GOLDEN = Path(__file__).parent / "golden" / "matrix"
N = 1000


def model(store: Store, name: str, robust: float, seed: int = 0, *found: Finding, seconds: float = 30.0) -> Job:
    """A sound model, audited, of which `robust` of the images withstand the strongest attack."""
    attacks = {
        "fgsm": ("fgsm", {}, right(robust and robust + 0.1)),
        "pgd": ("pgd", FLOOR, right(robust and robust + 0.02)),
        "cw": None,
        "autoattack": ("autoattack", STANDARD, right(robust)),
    }
    metrics = {"work_per_image_f": seconds / 2}
    train, _ = sound(store, *found, name=name, seed=seed, attacks=attacks, seconds=seconds, metrics=metrics)
    return train


def without_autoattack(store: Store, name: str, state: str, error: JobError) -> None:
    train = trained(store, name, seconds=40.0)
    evaluated(store, train, "clean", right(0.9))
    evaluated(store, train, "pgd", right(0.9), FLOOR)
    job = store.job(evaluated(store, train, "autoattack", settings=STANDARD, state="missing", n=N))
    store.put(job, Record(state, error=error))


def matrix(store: Store) -> None:
    """Rows by what they show: a baseline, two that tie, one behind them with a collapsed seed, a failed cell, one over
    its time, one unsound, one invalid, one that draws, one that certifies."""
    base = trained(store, "standard", eps=None, metrics={"work_per_image_f": 3.0})
    evaluated(store, base, "clean", right(0.95))
    attacked(store, base, {"fgsm": ("fgsm", {}, right(0.2)), "pgd": ("pgd", FLOOR, right(0)), "cw": None,
                           "autoattack": ("autoattack", STANDARD, right(0))})  # fmt: skip
    model(store, "twin_a", 0.505, seconds=60.0)
    model(store, "twin_b", 0.5)
    for seed, robust in enumerate((0.46, 0.44, 0.0)):
        model(store, "shaky", robust, seed)
    without_autoattack(store, "torn", "error", JobError("RuntimeError", "out of memory"))
    late = JobError("Timeout", "killed at the time limit of 60 s, with all its processes")
    without_autoattack(store, "late", "timeout", late)
    model(store, "masked", 0.8, 0, Finding("C9", "U", 0.4, 0.1, note="40.0 % right at eps 1"))
    model(store, "broken", 0.9, 0, Finding("C3", "X", 3.0, 0.0, note="3 NaN"))
    coin = trained(store, "coin", deploys="randomised", seconds=35.0)
    share = np.linspace(0.2, 0.9, N)
    evaluated(store, coin, "clean", right(0.9), columns=draws([0.9] * N, [0.9] * N))
    for name, less in (("eot", 0.1), ("closed_form", 0.05), ("transfer", 0.0)):
        settings = {"draws": [1, 4, 32]} if name == "eot" else {}
        own = draws(list(share - less), list(share - less))
        cost = {"backwards_per_image": 20.0 * sum(settings["draws"])} if settings else {}
        evaluated(store, coin, name, [int(s - less > 0.5) for s in share], settings, columns=own, metrics=cost)
    smooth = trained(store, "smooth", eps=None, deploys="smoothed", seconds=12.0)
    evaluated(store, smooth, "clean", right(0.9), columns=draws([0.9] * N, [0.9] * N))
    evaluated(store, smooth, "certify", right(0.85), columns={"radius": np.linspace(1.2, 0, N)})
    for k, (strength, robust) in enumerate(((1.0, 0.3), (6.0, 0.48))):
        train = trained(store, "swept", defense={"set": {"beta": strength}}, seconds=20.0 + k)
        evaluated(store, train, "clean", right(0.9))
        evaluated(store, train, "autoattack", right(robust), STANDARD)
    audited(store, coin)


def outputs(store: Store, folder: Path) -> dict[str, str]:
    """Every output by the name of its file, without what a plug-in's file says of its paper."""
    paths = write_leaderboard(store, folder / "leaderboard.md", folder)
    found = {path.name: path.read_bytes().decode() for path in paths if not path.name.startswith("evaluations")}
    at = scoped(store, dataset="toy", eps=["0.1"])
    found["compare.txt"] = compare.show(at, "twin_a", "shaky", RowFilter(), False) + "\n"
    found["compare.json"] = compare.show(at, "twin_b", "masked", RowFilter(), True) + "\n"
    rows = board(store)
    found["timing.txt"] = timing.show(rows, False) + "\n"
    found["sweep.txt"] = text(store, sweep(store, rows, "swept", "beta", RowFilter()), []) + "\n"
    source = paper("standard") or ""
    for own in {escape(source[:LONGEST_VENUE]), json.dumps(source)[1:-1]} - {""}:
        found = {name: content.replace(own, "VENUE") for name, content in found.items()}
    return found


def test_every_output_of_the_matrix_is_as_it_was(store: Store, tmp_path: Path) -> None:
    matrix(store)
    found = outputs(store, tmp_path)
    if os.environ.get("BENCH_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        for name, content in found.items():
            (GOLDEN / name).write_bytes(content.encode())
    assert {path.name for path in GOLDEN.iterdir()} == set(found)
    for name, content in found.items():
        assert content == (GOLDEN / name).read_bytes().decode(), name


@pytest.fixture
def lines(store: Store, tmp_path: Path) -> dict[str, dict[str, str]]:
    matrix(store)
    content = outputs(store, tmp_path)["leaderboard.csv"]
    return {line["method"]: line for line in csv.DictReader(io.StringIO(content))}


def test_what_went_wrong_reads_as_what_it_is(lines: dict[str, dict[str, str]]) -> None:
    assert [lines[name]["rank"] for name in ("twin_a", "twin_b", "shaky", "standard")] == ["1", "1", "4", "6"]
    assert (lines["torn"]["autoattack"], lines["torn"]["worst_case"]) == ("error", "incomplete")
    assert (lines["late"]["autoattack"], lines["late"]["worst_case"]) == ("timeout", "incomplete")
    assert (lines["masked"]["rank"], lines["broken"]["rank"]) == ("unsound", "invalid")
    assert (lines["masked"]["worst_case"], lines["broken"]["worst_case"]) == ("0.8", "invalid")
    shaky = lines["shaky"]
    assert (float(shaky["worst_case"]), shaky["collapsed_seeds"]) == (pytest.approx(0.3), "2")
    assert (float(shaky["others_mean"]), shaky["seeds_done"]) == (pytest.approx(0.45), "3")
    assert shaky["seed_values"] == "0:0.46 1:0.44 2:0.0"
    assert (lines["coin"]["section"], lines["coin"]["eot_draws"]) == ("randomised", "32")
    assert (lines["smooth"]["section"], float(lines["smooth"]["certified L2 0.5"])) == ("smoothed", 0.583)


def test_fronts_hold_sound_rows_alone(lines: dict[str, dict[str, str]]) -> None:
    fronts = {name: [line[f"pareto_{kind}"] for kind in ("clean", "seconds", "work")] for name, line in lines.items()}
    # standard has the best clean accuracy and the least cost; twin_a the best worst case, at twice the cost of twin_b
    assert fronts["standard"] == fronts["twin_a"] == ["True"] * 3
    assert fronts["twin_b"] == ["False", "True", "True"]
    assert fronts["shaky"] == ["False"] * 3
    assert fronts["masked"] == fronts["broken"] == fronts["torn"] == fronts["smooth"] == [""] * 3


def test_every_cell_names_its_evaluations(store: Store, tmp_path: Path) -> None:
    matrix(store)
    cells = list(csv.DictReader(io.StringIO(outputs(store, tmp_path)["cells.csv"])))
    done = [cell for cell in cells if cell["state"] == "done"]
    assert done
    for cell in done:
        values = [store.samples(key)["correct"] for key in cell["keys"].split()]
        assert all(store.job(key).needs[0] == cell["train_key"] for key in cell["keys"].split())
        whole = np.logical_and.reduce(values).mean()
        if cell["method"] != "coin" and "certified" not in cell["column"]:
            assert float(cell["value"]) == pytest.approx(whole), cell
    torn = next(cell for cell in cells if cell["method"] == "torn" and cell["column"].startswith("autoattack"))
    assert (torn["state"], torn["reason"], torn["value"]) == ("error", "RuntimeError: out of memory", "")
    assert store.record(torn["keys"]) is not None
    assert {cell["value"] for cell in cells if cell["method"] == "broken"} == {""}
