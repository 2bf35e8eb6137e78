"""`bench sweep DEFENSE --optuna N`: trials on the embedded digits, their front, a repeated command, mistakes."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import Bench, written

from bench.planning.job import EvaluateJob, TrainJob
from bench.records.store import Store
from bench.tables.pareto import pareto

SMALL = ("--attack", "clean,fgsm", "--model", "mlp", "--epochs", 2, "--train-n", 400, "--device", "cpu", "--workers", 2)
SPACE = ("--search", "sigma=0.05:1.5:log", "--search", "target")
# what a setting decides: a good training, one that preflight refuses, one that breaks, one that learns nothing
MOODY = '''"""min CE

Nobody (2024).
"""
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
import torch.nn.functional as F
from torch import nn
from bench.core.defense import Batch, Defense, Losses

@dataclass
class Moody(Defense):
    uses_threat: ClassVar[bool] = False
    mood: Literal["refuses", "breaks", "sleeps", "works"] = "refuses"
    other: bool = False
    def __post_init__(self) -> None:
        if self.mood == "refuses":
            raise ValueError("not in the mood")
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        if self.mood == "breaks" and len(batch.x) > 2:  # the trial step before a run has two images
            raise RuntimeError("broken on purpose")
        return {"ce": F.cross_entropy(net(batch.x), batch.y) * (0.0 if self.mood == "sleeps" else 1.0)}
'''


@pytest.fixture(autouse=True)
def _needed() -> None:
    pytest.importorskip("torch")


def found(out: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(out)
    return told


def test_a_search_shows_the_front_and_goes_on_after_a_kill(bench: Bench) -> None:
    pytest.importorskip("optuna")
    words = ("sweep", "noisy", "--optuna", 3, *SPACE, *SMALL)
    first = bench(*words)
    assert (first.code, first.err) == (0, "")
    assert "search    noisy: sigma from 0.05 to 1.5 (log); target one of logits, softmax; 3 trials" in first.out
    assert "chosen    validation 80 of 400 training images, held out (--validation to change)" in first.out
    assert "on 80 validation images, by which these settings were chosen: nothing here is a test result" in first.out
    store, before = Store(Path("results")), written(Path("results"))
    jobs = store.jobs().values()
    assert {job.split for job in jobs if isinstance(job, EvaluateJob)} == {"validation"}
    trained = {job.key: job.defense.settings for job in jobs if isinstance(job, TrainJob)}
    assert len(trained) == 3

    told = found(bench(*words, "--json").out)
    assert written(Path("results")) == before  # every trial has a record: nothing is trained or attacked
    assert told["trials"][0]["settings"] == {"sigma": 0.6, "target": "logits"}  # the defaults
    for trial in told["trials"]:
        assert {name: trained[trial["train_key"]][name] for name in ("sigma", "target")} == trial["settings"]
        assert 0.05 <= trial["settings"]["sigma"] <= 1.5
        assert f"{trial['settings']['sigma']:.4g}" == str(trial["settings"]["sigma"])
        assert 0 <= trial["low"] <= trial["robust"] <= trial["high"] <= 1
        assert trial["robust"] <= trial["clean"]
    points = [(trial["clean"], trial["robust"]) for trial in told["trials"]]
    front = [told["trials"][k]["trial"] for k in pareto(points)]
    assert sorted(told["front"]) == front
    worst = [told["trials"][number - 1]["robust"] for number in told["front"]]
    assert worst == sorted(worst, reverse=True)
    assert (told["split"], told["validation"], told["dataset"], told["eps"]) == ("validation", 80, "digits", "0.1")

    lost = told["trials"][1]["train_key"]
    for key, job in store.jobs().items():  # as if the machine had died before the second training ended
        if lost in (key, *job.needs):
            (store.folder(key) / "record.json").unlink()
    rest = written(Path("results"))
    assert found(bench(*words, "--json").out) == told  # the same points
    again = written(Path("results"))
    assert again.keys() == before.keys()
    assert {key: again[key] for key in rest} == rest

    more = found(bench("sweep", "noisy", "--optuna", 4, *SPACE, *SMALL, "--json").out)  # goes on behind the three
    assert more["trials"][:3] == told["trials"]
    assert len(more["trials"]) == 4
    after = written(Path("results"))
    assert {key: after[key] for key in again} == again

    command = shlex.split(told["next"])
    assert command[:2] == ["bench", "run"]
    best = told["trials"][told["front"][0] - 1]
    quick = ("--no-baseline", "--checks", "off", "--n", 50, "--device", "cpu", "-q")
    done = bench(*command[1:], *quick)
    assert done.code == 0, done.err
    tested = {key: job for key, job in Store(Path("results")).jobs().items() if key not in after}
    assert all(isinstance(job, EvaluateJob) and job.split == "test" for job in tested.values())
    assert {job.model_key for job in tested.values()} == {
        best["train_key"]
    }  # the training of the trial, not trained again


MOODS = {
    "refuses": "not in the mood",
    "breaks": "train error: RuntimeError: broken on purpose",
    "sleeps": "DID NOT LEARN: clean ",
}


def test_trials_that_fail_are_named_and_the_search_goes_on(bench: Bench) -> None:
    pytest.importorskip("optuna")
    Path("moody.py").write_text(MOODY)
    words = ("sweep", "moody", "--plugin", "moody.py", *SMALL, "--optuna")
    outcome = bench(*words, 6, "--search", "mood", "--json")
    told = found(outcome.out)
    assert outcome.code == 0
    moods = [trial["settings"]["mood"] for trial in told["trials"]]
    assert moods[0] == "refuses"  # the default
    assert "works" in moods[1:]
    for trial in told["trials"]:
        wrong = MOODS.get(trial["settings"]["mood"], "")
        assert (trial["state"], trial["clean"] is None) == (("failed", True) if wrong else ("done", False))
        assert (trial["reason"] or "").startswith(wrong)
    assert [moods[number - 1] for number in told["front"]] == ["works"]  # once: equal points are one training
    assert "moody.py" in shlex.split(told["next"])


@pytest.mark.parametrize("mood", MOODS)
def test_a_search_without_a_result(bench: Bench, mood: str) -> None:
    pytest.importorskip("optuna")
    Path("moody.py").write_text(MOODY)
    words = ("sweep", "moody", "--plugin", "moody.py", *SMALL, "--set", f"moody.mood={mood}", "--search", "other")
    outcome = bench(*words, "--optuna", 1, "-q")
    assert (outcome.code, outcome.err) == (1, "")
    assert f"trial 1   failed: {MOODS[mood]}" in outcome.out
    assert "moody: 0 trials on the front of clean against worst case, 0 behind it, 1 failed (1)" in outcome.out
    assert "bench run" not in outcome.out


def test_a_search_whose_first_trials_fail_alike_ends(bench: Bench) -> None:
    pytest.importorskip("optuna")
    Path("moody.py").write_text(MOODY)
    words = ("sweep", "moody", "--plugin", "moody.py", *SMALL, "--set", "moody.mood=refuses", "--search", "other")
    outcome = bench(*words, "--optuna", 9, "-q")
    assert (outcome.code, outcome.err) == (1, "error: the first 4 trials failed alike, so no more are made\n")
    assert "trial 4   failed: " in outcome.out
    assert "trial 5 " not in outcome.out


TWO = ("--optuna", 2, "--search")
MISTAKES: list[tuple[tuple[object, ...], str]] = [
    (("noisy",), "name a setting of noisy to show, or search some with --optuna N"),
    (("noisy", "sigma", "--optuna", 2), "the setting 'sigma' and --optuna; a search takes its settings from --search"),
    (("noisy", *TWO, "target", "--against", "rat"), "--against and --optuna"),
    (("noisy", "sigma", "--epochs", 2), "--epochs needs --optuna N; without it only past runs are shown"),
    (("noisy", "sigma", "--workers", 2), "--workers needs --optuna N"),
    (("noisy", "sigma", "--search", "target"), "--search needs --optuna N"),
    (("noisy", *TWO[:2]), "--optuna needs --search, such as NAME=LOW:HIGH; settings of noisy: sigma (above 0)"),
    (("noisy", *TWO, "sigma=0:1"), "low is 0, but noisy declares sigma above 0"),
    (("nosy", *TWO, "sigma=0:1"), "no defense 'nosy'. Did you mean 'noisy'?"),
    (("noisy", *TWO, "target", "--set", "noisy.target=logits"), "target is in --set and in --search"),
    (("noisy", *TWO, "target", "--attack", "clean"), "the attacks are clean; expected clean and at"),
    (("noisy", *TWO, "target", "--eps", "0.1,0.2"), "under eps 0.1, 0.2, keep last; expected one"),
    (("noisy", *TWO, "target", "--model", "mlp,lenet5"), "would be 2 trainings under eps"),
    (("noisy", *TWO, "target", "--seeds", "0,1"), "data.split is validation, whose images depend"),
    (("noisy", *TWO, "target", "--validation", 9000), "expected less than the 1437 training images"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_cost_a_line_and_nothing_is_written(bench: Bench, words: tuple[object, ...], message: str) -> None:
    if "--optuna" in words:
        pytest.importorskip("optuna")
    outcome = bench("sweep", *words)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(Path().iterdir())


def test_without_optuna_one_line_says_how_to_install_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    outcome = bench("sweep", "noisy", *TWO, "target")
    assert outcome.code == 3
    assert outcome.err.startswith("error: --optuna needs the package optuna, which does not import")
    assert outcome.err.endswith('install it with: pip install "defense-bench[sweep]"\n')
    assert not list(Path().iterdir())


def test_data_that_cannot_be_had_ends_a_search_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of a trial, and is tried once."""
    pytest.importorskip("optuna")
    Path("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("file").absolute()))
    monkeypatch.delenv("BENCH_DATA", raising=False)
    words = ("--attack", "clean,fgsm", "--model", "mlp", "--dataset", "fashion_mnist", "--workers", 1)
    outcome = bench("sweep", "noisy", "--optuna", 3, *SPACE, *words)
    assert (outcome.code, "trial 1" in outcome.out) == (2, False)
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: no fashion_mnist in ")
    assert not Store(Path("results")).jobs()
