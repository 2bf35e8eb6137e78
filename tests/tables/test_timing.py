"""What trainings and attacks cost, never mixed over devices; every number here is worked out by hand."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from factories import all_rows, audited, evaluated, train_job, trained
from harness import Bench

from bench.records.record import to_json
from bench.records.store import Store
from bench.results.evaluations import evaluations
from bench.soundness.checks import Finding
from bench.tables.leaderboard import write_leaderboard
from bench.tables.selection import NO_ROW
from bench.tables.timing import attacks, show, trainings


def filled(store: Store) -> None:
    for name, seconds, eps, device, workers, hits in (
        ("standard", 10.0, None, "CPU x", 1, 0),
        ("guard", 36.0, "0.1", "CPU x", 1, 5),
        ("guard", 4.0, "0.1", "GPU y", 1, 5),
        ("guard", 50.0, "0.1", "CPU x", 3, 5),
    ):
        seed = {"CPU x": 0, "GPU y": 1}[device] + (2 if workers > 1 else 0)
        metrics = {"work_per_image_f": 6.0 + seed, "seconds_per_epoch": seconds / 2}
        train = trained(store, name, seed, seconds=seconds, device=device, workers=workers, metrics=metrics, eps=eps)
        spent = {"forwards_per_image": 20.0, "backwards_per_image": 19.0, "attack_seconds": 2.0 + seed}
        evaluated(store, train, "clean", [1] * 10)
        evaluated(store, train, "steep", [1] * hits + [0] * (10 - hits), metrics=spent)
        evaluated(store, train, "steep", [0] * 10, eps="0.3")


def test_devices_and_busy_machines_are_never_averaged(store: Store) -> None:
    filled(store)
    found = {(t.method, t.device, t.shared): t for t in trainings(all_rows(store))}
    assert {kind: (t.seconds, t.seeds) for kind, t in found.items()} == {
        ("standard", "CPU x", False): (10.0, 1), ("guard", "CPU x", False): (36.0, 1),
        ("guard", "GPU y", False): (4.0, 1), ("guard", "CPU x", True): (50.0, 1),
    }  # fmt: skip
    guard = found["guard", "CPU x", False]
    assert (guard.ratio, guard.seconds_per_epoch, guard.work_f, guard.inference_ms) == (3.6, 18.0, 6.0, 0.5)
    assert found["standard", "CPU x", False].ratio == 1.0
    assert math.isnan(found["guard", "GPU y", False].ratio)  # no standard on that device
    assert math.isnan(found["guard", "CPU x", True].ratio)


def test_accuracy_an_hour_is_at_the_budget_trained_at_or_the_largest(store: Store) -> None:
    filled(store)
    found = {(t.method, t.device, t.shared): t for t in trainings(all_rows(store))}
    guard, standard = found["guard", "CPU x", False], found["standard", "CPU x", False]
    assert (guard.budget, guard.robust, guard.n) == ("Linf 0.1", 0.5, 10)
    assert guard.per_hour == pytest.approx(50 / 0.01)
    assert standard.budget == "Linf 0.3"


def test_the_verdict_stands_beside_the_accuracy(store: Store, tmp_path: Path, bench: Bench) -> None:
    filled(store)
    audited(store, train_job("guard", 0), Finding("C9", "U", 0.4, 0.1))
    verdicts = {"guard": "UNSOUND", "standard": "NOT CHECKED"}
    write_leaderboard(store, tmp_path / "board.md", tmp_path / "tables")
    with (tmp_path / "tables" / "timing.csv").open(newline="") as file:
        assert {line["method"]: line["verdict"] for line in csv.DictReader(file)} == verdicts
    shown = json.loads(bench("timing", "--results-dir", store.root, "--json").out)["trainings"]
    assert {line["method"]: line["verdict"] for line in shown} == verdicts
    lines = bench("timing", "--results-dir", store.root).out.splitlines()
    header, guard = (next(line for line in lines if line.startswith(word)) for word in ("method", "guard  "))
    end = header.index("verdict") + len("verdict")
    assert guard[:end].endswith("UNSOUND")


def test_energy_has_a_column_where_a_record_tells_it(store: Store, tmp_path: Path, bench: Bench) -> None:
    filled(store)
    assert "kJ" not in bench("timing", "--results-dir", store.root).out
    for key, joules in ((key, 52_250.0) for key, job in store.jobs().items() if job.kind == "train" and job.seed == 1):
        record = store.record(key)
        assert record is not None
        assert "energy_joules" not in to_json(record)  # records of machines without NVML stay as they were
        store.put(store.job(key), replace(record, energy_joules=joules))
    write_leaderboard(store, tmp_path / "board.md", tmp_path / "tables")
    with (tmp_path / "tables" / "timing.csv").open(newline="") as file:
        told = {(line["device"], line["method"], line["shared"]): line["joules"] for line in csv.DictReader(file)}
    assert told.pop(("GPU y", "guard", "False")) == "52250.0"
    assert set(told.values()) == {""}
    text = bench("timing", "--results-dir", store.root).out
    assert text.count("kJ") == 1
    assert " 52.2 " in text
    found = {e.train_device: e for e in evaluations(store).readable}
    assert found["GPU y"].train_joules == 52_250.0
    assert math.isnan(found["CPU x"].train_joules)
    assert math.isnan(found["GPU y"].attack_joules)


def test_attacks_are_timed_an_image(store: Store) -> None:
    filled(store)
    steep = next(a for a in attacks(all_rows(store)) if a.attack == "steep")
    # eight evaluations of 10 images: at one budget 2, 3, 4 and 2 s, at the other 2 s each
    assert (steep.models, steep.seconds, steep.ms_per_image) == (8, pytest.approx(19 / 8), pytest.approx(1900 / 8))
    assert (steep.forwards, steep.backwards, steep.shared) == (20.0, 19.0, False)


def test_csv_text_and_json_hold_the_same_numbers_twice(store: Store, tmp_path: Path, bench: Bench) -> None:
    filled(store)
    folder = tmp_path / "tables"
    first = {}
    for _ in range(2):
        write_leaderboard(store, tmp_path / "board.md", folder)
        now = {path.name: path.read_bytes() for path in folder.glob("timing*.csv")}
        assert now == (first or now)
        first = now
    assert sorted(first) == ["timing.csv", "timing_attacks.csv"]
    with (folder / "timing.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["device"], line["method"], line["seconds"], line["shared"]) for line in lines] == [
        ("CPU x", "guard", "36.0", "False"), ("CPU x", "standard", "10.0", "False"),
        ("CPU x", "guard", "50.0", "True"), ("GPU y", "guard", "4.0", "False"),
    ]  # fmt: skip
    shown = bench("timing", "--results-dir", store.root, "--json")
    assert [line["seconds"] for line in json.loads(shown.out)["trainings"]] == [36.0, 10.0, 50.0, 4.0]
    text = bench("timing", "--results-dir", store.root).out
    assert "toy, tiny, 100 training images, GPU y" in text
    assert "guard ‡" in text


def test_an_empty_folder_and_hostile_names(store: Store) -> None:
    assert show([], False) == NO_ROW
    evaluated(store, trained(store, "\x1b[2J"), "steep", [1, 0])
    assert "\x1b" not in show(all_rows(store), False)
    json.loads(show(all_rows(store), True))
