"""Time of jobs without past records: the arithmetic of declared costs, the cache of pass times, and the labels."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_jobs import measured
from harness import Bench, tiny, write_plugins

from bench.atomic import write_json
from bench.data import folders
from bench.executors.devices import Slot
from bench.planning import catalog
from bench.planning.job import Job
from bench.planning.options import to_spec
from bench.planning.plan import plan
from bench.planning.typed import Options
from bench.progress.cost_model import SPREAD, START, CostModel, PassTime, declared
from bench.progress.forecast import equal_n, time
from bench.progress.live import View
from bench.progress.status import survey
from bench.records.leases import claim
from bench.records.runtime_estimate import Estimator, clock
from bench.records.store import Store

ROOT = Path("no-data-here")
TIMES = PassTime(call=0.5, image=0.001, update=0.25)
pytestmark = pytest.mark.usefixtures("fresh_catalog")


def jobs_of(**given: Any) -> list[Job]:
    """A plan on digits, whose model is the mlp."""
    defaults = {"dataset": "digits", "n": 64, "baseline": False, "checks": "off", "model": ["mlp"]}
    return plan(to_spec(Options(**{**defaults, **given}), ROOT)[0], ROOT)


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache holds TIMES for the mlp on digits, under the key that this machine asks for."""
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    job = jobs_of(defense=["standard"], attack=["clean"])[0]
    model = CostModel(ROOT, Slot("cpu"), measure=False)
    assert model(job, job) is None  # not in the cache, and not to be measured
    (key,) = model._times
    file = folders.cache() / "forward_pass.json"
    file.parent.mkdir()
    file.write_text(json.dumps({key: TIMES._asdict()}))
    return file


@pytest.mark.parametrize(
    ("kind", "name", "settings", "passes"),
    [
        ("defenses", "standard", {}, (3, 3)),
        ("defenses", "pgd_at", {"steps": 7}, (17, 17)),
        ("defenses", "lsa", {}, (13, 13)),  # (K + 3) F
        ("defenses", "smoothadv", {}, (14, 14)),
        ("attacks", "pgd", {"steps": 5, "restarts": 2}, (22, 22)),
        ("attacks", "curve", {"budgets": ["0.1", "0.2"]}, (164, 164)),  # the length of a list of budgets
        ("attacks", "eot", {}, (5 * 42, 53 * 42)),  # the sum of a list of draws, and the passes of the base attack
        ("attacks", "square", {}, (100, 5000)),
        ("attacks", "corruption", {"types": ["fog", "snow"], "severities": [2, 4, 5]}, (7, 7)),  # lengths, no sums
    ],
)
def test_a_declared_cost_is_evaluated_at_the_settings(
    kind: catalog.Kind, name: str, settings: dict[str, Any], passes: tuple[float, float]
) -> None:
    assert declared(catalog.get(kind, name), settings, 10) == passes


def test_a_prediction_of_a_stochastic_model_costs_all_its_draws(cached: Path) -> None:
    given = {"attack": ["corruption"], "set": ["corruption.severities=[5]"]}
    model = CostModel(ROOT, Slot("cpu"))
    for defense, draws in (("standard", 1), ("pni", 1), ("rse", 10), ("smoothing", 100)):
        trained, job = jobs_of(defense=[defense], **given)
        found = model(job, trained)
        assert found is not None
        assert found.seconds == pytest.approx(START + 16 * draws * (0.5 + 0.001 * 64))


def test_every_plug_in_declares_a_cost_that_can_be_read() -> None:
    kinds: tuple[catalog.Kind, ...] = ("defenses", "attacks")
    found = {name: declared(catalog.get(kind, name), {}, 10) for kind in kinds for name in catalog.names(kind)}
    assert [name for name, passes in found.items() if passes is None or not 0 <= passes[0] <= passes[1]] == []


