"""Equal content, equal key; what changes a result changes the key, and nothing else does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paths
import pytest
import yaml
from factories import toy_job
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.planning import catalog, trainings
from bench.planning import evaluations as evaluation_planner
from bench.planning import job as job_module
from bench.planning.job import AuditJob, EvaluateJob, Job, TrainJob
from bench.planning.job_json import from_json, job_of
from bench.planning.plan import plan
from bench.planning.schema import NewerSchemaError
from bench.planning.spec import build, load
from bench.records.packs import JOB, Packs

ROOT = Path("no-data-here")
pytestmark = pytest.mark.usefixtures("fresh_catalog")

BASE: dict[str, Any] = {
    "data": {"name": "digits", "test": 100},
    "models": ["mlp"],
    "seeds": [0, 1],
    "threat": {"norm": "Linf", "eps": ["8/255", "2/255"]},
    "train": {"epochs": 3},
    "defenses": ["standard", {"name": "trades", "grid": {"beta": [1, 6]}}, "smoothing"],
    "attacks": ["clean", "fgsm", {"name": "pgd", "set": {"steps": 5}}, "certify"],
    "checks": "off",
}


def jobs(values: dict[str, Any]) -> list[Job]:
    """The jobs of a spec given as plain values."""
    return plan(build(copy.deepcopy(values)), ROOT)


def keys(values: dict[str, Any]) -> list[str]:
    return [job.key for job in jobs(values)]


def one(**changed: Any) -> dict[str, Any]:
    """One defense, one attack, one seed."""
    return {
        **BASE,
        "seeds": [0],
        "threat": {"norm": "Linf", "eps": "8/255"},
        "defenses": ["trades"],
        "attacks": ["fgsm"],
        **changed,
    }


def trains(values: dict[str, Any]) -> list[Job]:
    return [job for job in jobs(values) if job.kind == "train"]


def evaluations(values: dict[str, Any]) -> list[Job]:
    return [job for job in jobs(values) if job.kind == "evaluate"]


def test_the_order_of_keys_in_the_file_does_not_matter(tmp_path: Path) -> None:
    def backwards(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: backwards(value[name]) for name in reversed(value)}
        return [backwards(item) for item in value] if isinstance(value, list) else value

    for name, values in (("a", BASE), ("b", backwards(BASE))):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    texts = [(tmp_path / f"{name}.yaml").read_text() for name in "ab"]
    assert texts[0] != texts[1]
    found = [[job.key for job in plan(load(tmp_path / f"{name}.yaml"), ROOT)] for name in "ab"]
    assert sorted(found[0]) == sorted(found[1])


def test_8_255_and_its_float_have_one_key() -> None:
    def under(eps: Any) -> list[str]:
        return keys(one(threat={"norm": "Linf", "eps": eps}))

    assert under("8/255") == under(0.03137254901960784) == under(" 16/510 ")
    assert set(under("8/255")).isdisjoint(under("0.031"))


def test_writing_out_a_default_changes_no_key() -> None:
    beta = catalog.get("defenses", "trades").resolve({})["beta"]
    assert keys(one()) == keys(one(defenses=[{"name": "trades", "set": {"beta": str(beta)}}]))
    assert keys(one()) == keys(one(data={"name": "digits", "test": 100, "train": 1437}))
    assert keys(one()) == keys(one(train={"epochs": 3, "optimizer": "adam", "lr": 2e-3}))


CHANGES: dict[str, dict[str, Any]] = {
    "data set": {"data": {"name": "mnist", "test": 100}, "train": {"epochs": 3, "batch_size": 64, "lr": 2e-3}},
    "training images": {"data": {"name": "digits", "test": 100, "train": 1000}},
    "validation images": {"data": {"name": "digits", "test": 100, "validation": 10}},
    "architecture": {"models": ["small_cnn"]},
    "seed": {"seeds": [1]},
    "norm": {"threat": {"norm": "L2", "eps": "8/255"}},
    "eps": {"threat": {"norm": "Linf", "eps": "4/255"}},
    "train_eps": {"threat": {"norm": "Linf", "eps": "8/255", "train_eps": "4/255"}},
    "recipe": {"recipe": "paper"},
    "epochs": {"train": {"epochs": 4}},
    "learning rate": {"train": {"epochs": 3, "lr": 0.01}},
    "eps_warmup": {"train": {"epochs": 3, "eps_warmup": 0.5}},
    "augmentation": {"train": {"epochs": 3, "augment": True}},
    "defense": {"defenses": ["pgd_at"]},
    "setting of the defense": {"defenses": [{"name": "trades", "set": {"beta": 1}}]},
}
OF_THE_EVALUATION: dict[str, dict[str, Any]] = {
    "attack": {"attacks": ["pgd"]},
    "test images": {"data": {"name": "digits", "test": 99}},
    "n of the attack": {"attacks": [{"name": "fgsm", "n": 99}]},
}


@pytest.mark.parametrize("changed", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_training_changes_both_keys(changed: dict[str, Any]) -> None:
    assert set(keys(one(**changed))).isdisjoint(keys(one()))
    assert len(keys(one(**changed))) == 2


@pytest.mark.parametrize("changed", OF_THE_EVALUATION.values(), ids=OF_THE_EVALUATION)
def test_a_change_of_the_evaluation_leaves_the_training_key(changed: dict[str, Any]) -> None:
    (train, evaluation), (other_train, other) = jobs(one()), jobs(one(**changed))
    assert train.key == other_train.key
    assert evaluation.key != other.key


def test_the_setting_of_an_attack_changes_its_key() -> None:
    found = {evaluations(one(attacks=[{"name": "pgd", "set": {"steps": steps}}]))[0].key for steps in (5, 6)}
    assert len(found) == 2


@pytest.mark.parametrize(
    ("constant", "owner"),
    [("TRAIN_REVISION", trainings), ("EVALUATE_REVISION", evaluation_planner), ("KEYS", job_module)],
)
def test_a_raised_revision_of_the_engine_changes_the_key(
    monkeypatch: pytest.MonkeyPatch, constant: str, owner: Any
) -> None:
    before = keys(one())
    monkeypatch.setattr(owner, constant, 99)
    assert keys(one())[1] != before[1]
    assert (keys(one())[0] == before[0]) == (constant == "EVALUATE_REVISION")


def test_a_plugin_s_revision_changes_the_key_and_its_comments_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def with_file(text: str) -> str:
        (tmp_path / "mine.py").write_text(text)
        catalog.get.cache_clear()
        return trains(one(defenses=["mine"]))[0].key

    monkeypatch.setenv("BENCH_PLUGINS", str(tmp_path / "mine.py"))
    text = "@dataclass\nclass Mine(Defense):\n    revision: ClassVar[int] = 1\n    sigma: float = 1.0\n"
    first = with_file(text)
    assert with_file(text + "\n# a comment\n") == first
    assert with_file(text.replace("= 1\n", "= 2\n")) != first


@pytest.mark.parametrize(
    "changed",
    [
        {"name": "another name"},
        {"defenses": ["trades", "standard"]},
        {"attacks": ["clean", "fgsm"]},
        {"seeds": [5, 0]},
        {"models": ["small_cnn", "mlp"]},
        {"threat": {"norm": "linf", "eps": ["2/255", "8/255"]}},
        {"data": {"name": "digits", "test": 100, "size": 8}},
    ],
)
def test_settings_without_effect_on_results_leave_the_keys(changed: dict[str, Any]) -> None:
    assert set(keys(one())) <= set(keys(one(**changed)))


def test_a_defense_without_threat_is_trained_once_for_all_budgets() -> None:
    few, many = one(defenses=["standard"]), one(defenses=["standard"], threat={"norm": "L2", "eps": [0.5, 1]})
    warm = one(defenses=["standard"], train={"epochs": 3, "eps_warmup": 0.5})
    assert trains(few)[0].threat is None
    assert trains(few)[0].key == trains(many)[0].key == trains(warm)[0].key
    assert trains(one())[0].key != trains(one(train={"epochs": 3, "eps_warmup": 0.5}))[0].key


def test_training_takes_the_largest_budget_and_train_eps_replaces_it() -> None:
    def budgets(**changed: Any) -> list[str]:
        return [job.threat.eps for job in trains(one(**changed))]

    assert budgets(threat={"eps": ["8/255", "2/255", "0.01"]}) == ["8/255"]
    assert budgets(threat={"eps": "8/255", "train_eps": "0.01"}) == ["0.01"]
    several = [{"name": "trades", "train_eps": ["2/255", "4/255"]}]
    assert budgets(threat={"eps": "8/255", "train_eps": "0.01"}, defenses=several) == ["2/255", "4/255"]


def test_each_trains_at_every_budget_and_attacks_a_training_at_its_own_only() -> None:
    threat = {"eps": ["2/255", "8/255"], "train_eps": "each"}
    defenses = ["standard", "trades", {"name": "pgd_at", "train_eps": "4/255"}]
    attacks = ["clean", "fgsm", "pgd", {"name": "transfer", "set": {"source": "pgd"}}]
    found = jobs(one(threat=threat, defenses=defenses, attacks=attacks, checks="quick"))
    trained = {
        job.key: (job.defense.name, job.threat.eps if job.threat else None)
        for job in found
        if isinstance(job, TrainJob)
    }
    assert [*trained.values()] == [
        ("standard", None), ("trades", "2/255"), ("trades", "8/255"), ("pgd_at", "4/255")
    ]  # fmt: skip
    attacked: dict[Any, set[tuple[str, str]]] = {name: set() for name in trained.values()}
    audited: dict[Any, set[str]] = {name: set() for name in trained.values()}
    for job in found:
        if isinstance(job, EvaluateJob) and job.threat:
            attacked[trained[job.model_key]].add((job.attack.name, job.threat.eps))
        elif isinstance(job, AuditJob):
            audited[trained[job.model_key]] |= {threat.eps for threat in job.threats}
    every = {(name, eps) for name in ("fgsm", "pgd", "transfer") for eps in ("2/255", "8/255")}
    assert attacked[("standard", None)] == every
    assert attacked[("pgd_at", "4/255")] == every  # trained at none of the budgets
    for eps in ("2/255", "8/255"):
        assert attacked[("trades", eps)] == {(name, at) for name, at in every if at == eps}
        assert audited[("trades", eps)] == {eps}
    # the same trainings and evaluations as by a list, which has more
    listed = keys(one(threat={"eps": threat["eps"]}, defenses=[{"name": "trades", "train_eps": ["2/255", "8/255"]}]))
    assert set(keys(one(threat=threat))) < set(listed)


def test_an_entry_cannot_train_in_pixel_units() -> None:
    with pytest.raises(ValueError, match="did you mean 8/255"):
        jobs(one(defenses=[{"name": "trades", "train_eps": 8}]))


def test_an_evaluation_without_threat_is_done_once_for_all_budgets() -> None:
    found = evaluations(one(attacks=["clean", "fgsm"], threat={"eps": ["2/255", "8/255"]}))
    assert [(job.attack.name, job.threat and job.threat.eps) for job in found] == [
        ("clean", None),
        ("fgsm", "2/255"),
        ("fgsm", "8/255"),
    ]


def test_grid_multiplies_and_set_does_not() -> None:
    grid = {"name": "trades", "set": {"steps": 2}, "grid": {"beta": [1, 6], "rel_step_size": [0.25, 0.5]}}
    found = [job.defense.settings for job in trains(one(defenses=[grid]))]
    assert [(s["beta"], s["rel_step_size"], s["steps"]) for s in found] == [
        (1.0, 0.25, 2),
        (1.0, 0.5, 2),
        (6.0, 0.25, 2),
        (6.0, 0.5, 2),
    ]
    attack = {"name": "pgd", "grid": {"steps": [1, 2, 3]}}
    assert [job.attack.settings["steps"] for job in evaluations(one(attacks=[attack]))] == [1, 2, 3]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "trades", "set": {"beta": 1}, "grid": {"beta": [2]}}, "trades: 'beta' is in set and in grid"),
        ({"name": "trades", "grid": {"beta": []}}, "trades: grid 'beta' is empty; expected a list of values"),
        ({"name": "trades", "set": {"beta": [1, 6]}}, r"defenses trades\.beta: input should be a valid number"),
        ({"name": "trades", "set": {"betta": 1}}, "trades has no setting 'betta'. Did you mean 'beta'"),
        ({"name": "trads"}, "no defense 'trads'. Did you mean 'trades'"),
    ],
)
def test_invalid_entries_are_errors(entry: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        jobs(one(defenses=[entry]))


def test_certify_is_planned_for_smoothed_models_only() -> None:
    found = jobs(BASE)
    names = {job.key: job.defense.name for job in found if job.kind == "train"}
    certified = {names[j.needs[0]] for j in found if j.kind == "evaluate" and j.attack.name == "certify"}
    assert certified == {"smoothing"}


def test_an_attack_under_an_unsupported_norm_is_an_error() -> None:
    with pytest.raises(ValueError, match="attack fgsm has no L1 version; its norms: Linf, L2"):
        jobs(one(threat={"norm": "L1", "eps": 1}, defenses=["standard"]))


def test_a_defense_under_an_unsupported_norm_is_an_error() -> None:
    with pytest.raises(ValueError, match="defense trades has no L1 version; its norms: Linf, L2"):
        jobs(one(threat={"norm": "L1", "eps": 1}, attacks=["clean"]))


def test_seeds_limits_an_attack_to_the_first_seeds() -> None:
    found = evaluations(one(seeds=[7, 3, 5], attacks=["clean", {"name": "fgsm", "seeds": 2}]))
    assert [(job.attack.name, job.seed) for job in found] == [
        ("clean", 7),
        ("fgsm", 7),
        ("clean", 3),
        ("fgsm", 3),
        ("clean", 5),
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": {"name": "digits", "test": 361}}, "data.test is 361, but the test set of digits has 360 images"),
        ({"attacks": [{"name": "fgsm", "n": 361}]}, "attacks fgsm n is 361, but the test set of digits has 360 images"),
        ({"data": {"name": "digits", "train": 1438}}, "data.train is 1438, but digits has 1437 training images"),
        ({"data": {"name": "digits", "train": 9, "validation": 9}}, "data.validation is 9; expected less than the 9"),
        ({"data": {"name": "digit"}}, "no data set 'digit'. Did you mean 'digits'"),
        ({"models": ["mpl"]}, "no model 'mpl'. Did you mean 'mlp'"),
    ],
)
def test_more_images_than_the_data_set_has_are_an_error(changed: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, LookupError), match=message):
        jobs(one(**changed))


def test_n_is_that_of_the_attack_or_of_the_run_or_the_whole_test_set() -> None:
    attacks = ["clean", {"name": "fgsm", "n": 7}]
    assert [job.n for job in evaluations(one(attacks=attacks))] == [100, 7]
    assert [job.n for job in evaluations(one(attacks=attacks, data={"name": "digits"}))] == [360, 7]


def test_each_training_comes_before_its_evaluations_and_no_job_comes_twice() -> None:
    twice = {**BASE, "defenses": BASE["defenses"] * 2, "attacks": BASE["attacks"] * 2, "seeds": [0, 1, 0]}
    found = jobs(twice)
    assert len({job.key for job in found}) == len(found)
    assert sorted(keys(BASE)) == sorted(job.key for job in found)
    seen: set[str] = set()
    for job in found:
        assert seen.issuperset(job.needs)
        assert bool(job.needs) == (job.kind == "evaluate")
        seen.add(job.key)


@settings(max_examples=30, deadline=None)
@given(*(st.permutations(BASE[name]) for name in ("defenses", "attacks", "seeds")), st.permutations(["8/255", "2/255"]))
def test_the_plan_is_independent_of_the_order_of_entries(
    defenses: list[Any], attacks: list[Any], seeds: list[int], eps: list[str]
) -> None:
    threat = {"norm": "Linf", "eps": eps}
    shuffled = {**BASE, "defenses": defenses, "attacks": attacks, "seeds": seeds, "threat": threat}
    assert sorted(keys(shuffled)) == sorted(keys(BASE))


def test_a_plan_does_not_change_its_spec_and_its_jobs_can_be_written_and_read() -> None:
    spec = build(copy.deepcopy(BASE))
    before = spec.model_dump_json()
    for job in plan(spec, ROOT):
        again = from_json(json.loads(json.dumps(job.to_json())))
        assert again == job
        assert again.key == job.key
    assert spec.model_dump_json() == before


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split(".")

    def change(values: dict[str, Any]) -> None:
        for parent in parents:
            values = values[parent]
        values[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("what.seed", 1), "was changed: its content hashes to"),
        (_set("what.defense.set.beta", 1.5), "was changed"),
        (_set("kind", "evaluate"), "was changed"),
        (_set("needs", ["0123456789ab"]), "was changed"),
        (_set("key", "0123456789ab"), "job 0123456789ab was changed"),
        (_set("schema", 2), "results have schema 2, this version reads up to 1; update bench"),
        (_set("schema", None), "schema None, this version reads 1"),
    ],
)
def test_a_changed_job_is_an_error(change: Callable[[dict[str, Any]], None], message: str) -> None:
    values = copy.deepcopy(trains(one())[0].to_json())
    change(values)
    with pytest.raises((ValueError, NewerSchemaError), match=message):
        from_json(values)


def test_evaluations_on_validation_images_share_the_training() -> None:
    data = {"name": "digits", "validation": 200}
    tested, held_out = one(data=data), one(data={**data, "split": "validation"})
    assert [job.key for job in trains(tested)] == [job.key for job in trains(held_out)]
    (tested_job,), (held_out_job,) = evaluations(tested), evaluations(held_out)
    assert "split" not in tested_job.content()
    assert held_out_job.key != tested_job.key
    assert held_out_job.split == "validation"
    assert held_out_job.n == 200
    (limited,) = evaluations(one(data={**data, "split": "validation", "test": 50}))
    assert limited.n == 50
    (as_many,) = evaluations(one(data={**data, "test": 50}))
    assert as_many.key != limited.key  # though they differ in the images only


@pytest.mark.parametrize(
    ("data", "attack", "message"),
    [
        ({"split": "validation"}, "fgsm", "data.validation is 0; expected a number of images to hold out"),
        (
            {"split": "validation", "validation": 50},
            {"name": "fgsm", "n": 51},
            "attacks fgsm n is 51, but the validation split of digits has 50 images",
        ),
        ({}, {"name": "fgsm", "n": 10_000}, "attacks fgsm n is 10000, but the test set of digits has"),
    ],
)
def test_more_images_than_the_split_has_are_an_error(data: dict[str, Any], attack: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs(one(data={"name": "digits", **data}, attacks=[attack]))


def test_validation_images_of_several_seeds_are_an_error() -> None:
    data = {"name": "digits", "validation": 50, "split": "validation"}
    with pytest.raises(ValueError, match=r"whose images depend on the seed; expected one, got \[0, 1\]"):
        jobs(one(data=data, seeds=[0, 1]))


def committed_jobs() -> list[tuple[str, dict[str, Any]]]:
    """Key and content of every committed job.json, each from its pack."""
    packs = [Packs(paths.ROOT / "results" / part) for part in ("", "earlier", "questions")]
    return [(key, json.loads(pack.read(key, JOB) or b"")) for each in packs for key, pack in sorted(each.items())]


def test_every_committed_job_has_its_key_and_its_json() -> None:
    committed = committed_jobs()
    assert len(committed) > 1000
    for key, values in committed:
        job = from_json(values)
        content, needs = values["what"], tuple(values["needs"])
        assert (job.key, job_of(values["kind"], content, needs).key) == (key, key)
        assert json.dumps(job.to_json(), sort_keys=True) == json.dumps(values, sort_keys=True)
        assert from_json(job.to_json()) == job


def test_a_job_with_an_unknown_field_is_damaged() -> None:
    values = toy_job("evaluate", {}, ("0" * 12,)).to_json()
    values["what"] = {**values["what"], "thr%at": None}
    with pytest.raises(ValueError, match="holds fields that no evaluate job has"):
        from_json(values)
