"""What an output is restricted to: rows keep their numbers and verdicts, others are left out, and the table says so."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from factories import STANDARD, evaluated, trained
from harness import Bench

from bench.records.store import Store
from bench.results.scope import scoped
from bench.soundness.verdicts import judged_rows
from bench.tables.leaderboard import markdown


@pytest.fixture
def matrix(store: Store) -> Store:
    """Three defenses at two budgets on one data set, and one of them on two image folders of the same name."""
    for name in ("standard", "guard", "other_guard"):
        train = trained(store, name)
        evaluated(store, train, "clean", [1] * 10)
        for eps, hits in (("0.1", 8), ("0.2", 6)):
            evaluated(store, train, "autoattack", [1] * hits + [0] * (10 - hits), STANDARD, eps=eps)
    for content in ("aaaaaaaa11", "bbbbbbbb22"):
        train = trained(store, "guard", data={"name": "folder:pets", "content": content})
        evaluated(store, train, "autoattack", [1] * 5 + [0] * 5, STANDARD, eps="0.3")
    return store


def rows_of(store: Store) -> set[tuple[str, str, str]]:
    return {(row.dataset, row.defense, str(row.eps)) for row in judged_rows(store)}


def test_a_scope_leaves_the_numbers_and_verdicts_of_its_rows_alone(matrix: Store) -> None:
    every = {(row.config, row.eps): row for row in judged_rows(matrix)}
    assert len(every) == 8
    for given, count in (
        ({"eps": ["2/10"]}, 3),
        ({"eps": ["0.1", "0.2"], "defenses": ["guard"]}, 4),  # and standard
        ({"dataset": "toy"}, 6),
        ({"dataset": "folder:pets aaaaaaaa"}, 1),
        ({"keys": matrix.keys()}, 8),
        ({"keys": []}, 0),
    ):
        found = judged_rows(scoped(matrix, **given))  # type: ignore[arg-type]
        assert len(found) == count
        for row in found:
            same = every[row.config, row.eps]
            assert (row.accuracy, row.cost, row.verdict, row.findings) == (
                same.accuracy, same.cost, same.verdict, same.findings
            )  # fmt: skip


@pytest.mark.parametrize("command", ["leaderboard", "report", "timing", "status"])
def test_every_output_takes_a_scope(matrix: Store, bench: Bench, tmp_path: Path, command: str) -> None:
    where = ["--results-dir", str(matrix.root)]
    output = ["--output", str(tmp_path / "out")] if command in ("leaderboard", "report") else []
    images = ["--no-images"] if command == "report" else []
    done = bench(command, "--dataset", "toy", "--eps", "0.1", "--defense", "guard", *where, *output, *images)
    assert (done.code, done.err) == (0, "")
    text = (tmp_path / "out").read_text() if output else done.out
    assert "pets" not in text
    assert "other_guard" not in text.replace("\\", "")
    if output:
        assert "nly data set toy; eps 0.1; defenses guard, standard." in text
    wrong = bench(command, "--dataset", "toys", *where, *output, *images)
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "no record has data set toys. Did you mean 'toy'?" in wrong.err


def test_tables_of_a_scope_hold_its_lines_only(matrix: Store, bench: Bench, tmp_path: Path) -> None:
    whole = bench("leaderboard", "--results-dir", matrix.root, "--output", tmp_path / "board.md").out.splitlines()
    before = [Path(path).read_bytes() for path in whole]
    bench("leaderboard", "--eps", "0.2", "--results-dir", matrix.root)
    assert [Path(path).read_bytes() for path in whole] == before
    assert "\nOnly eps 0.2.\n" in (matrix.root / "tables" / "scope" / "leaderboard.md").read_text()
    for name, count in (("leaderboard", 3), ("evaluations", 6)):
        with (matrix.root / "tables" / "scope" / f"{name}.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert ({line["eps"] for line in lines} - {""}, len(lines)) == ({"0.2"}, count)


def test_an_ambiguous_data_set_is_answered_with_the_full_names(matrix: Store, bench: Bench) -> None:
    names = "'folder:pets aaaaaaaa', 'folder:pets bbbbbbbb'"
    for words in (("timing",), ("compare", "guard", "standard"), ("sweep", "guard", "train_eps")):
        done = bench(*words, "--dataset", "folder:pets", "--results-dir", matrix.root)
        assert (done.code, done.err) == (2, f"error: data set folder:pets is ambiguous; give one of {names}\n")
    assert rows_of(scoped(matrix, dataset="folder:pets bbbbbbbb")) == {("folder:pets", "guard", "0.3")}


def test_what_is_not_there_is_answered_in_one_line(matrix: Store, bench: Bench) -> None:
    for words, said in (
        (("--eps", "0.7"), "no record has eps 0.7. There are: 0.1, 0.2, 0.3"),
        (("--eps", "x"), "error: 'x' is not a number; expected one such as 8/255"),
        (("--defense", "gard"), "no record has defense gard. Did you mean 'guard'? There are: guard, other_guard"),
        (("nothing.yaml",), "no spec file nothing.yaml"),
    ):
        done = bench("leaderboard", *words, "--results-dir", matrix.root)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert said in done.err


def test_a_spec_is_a_scope(matrix: Store, bench: Bench, tmp_path: Path) -> None:
    spec = tmp_path / "mine.yaml"
    spec.write_text("threat: {eps: 0.1}\nmodels: [mlp]\ndefenses: [standard]\nattacks: [clean]\nchecks: off\n")
    done = bench("leaderboard", spec, "--results-dir", matrix.root, "--output", tmp_path / "board.md")
    assert (done.code, done.err) == (0, "")
    assert "Only spec mine." in (tmp_path / "board.md").read_text()
    assert "No evaluations yet." in (tmp_path / "board.md").read_text()
    assert "Only" not in markdown(matrix)