@pytest.mark.parametrize("formula", ["(2 steps", "2 steps)", "2 * steps F", "unknown F", "+", ""])
def test_a_formula_that_cannot_be_read_counts_as_its_example(formula: str) -> None:
    plugin = catalog.get("defenses", "pgd_at")
    asked = catalog.Plugin(**{**vars(plugin), "constants": {"cost": f"{formula} = 23F"}})
    assert declared(asked, {}, 10) == (23, 23)
    assert declared(catalog.Plugin(**{**vars(plugin), "constants": {"cost": formula}}), {}, 10) is None


def test_a_training_takes_its_steps_and_an_evaluation_its_images(cached: Path) -> None:
    given = {"defense": ["pgd_at"], "attack": ["pgd", "square"], "epochs": 2, "train_n": 640, "set": ["pgd_at.steps=7"]}
    trained, pgd, square = jobs_of(**given)
    model = CostModel(ROOT, Slot("cpu"))
    step = 0.25 + 17 * (0.5 + 0.001 * 64)
    train = START + 20 * step
    attack = START + 42 * (0.5 + 0.001 * 64)
    few, many = (count * (0.5 + 0.001 * 64) for count in (100, 5000))
    for job, expected in (
        (trained, (train, train / SPREAD, train * SPREAD)),
        (pgd, (attack, attack / SPREAD, attack * SPREAD)),
        (square, (START + math.sqrt(few * many), (START + few) / SPREAD, (START + many) * SPREAD)),
    ):
        found = model(job, trained)
        assert found is not None
        assert (found.seconds, found.low, found.high) == pytest.approx(expected)
        assert (found.likeness, found.records) == ((), 0)
    assert not model.problems


