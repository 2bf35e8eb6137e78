"""What the user writes is read strictly: what YAML would accept in silence is refused by file, line, key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paths
import pytest

from bench.core.epsilon import Epsilon
from bench.data import datasets
from bench.planning import catalog
from bench.planning.recipes import PLAIN_NETS, RECIPES, recipe
from bench.planning.spec import Spec, TrainSpec, build, load
from bench.planning.strict_yaml import MAX_BYTES, MAX_DEPTH, read

GOOD = """\
name: mine
data: {name: digits, test: 100}
threat:
  norm: linf
  eps: [8/255, 0.01, 2/255]
train: {lr: 1e-3, epochs: 3}
defenses:
  - standard
  - name: trades
    grid: {beta: [1, 6]}
attacks: [clean, {name: pgd, set: {steps: 5}, n: 50}]
"""
ROOT = Path("no-data-here")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def to_file(text: str | bytes) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return to_file


def values(**changed: Any) -> dict[str, Any]:
    """The plain values of a small correct spec, changed."""
    return {"threat": {"eps": "8/255"}, "defenses": ["standard"], "attacks": ["clean"], **changed}


def test_a_correct_file_is_read_in_full(write: Any) -> None:
    spec = load(write(GOOD))
    assert spec.name == "mine"
    assert spec.threat.norm == "Linf"
    assert [str(eps) for eps in spec.threat.eps] == ["2/255", "0.01", "8/255"]  # sorted by size
    assert spec.train.lr == 1e-3
    assert [(d.name, d.grid) for d in spec.defenses] == [("standard", {}), ("trades", {"beta": [1, 6]})]
    assert [(a.name, a.set, a.n) for a in spec.attacks] == [("clean", {}, None), ("pgd", {"steps": 5}, 50)]
    assert spec.seeds == [0]


def test_every_spec_of_the_tree_is_correct() -> None:
    files = sorted((paths.ROOT / "specs").glob("*.yaml"))
    assert files
    for path in files:
        assert load(path).defenses


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "line 3: duplicate key 'a' (first on line 1)"),
        ("defenses:\n  - name: x\n    set:\n      s: 1\n      s: 2\n", "line 5: duplicate key 's' (first on line 4)"),
        (GOOD + "speed: 3\n", "line 12: unknown key 'speed' in the spec. Did you mean 'seeds'? Known: name, data, "),
        (GOOD.replace("grid", "grids"), "line 10: unknown key 'grids' in defenses.1. Did you mean 'grid'? Known: "),
        (GOOD.replace("epochs", "epoch"), "line 6: unknown key 'epoch' in train. Did you mean 'epochs'? Known: "),
        (GOOD.replace("n: 50", "nn: 50"), "line 11: unknown key 'nn' in attacks.1. "),
        (GOOD + "seeds: !!python/object/apply:os.system [id]\n", "line 12: tag tag:yaml.org,2002:python/object"),
        (GOOD + "seeds: !mine [1]\n", "line 12: tag !mine is not allowed; write plain values"),
        (GOOD + "seeds: !!set {1}\n", "line 12: tag tag:yaml.org,2002:set is not allowed"),
        (GOOD + "seeds: !!binary aGk=\n", "line 12: tag tag:yaml.org,2002:binary is not allowed"),
        ("a: &x [1]\nb: *x\n", "line 2: aliases (*x) are not allowed"),
        ("a: &a [x]\nb: &b [*a, *a]\n", "line 2: aliases (*a) are not allowed"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), f"line 1: nested deeper than {MAX_DEPTH} levels"),
        ("a:\n " + "[" * 100_000, f"line 2: nested deeper than {MAX_DEPTH} levels"),  # no recursion in the parser
        ("- a\n- b\n", "expected a mapping such as 'defenses: [noisy]'"),
        ("just text", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: [1\n", "line 2: expected ',' or ']'"),
        ("a: 1\n--- \nb: 2\n", "but found another document"),
        ("1: 2\n", "line 1: a key must be text; put quotes around it"),
        ("true: 2\n", "line 1: a key must be text"),
        ("? [a]\n: 2\n", "line 1: a key must be text"),
        ("<<: {a: 1}\n" + GOOD, "line 1: unknown key '<<' in the spec."),
        (b"name: \xff\xfe\n", "mine.yaml is not UTF-8 text"),
        ("name: a\x07b\n", "special characters are not allowed"),
        (GOOD.replace("attacks: [", "attacks: [] #"), "line 11: attacks is empty; expected at least one entry"),
        (GOOD.replace("[8/255, 0.01, 2/255]", "[]"), "line 5: threat.eps is empty; expected at least one entry"),
        (GOOD + "models: []\n", "line 12: models is empty; expected at least one entry"),
        (GOOD + "seeds: []\n", "line 12: seeds is empty; expected at least one entry"),
        (GOOD.replace("attacks:", "data_:"), "attacks is missing; expected at least one entry"),
        (GOOD.replace("8/255", "8"), "line 3: threat: eps 8 under Linf is larger than the pixel range [0,1]; did you"),
        (GOOD.replace("8/255", "8/0"), "line 5: threat.eps.0: '8/0' divides by zero; expected a number such as 8/255"),
        (GOOD.replace("8/255", "-1"), "line 5: threat.eps.0: '-1' is negative"),
        (GOOD.replace("8/255", "no"), "line 5: threat.eps.0: 'no' is not a number"),
        (GOOD.replace("8/255", "true"), "line 5: threat.eps.0: 'True' is not a number"),
        (GOOD.replace("linf", "L7"), "line 4: threat.norm: Input should be 'Linf', 'L2' or 'L1', got 'L7'"),
        (GOOD.replace("1e-3", "0"), "line 6: train.lr: Input should be greater than 0, got 0"),
        (GOOD.replace("1e-3", "1e999"), "line 6: train.lr: Input should be a finite number"),
        (GOOD.replace("test: 100", "test: 0"), "line 2: data.test: Input should be greater than 0, got 0"),
        (GOOD.replace("n: 50", "n: 0"), "line 11: attacks.1.n: Input should be greater than 0, got 0"),
        (GOOD.replace("8/255", "1e-400"), "line 5: threat.eps.0: '1e-400' is zero as a 32-bit float"),
        (GOOD.replace("8/255", "1e-50"), "line 5: threat.eps.0: '1e-50' is zero as a 32-bit float"),
        (GOOD.replace("8/255", "1e40"), "line 5: threat.eps.0: '1e+40' is infinite as a 32-bit float"),
        (GOOD.replace("8/255", "'1e400'"), "line 5: threat.eps.0: '1e400' is infinite as a 32-bit float"),
        (GOOD.replace("lr: 1e-3", "weight_decay: 1e-9999"), "line 6: train.weight_decay: too small: it is zero as a f"),
        (GOOD.replace("lr: 1e-3", "weight_decay: '1e-400'"), "line 6: train.weight_decay: too small: it is zero as a"),
        (GOOD.replace("n: 50", "n: true"), "line 11: attacks.1.n: expected a number, not true or false, got True"),
        (GOOD.replace("epochs: 3", "epochs: true"), "line 6: train.epochs: expected a number, not true or false"),
        (GOOD.replace("test: 100", "validation: false"), "line 2: data.validation: expected a number, not true or"),
        (GOOD + "seeds: [0, true]\n", "line 12: seeds: expected a number, not true or false"),
        (GOOD + "recipe: mine\n", "line 12: recipe: Input should be 'shared' or 'paper', got 'mine'"),
    ],
)
def test_yaml_with_surprising_meaning_is_an_error(write: Any, text: str | bytes, message: str) -> None:
    path = write(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as error:
        load(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_too_large_or_missing_is_an_error(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"a spec may have {MAX_BYTES}"):
        load(write(GOOD + "#" * MAX_BYTES))
    with pytest.raises(FileNotFoundError, match=r"no spec file .*none\.yaml"):
        load(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match="no spec file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("8/255", "8/255"),
        ("1.", 1.0),
        (".5", 0.5),
        ("-2.5E+3", -2500.0),
        ("3", 3),
        ("-3", -3),
        ("010", "010"),  # octal elsewhere
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),  # ninety in YAML 1.1
        ("no", "no"),
        ("Off", "Off"),
        ("True", "True"),
        ("true", True),
        ("false", False),
        ("null", None),
        ("~", None),
        (".inf", ".inf"),
        ("2024-01-02", "2024-01-02"),
        ("1e", "1e"),
        ("'3'", "3"),
    ],
)
def test_plain_values(write: Any, text: str, value: Any) -> None:
    found = read(write(f"a: {text}\n"))[0]["a"]
    assert found == value
    assert type(found) is type(value)


def test_each_key_has_its_line(write: Any) -> None:
    lines = read(write(GOOD))[1]
    assert lines["threat", "eps"] == 5
    assert lines["defenses", 1, "grid", "beta"] == 10


@pytest.mark.parametrize(("written", "norm"), [("linf", "Linf"), ("LINF", "Linf"), ("l2", "L2"), ("L1", "L1")])
def test_norms_in_any_case(written: str, norm: str) -> None:
    assert build(values(threat={"norm": written, "eps": 0.1})).threat.norm == norm


def test_one_budget_or_several_and_each_once() -> None:
    assert build(values(threat={"eps": 0.1})).threat.eps == [Epsilon("0.1")]
    same = build(values(threat={"eps": ["8/255", 8 / 255, 0, "0.02"]})).threat.eps
    assert [str(eps) for eps in same] == ["0", "0.02", "8/255"]
    assert build(values(threat={"norm": "L2", "eps": 8})).threat.eps == [Epsilon(8)]


def test_train_eps_is_checked_against_the_norm_too() -> None:
    with pytest.raises(ValueError, match="did you mean 8/255"):
        build(values(threat={"eps": "8/255", "train_eps": 8}))


def test_one_train_eps_or_several() -> None:
    spec = build(values(defenses=[{"name": "a", "train_eps": "4/255"}, {"name": "b", "train_eps": [0.1, "8/255"]}]))
    assert [[str(eps) for eps in d.train_eps or []] for d in spec.defenses] == [["4/255"], ["0.1", "8/255"]]


def test_a_bare_name_is_an_entry_without_settings() -> None:
    short, long = build(values(models=["mlp"])), build(values(models=[{"name": "mlp", "set": {}}]))
    assert short == long


def facts(name: str) -> Any:
    return datasets.facts(name, ROOT)


def made(**changed: Any) -> Spec:
    return build(values(**changed))


def test_recipe_settings_of_the_user_precede_the_paper_s_and_the_data_set_s() -> None:
    paper = {"lr": 1, "epochs": 7}
    digits = facts("digits")
    assert recipe(made(), digits, "mlp", paper)["lr"] == RECIPES["digits"]["lr"]
    shown = recipe(made(recipe="paper"), digits, "mlp", paper)
    assert (shown["lr"], shown["epochs"], shown["batch_size"]) == (1.0, 7, RECIPES["digits"]["batch_size"])
    assert isinstance(shown["lr"], float)
    own = recipe(made(recipe="paper", train={"lr": 0.5, "epochs": None}), digits, "mlp", paper)
    assert (own["lr"], own["epochs"]) == (0.5, 7)


@pytest.mark.parametrize("model", catalog.names("models"))
@pytest.mark.parametrize("name", sorted(datasets.KNOWN))
def test_every_setting_of_a_recipe_is_filled(name: str, model: str) -> None:
    resolved = recipe(made(), facts(name), model, {})
    assert set(resolved) == set(TrainSpec.model_fields) - set(TrainSpec.settings_added_later)
    assert None not in resolved.values()


@pytest.mark.parametrize("name", sorted(PLAIN_NETS))
def test_plain_nets_exist_and_get_their_recipe_on_photographs_only(name: str) -> None:
    assert name in catalog.names("models")
    photographs, digits = recipe(made(), facts("cifar10"), name, {}), recipe(made(), facts("digits"), name, {})
    assert photographs != recipe(made(), facts("cifar10"), "preact_resnet18", {})
    assert digits == recipe(made(), facts("digits"), "mlp", {})


@pytest.mark.parametrize("name", catalog.names("defenses"))
def test_the_recipe_of_each_defense_fits_the_schema(name: str) -> None:
    paper = catalog.get("defenses", name).constant("recipe", {})
    assert {**recipe(made(recipe="paper"), facts("cifar10"), "mlp", paper), **paper} == recipe(
        made(recipe="paper"), facts("cifar10"), "mlp", paper
    )


def test_a_recipe_with_an_unknown_key_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^recipe\.epoch: extra inputs are not permitted, got 3$"):
        recipe(made(recipe="paper"), facts("digits"), "mlp", {"epoch": 3})
