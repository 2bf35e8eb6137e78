"""What the doctor says of models as users write them, against what their evaluation meets."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import nets
import pytest
import torch
from harness import Bench
from torch import Tensor

from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.data.datasets import Facts
from bench.doctor.diagnosis import examine
from bench.jobs import user_model
from bench.jobs.isolated_model import IsolatedModel
from bench.planning.job import ImportJob
from bench.planning.typed import ModelOptions
from bench.planning.user_models import MODEL_FILE, import_job
from bench.soundness.audit_model import audit
from bench.soundness.catalog import CHECKS

FILE = Path(__file__).parent.parent / "foreign_models.py"


class Case(NamedTuple):
    """The lines of the doctor that are not OK, and what an evaluation meets: the codes of severe findings and of
    checks that cannot be made, or the words of its refusal."""

    doctor: dict[str, str] = {}
    eval: set[str] | str = set()
    classes: int = 10
    channels: int = 1
    randomized: bool = False


UNTRAINED = {"predictions": "WARN", "accuracy": "FAIL"}
TORCHSCRIPT = Case({"eval mode": "WARN"}, {"C6", "C19"})
OPTIMIZES = Case({"test-time optimization": "WARN"}, {"C6"})
CASES = {
    "keeps": Case(),
    "reseeds": Case(),
    "in_place": Case(),
    "two": Case(classes=2),
    "three": Case(classes=3),
    "compiled": Case(),
    "scripted": TORCHSCRIPT,
    "traced": TORCHSCRIPT,
    "OwnGenerator": Case({"batch": "WARN"}, randomized=True),
    "half": Case({"gradient": "WARN"}),
    "half_up": Case({"gradient": "WARN"}),
    "sigmoid": Case({"logits": "WARN"}),
    "relu_first": Case({"gradient": "WARN"}, {"C19"}),
    "slope_of_nan": Case({"gradient": "FAIL"}, {"C3", "C4", "C9"}),
    "purifies": OPTIMIZES,
    "adapts": OPTIMIZES,
    "one_by_one": Case(),
    "iterates": OPTIMIZES,
    "swapped_2": Case({"class order": "FAIL"}, {"C18"}, classes=2),
    "dark_2": Case({"predictions": "WARN", "input": "FAIL"}, {"C9", "C18"}, classes=2),
    "offset_2": Case({"predictions": "WARN", "input": "FAIL"}, {"C18"}, classes=2),
    "Tutorial": Case(UNTRAINED, classes=5, channels=3),
    "Raw": Case(UNTRAINED, classes=5, channels=3),
    "drawn_when_built": Case({"loading": "FAIL"}, "is another model each time it is built"),
    "exported": Case({"loading": "FAIL"}, "cannot be put in eval mode (NotImplementedError"),
    "quantized": Case({"loading": "FAIL", "gradient": "FAIL"}, "keeps something other than a tensor in its state"),
}


def posed(name: str) -> tuple[ImportJob, Facts, Tensor, Tensor]:
    """The import of a model, and the digits of its classes, with three channels where it takes so many."""
    case = CASES[name]
    _, _, x, y = nets.digits()
    facts = replace(nets.FACTS, classes=case.classes, channels=case.channels)
    facts = replace(facts, mean=facts.mean * case.channels, std=facts.std * case.channels)
    x = torch.cat([x, x.flip(2), 1 - x][: case.channels], 1)
    job, _ = import_job(ModelOptions(f"{FILE}:{name}", randomised=case.randomized), facts)
    return job, facts, x[y < case.classes], y[y < case.classes]


def built(job: ImportJob, facts: Facts) -> IsolatedModel:
    return user_model.deployed(job, user_model.loaded(job, facts, None, "it"), torch.device("cpu"))


def not_ok(name: str) -> dict[str, str]:
    job, facts, x, y = posed(name)
    try:
        model = built(job, facts)
    except ValueError:
        return {"loading": "FAIL"}
    unrepeatable = user_model.not_repeatable(job, facts, None, model, name)
    found = {line.check: line.state for line in examine(model, x, y, facts, job.randomized) if line.state != "OK"}
    return {**({"loading": "FAIL"} if unrepeatable else {}), **found}


@pytest.fixture(autouse=True)
def _no_model_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODEL_FILE, "")  # put back afterwards


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_the_doctor_has_a_line_for_all_that_an_evaluation_fails_on(name: str) -> None:
    case = CASES[name]
    assert not_ok(name) == case.doctor
    assert case.doctor or not case.eval
    job, facts, _, _ = posed(name)
    if isinstance(case.eval, str):
        with pytest.raises(ValueError, match=re.escape(case.eval)):
            user_model.check(job, facts, None)
    else:
        note = user_model.check(job, facts, None)
        assert ("writes into its input" in note) == (name == "in_place")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not isinstance(case.eval, str)])
def test_an_audit_finds_of_each_model_what_the_table_says(name: str) -> None:
    job, facts, x, y = posed(name)
    budget = [Threat("Linf", Epsilon("0.1"))]
    found, _ = audit(
        built(job, facts), x[:40], y[:40], budget, "quick", seed=0, claimed=None, report=lambda *progress: None
    )
    severe = {f.code for f in found if f.level in ("U", "X")}
    open_ = {f.code for f in found if f.level == "not checked" and CHECKS[f.code].worst in ("U", "X")}
    assert severe | open_ == CASES[name].eval, found


@pytest.mark.slow
def test_models_that_agree_but_for_an_oddity_get_the_same_numbers() -> None:
    budget, columns = [Threat("Linf", Epsilon("0.1"))], []
    for name in ("keeps", "reseeds", "half", "half_up"):
        job, facts, x, y = posed(name)
        _, found = audit(built(job, facts), x, y, budget, "quick", seed=0, claimed=None, report=lambda *progress: None)
        columns.append({attack: correct.tolist() for attack, correct in found.items()})
    assert columns[0] == columns[1]
    assert columns[2] == columns[3]


def test_a_model_that_cannot_be_loaded_again_is_a_line_of_the_doctor(bench: Bench) -> None:
    outcome = bench("doctor", f"{FILE}:drawn_when_built", "--json")
    loading = json.loads(outcome.out.splitlines()[0])
    assert (outcome.code, loading["state"]) == (4, "FAIL")
    assert loading["value"] == "foreign_models.py:drawn_when_built is another model each time it is built"
    assert loading["todo"] == "let it set a seed, or keep its draws in its weights"