def test_the_plan_says_what_equal_numbers_of_images_would_cost(cached: Path, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(
        "data: {name: digits, test: 300}\nmodels: [mlp]\nthreat: {eps: 0.1}\ndefenses: [standard]\nchecks: off\n"
        "attacks: [clean, {name: pgd, n: 100, set: {steps: 5}}, {name: flatness, n: 50}]\n"
    )
    store = Store(tmp_path / "results")
    estimator = Estimator(store, None, CostModel(ROOT, Slot("cpu")))
    spec, root, _ = to_spec(Options(spec=tmp_path / "spec.yaml"), ROOT)
    jobs = plan(spec, root)
    estimator.know(jobs)
    (_, pgd, _) = (job for job in jobs if job.kind == "evaluate")
    more = estimator.seconds(replace(pgd, n=300)) - estimator.seconds(pgd)  # type: ignore[arg-type, call-arg, operator]
    assert equal_n(jobs, estimator, 2) == [
        "warning   attacks get different numbers of images (pgd 100, others 300); the worst case is over the fewest. "
        f"300 for all would take about {clock(more / 2)} more: leave n out of these attacks"
    ]
    assert equal_n([job for job in jobs if job is not pgd], estimator, 2) == []
    assert "would take an unknown time:" in equal_n(jobs, Estimator(store), 2)[0]


def test_a_pass_is_measured_once_and_found_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bench: Bench
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    words = ("plan", "--defense", "pgd_at", "--attack", "clean,pgd", "--device", "cpu", "--workers", 2)
    first = bench(*words)
    assert (first.code, first.err) == (0, "")
    assert first.out.splitlines()[-2].endswith(" on 2 slots, estimated from the cost model")
    assert first.out.splitlines()[-1].startswith("cost      about 0.0")
    (stored,) = json.loads((tmp_path / "cache" / "forward_pass.json").read_text()).values()
    assert stored.keys() == {"call", "image", "update"}
    assert all(value >= 0 for value in stored.values())
    file = tmp_path / "cache" / "forward_pass.json"
    slow = {key: dict.fromkeys(times, 1000.0) for key, times in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(slow))
    assert " h " in bench(*words).out.splitlines()[-2]  # as the cache now says; nothing was measured again
    assert json.loads(file.read_text()) == slow
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_the_net_of_a_users_file_is_timed_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bench: Bench) -> None:
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path / "cache"))
    net = "nn.Sequential(nn.Flatten(), nn.Linear(64, 10))"
    Path("my.py").write_text(f"from torch import nn\n\ndef build():\n    return {net}\n")
    done = bench("eval", "my.py:build", "--attack", "clean,pgd", "--checks", "off", "--device", "cpu", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert "estimated from the cost model" in done.out
    assert "past record" not in done.out


def test_records_are_used_before_the_cost_model_and_both_are_named(cached: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    store.prepare()
    past, *_ = jobs_of(defense=["pgd_at"], attack=["clean"], seeds=["5"])
    measured(store, past, 100.0)
    jobs = jobs_of(defense=["pgd_at", "standard"], attack=["clean"])
    estimator = Estimator(store, None, CostModel(ROOT, Slot("cpu")))
    estimator.know(jobs)
    line = time(jobs, store, estimator, 1)[0][0]
    assert line.endswith(" on 1 slot, estimated from 1 past record and the cost model (3 jobs)")
    assert estimator.seconds(jobs[0]) == pytest.approx(100.0)


def test_status_and_the_live_view_give_the_same_estimate(cached: Path, tmp_path: Path) -> None:
    from rich.console import Console

    store = Store(tmp_path / "results")
    store.prepare()
    jobs = jobs_of(defense=["standard"], attack=["clean", "pgd"])
    for job in jobs:
        store.add(job)
    assert claim(store, jobs[0].key) is not None
    write_json(store.folder(jobs[0].key) / "progress.json", {"share": 0.0, "device": "cpu"})
    view = View(Console(), store, jobs, "quiet", 1, "cpu")
    view.estimate(CostModel(ROOT, Slot("cpu")))
    found = survey(store, store.jobs(), store.jobs(), ROOT)
    assert found["jobs_of_unknown_length"] == 0
    assert found["time_left"].replace(" on 1 slot", "") == view._left()
    assert "estimated from the cost model" in view._left()


def test_a_plug_in_without_a_cost_is_of_unknown_length(bench: Bench, tmp_path: Path) -> None:
    out = bench(*tiny(*write_plugins(tmp_path), "--dry-run")).out
    assert "time      unknown: 3 jobs with neither a past record nor a declared cost" not in out
    assert "; plus 2 jobs with neither a past record nor a declared cost" in out  # clean declares its cost


def test_a_net_that_cannot_be_timed_is_named_with_the_reason(tmp_path: Path) -> None:
    job = jobs_of(defense=["standard"], attack=["clean"])[0]
    broken = replace(job, model=replace(job.model, settings={"width": -1}))
    model = CostModel(ROOT, Slot("cpu"))
    assert model(broken, broken) is None
    assert len(model.problems) == 1
    assert model.problems[0].startswith("the model could not be timed: ")


def test_finished_jobs_on_the_same_architecture_scale_the_cost_model(cached: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "results")
    done, clean, left = jobs_of(defense=["standard", "trades"], attack=["clean"])[:3]
    assert (done.kind, clean.kind, left.kind) == ("train", "evaluate", "train")
    model = CostModel(ROOT, Slot("cpu"), measure=False)
    alone, other = model(done, done), model(left, left)
    assert alone is not None
    assert other is not None
    store.prepare()
    assert Estimator(store, cost_model=model).estimate(left) == other
    measured(store, done, 3 * alone.seconds)
    estimator = Estimator(store, cost_model=model)
    found = estimator.estimate(left)
    assert found is not None
    assert (found.seconds, found.low, found.high) == pytest.approx([3 * value for value in other[:3]])
    measured(store, left, 9 * other.seconds)
    record = store.record(left.key)
    assert record is not None
    estimator.learn(left, record)
    again = jobs_of(defense=["pgd_at"], attack=["clean"])[0]
    third, scaled = model(again, again), estimator.estimate(again)
    assert third is not None
    assert scaled is not None
    ratio = (3 * alone.seconds + 9 * other.seconds) / (alone.seconds + other.seconds)
    assert scaled.seconds == pytest.approx(ratio * third.seconds)
    estimator.know([clean])
    assert estimator.estimate(clean) == model(clean, done)  # an evaluation takes no hint from a training
