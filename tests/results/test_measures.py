"""An evaluation that measures something else than robustness: in a table of its own, and in no accuracy."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from harness import Bench, tiny

from bench.atomic import file_hash
from bench.jobs.evaluation_job import assemble
from bench.planning import catalog
from bench.planning.evaluations import shard_of
from bench.records.record import JobError, Record
from bench.records.store import Store
from bench.results.evaluations import evaluations
from bench.results.rows import rows
from bench.tables.leaderboard import markdown, write_leaderboard
from bench.tables.measures import by_attack, notes
from bench.tables.summary import matrix

pytest.importorskip("torch")
RESULTS = Path("results")
CHEAP = [f"flatness.{s}" for s in ("directions=2", "steps=2", "rel_step_size=0.5", "weight_steps=2")]


@pytest.fixture(scope="module")
def cache() -> dict[str, Path]:
    return {}


@pytest.fixture
def ran(bench: Bench, cache: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two defenses judged by `clean` and `fgsm` and measured by `flatness`, at one of two seeds each; a copy."""
    if "results" not in cache:
        folder = tmp_path_factory.mktemp("measured") / "results"
        words = tiny("--eps", "0.1", "--seeds", "0,1", defense="standard,logit_squeezing", attack="clean,fgsm,flatness")
        sets = [word for setting in CHEAP for word in ("--set", setting)]
        outcome = bench(*words, *sets, "--results-dir", folder, "--executor", "debug")
        assert outcome.code == 0, outcome.err
        assert "standard: flatness (" in outcome.out
        assert "mean adversarial_rise" in outcome.out
        cache["results"] = folder
    shutil.copytree(cache["results"], RESULTS)
    return Store(RESULTS)


def flat_keys(store: Store) -> list[str]:
    return [k for k, j in store.jobs().items() if j.kind == "evaluate" and j.attack.name == "flatness"]


def without_flatness(store: Store) -> Store:
    other = Store(Path("without"))
    shutil.copytree(RESULTS, other.root)
    for key in flat_keys(other):
        shutil.rmtree(other.folder(key))
    return other


def test_rows_and_ranks_are_what_they_are_without_it(ran: Store) -> None:
    plain = without_flatness(ran)
    assert len(flat_keys(ran)) == 4
    assert rows(ran, evaluations(ran).readable) == rows(plain, evaluations(plain).readable)
    assert rows(ran, evaluations(ran).readable)[0].accuracy.worst.values
    assert markdown(ran) == markdown(plain)
    header, lines, said, _ = matrix(ran, list(ran.jobs()))
    assert (header, lines) == matrix(plain, list(plain.jobs()))[:2]
    assert len(said) == len(matrix(plain, list(plain.jobs()))[2]) + 2


def test_its_table_holds_the_mean_of_every_column_and_one_number_stands_beside_the_others(ran: Store) -> None:
    written = {path.name: path for path in write_leaderboard(ran, Path("board.md"), Path("tables"))}
    of_all = {f"{name}.csv" for name in ("evaluations", "leaderboard", "cells", "checks", "timing", "timing_attacks")}
    assert set(written) == {"board.md", "flatness.csv", "leaderboard.tex", "methods.bib", "leaderboard.json", *of_all}
    lines = list(csv.DictReader(written["flatness.csv"].open()))
    assert [(line["defense_label"], line["seed"]) for line in lines] == [
        ("logit_squeezing", "0"), ("logit_squeezing", "1"), ("standard", "0"), ("standard", "1"),
    ]  # fmt: skip
    every = {line["key"]: line for line in csv.DictReader(written["evaluations.csv"].open())}
    for key in flat_keys(ran):
        samples, entry = ran.samples(key), every[key]
        assert "correct" not in samples
        assert samples["adversarial_loss_0.25"].shape == (16, 2)
        (line,) = [x for x in lines if x["defense_label"] == entry["defense_label"] and x["seed"] == entry["seed"]]
        for name, values in samples.items():
            if name not in ("index", "label", "forwards", "backwards"):
                assert float(line[name]) == pytest.approx(values.mean())
        assert entry["measures"] == "adversarial_rise"
        assert float(entry["measured"]) == pytest.approx(samples["adversarial_rise"].mean())
        assert (entry["accuracy"], entry["low"], entry["high"]) == ("", "", "")
    assert {e["measured"] for k, e in every.items() if k not in flat_keys(ran)} == {""}


def test_a_missing_or_failed_measurement_makes_no_row_incomplete(ran: Store) -> None:
    before = rows(ran, evaluations(ran).readable)
    missing, failed, *_ = flat_keys(ran)
    (ran.folder(missing) / "record.json").unlink()
    ran.put(ran.job(failed), Record("error", error=JobError("RuntimeError", "out of memory")))
    found = evaluations(ran)
    assert rows(ran, found.readable) == before
    assert {line["state"] for line in by_attack(ran, found)["flatness"]} == {"done", "missing", "error"}
    said = notes(found)
    assert [line for line in said if line.endswith("error: RuntimeError: out of memory")]
    assert [line for line in said if line.endswith("missing")]


def test_a_record_says_what_it_measures_where_the_plug_in_is_gone(ran: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(kind: str, name: str) -> catalog.Plugin:
        if name == "flatness":
            raise LookupError("no attack 'flatness'")
        return here(kind, name)  # type: ignore[arg-type]

    before, here = rows(ran, evaluations(ran).readable), catalog.get
    monkeypatch.setattr(catalog, "get", gone)
    found = evaluations(ran)
    assert sum(e.measures == "adversarial_rise" for e in found.readable) == 4
    assert rows(ran, found.readable) == before


def test_losses_that_are_not_finite_are_counted(ran: Store) -> None:
    key = flat_keys(ran)[0]
    samples = ran.samples(key)
    samples["adversarial_loss_0.5"][3, 1] = np.inf
    samples["adversarial_rise"][:2] = np.nan
    path = ran.folder(key) / "samples.npz"
    np.savez(path, **samples)
    record = ran.record(key)
    assert record is not None
    ran.put(ran.job(key), replace(record, files={"samples.npz": file_hash(path)}))
    found = evaluations(ran)
    lines = by_attack(ran, found)["flatness"]
    assert [line["adversarial_loss_0.5"] for line in lines if isinstance(line["adversarial_loss_0.5"], str)] == [
        "1 of 32 not finite"
    ]
    assert [line["adversarial_rise"] for line in lines if isinstance(line["adversarial_rise"], str)] == [
        "2 of 16 not finite"
    ]
    assert [line for line in notes(found) if line.endswith("adversarial_rise is not finite")]


def test_a_measurement_in_shards_is_put_together_with_its_name(ran: Store) -> None:
    key = flat_keys(ran)[0]
    whole, samples, record = ran.job(key), ran.samples(key), ran.record(key)
    assert record is not None
    shards = []
    for first, last in ((0, 10), (10, 16)):
        shard = shard_of(whole, first, last)
        ran.add(shard)
        path = ran.folder(shard.key) / "samples.npz"
        np.savez(path, **{name: values[first:last] for name, values in samples.items()})
        ran.put(shard, replace(record, files={"samples.npz": file_hash(path)}))
        shards.append(shard.key)
    columns, images, metrics = assemble(ran, replace(whole, parts=tuple(shards)))
    assert images is None
    assert metrics.metric == "adversarial_rise"
    assert all(np.array_equal(columns[name], values) for name, values in samples.items())
