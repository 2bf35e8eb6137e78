"""`bench reproduce`: published numbers beside ours, of models that are brought along and of trainings."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import Bench

from bench.atomic import file_hash
from bench.commands.reproduce import Compared, _plan
from bench.planning import reproductions
from bench.planning.reproductions import Published

ZOO = os.environ.get("BENCH_ZOO")
MODEL = """import torch
from torch import nn


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A linear model of digits that knows what scikit-learn's nearest class means are."""
    torch = pytest.importorskip("torch")
    from sklearn.datasets import load_digits

    digits = load_digits()
    means = torch.stack([torch.tensor(digits.data[digits.target == k] / 16).mean(0) for k in range(10)]).float()
    folder = tmp_path / "zoo"
    folder.mkdir()
    (folder / "linear.py").write_text(MODEL)
    torch.save({"1.weight": 2 * means, "1.bias": -(means**2).sum(1)}, folder / "linear.pt")
    return folder


def write(zoo: Path, published: list[dict[str, Any]], name: str = "linear", **changes: Any) -> Path:
    """A reproduction of that model on 100 images of digits."""
    model = {"file": "linear.py:build", "checkpoint": "linear.pt", "obtain": "a linear net"}
    values: dict[str, Any] = {
        "title": "A linear model",
        "source": "this test",
        "published": published,
        "tolerance": "none",
        "deviations": "none",
        "model": {**model, "sha256": file_hash(zoo / "linear.pt")},
        "spec": {
            "data": {"name": "digits", "test": 100},
            "threat": {"norm": "Linf", "eps": 0.05},
            "attacks": ["clean", "fgsm"],
            "checks": "off",
        },
    }
    path = Path(f"{name}.yaml")
    path.write_text(yaml.safe_dump({**values, **changes}))
    return path


def figure(of: str, **values: float) -> dict[str, Any]:
    return {"of": of, "n": 100, **values}


def test_numbers_are_compared_and_a_second_run_does_nothing(bench: Bench, zoo: Path) -> None:
    path = write(zoo, [figure("clean", value=90, tolerance=100), figure("worst case", at_least=0)])
    first = bench("reproduce", path, "--zoo", zoo, "--json")
    assert first.code == 0
    *_, event = (json.loads(line) for line in first.out.splitlines())
    assert event["event"] == "reproduced"
    clean, worst = event["numbers"]
    assert clean["ours"] > 80  # nearest class means
    assert clean["low"] < clean["ours"] < clean["high"]
    assert worst["ours"] < clean["ours"]
    assert (clean["n"], clean["agrees"], worst["agrees"]) == (100, True, True)

    exact = [figure("clean", value=clean["ours"]), figure("fgsm", value=worst["ours"])]
    again = bench("reproduce", write(zoo, exact), "--zoo", zoo, "-q")
    assert again.code == 0, again.err
    assert "0 jobs run" in again.out
    assert "2 of 2 published numbers reproduced" in again.out

    missed = [figure("clean", value=clean["ours"] + 1, tolerance=0.5), figure("fgsm", at_least=worst["ours"] + 1)]
    outcome = bench("reproduce", write(zoo, missed), "--zoo", zoo, "-q")
    assert outcome.code == 1
    assert "NOT within 0.5" in outcome.out
    assert "DOES NOT HOLD" in outcome.out
    assert "0 of 2 published numbers reproduced" in outcome.out
    assert {path.name for path in Path("results").iterdir() if not path.is_dir()} <= {".gitignore"}


def test_what_was_not_run_is_not_called_a_difference() -> None:
    found = [Compared(Published.model_validate(figure("clean", value=90)), *[math.nan] * 3, 0)]
    found.append(found[0]._replace(published=Published.model_validate(figure("clean", at_least=90))))
    assert [(str(each), each.agrees) for each in found] == [("no number of ours", None)] * 2


def test_mistakes_are_one_line_and_write_nothing(bench: Bench, zoo: Path) -> None:
    path = write(zoo, [figure("clean", value=90)])
    problems = {
        ("reproduce", path): "linear: no folder of models: --zoo or BENCH_ZOO names one with linear.pt and linear.py",
        ("reproduce", path, "--zoo", "."): "linear: no linear.pt in .; a linear net",
        ("reproduce", "wong_mnits"): "no reproduction 'wong_mnits'. Did you mean 'wong_mnist'?",
        ("reproduce", path, "--all"): "--all and the name 'linear.yaml'; give one of them",
        ("reproduce", write(zoo, [figure("pgd", value=1)], "absent"), "--zoo", zoo): (
            "absent: published is 'pgd', which its spec does not compute: worst case, clean, fgsm"
        ),
        ("reproduce", write(zoo, [figure("clean")], "neither")): "'clean' needs either a value or at_least",
        ("reproduce", write(zoo, [figure("clean", value=90)], "odd", needs="tpu")): "odd.yaml.needs: input should be",
    }
    for words, message in problems.items():
        outcome = bench(*words)
        assert outcome.code == 2, words
        (line,) = outcome.err.splitlines()
        assert message in line
    (zoo / "linear.pt").write_bytes(b"other weights")
    outcome = bench("reproduce", path, "--zoo", zoo)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "other weights" in outcome.err
    assert not Path("results").exists()


def test_a_training_is_reproduced_too(bench: Bench, zoo: Path) -> None:
    spec = {
        "data": {"name": "digits", "test": 100},
        "models": ["mlp"],
        "threat": {"eps": 0.05},
        "train": {"epochs": 3},
        "defenses": ["standard"],
        "attacks": ["clean", "fgsm"],
        "checks": "off",
    }
    path = write(zoo, [figure("clean", value=90, tolerance=15)], "trained", model=None, spec=spec)
    outcome = bench("reproduce", path, "-q")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "1 of 1 published number reproduced" in outcome.out


def test_all_that_come_with_the_project_can_be_planned(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCH_DATA", raising=False)
    monkeypatch.delenv("BENCH_ZOO", raising=False)
    for name in reproductions.names():
        _, entry, spec = reproductions.load(name)
        assert entry.published[0].of == "clean"
        if entry.model is None:
            _plan(name, entry, spec, None, None)
        elif ZOO:
            _plan(name, entry, spec, Path(ZOO), None)
    listed = bench("reproduce").out
    assert listed.count("\n") == len(reproductions.names())
    assert "wong_mnist" in listed
    nothing = bench("reproduce", "--all", "--device", "cpu")
    assert nothing.code == 1
    assert nothing.err.endswith("nothing could be compared\n")
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("values", "ours", "holds"),
    [
        ({"value": 98.2, "tolerance": 0.05}, 98.25, True),
        ({"value": 98.2, "tolerance": 0.05}, 98.14, False),
        ({"value": 95.9, "tolerance": 0.2}, 95.7, True),
        ({"at_least": 94.2}, 94.2, True),
        ({"at_least": 94.2}, 94.19, False),
        ({"at_least": 94.2}, 100.0, True),
    ],
)
def test_the_tolerance_is_inclusive(values: dict[str, float], ours: float, holds: bool) -> None:
    assert Published(of="clean", n=10, **values).holds(ours) is holds


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (ZOO and os.environ.get("BENCH_DATA")), reason="needs BENCH_DATA and BENCH_ZOO")
def test_the_published_model_of_wong_and_kolter_is_reproduced(bench: Bench) -> None:
    outcome = bench("reproduce", "wong_mnist", "-q")
    assert outcome.code == 0, outcome.out + outcome.err
    assert "4 of 4 published numbers reproduced" in outcome.out
