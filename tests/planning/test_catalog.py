"""The catalog reads plug-in files without importing them, refuses what it cannot read, and fills in defaults."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import plugins
from bench.core.epsilon import Epsilon
from bench.planning import catalog
from bench.planning.plugin_source import REQUIRED

pytestmark = pytest.mark.usefixtures("fresh_catalog")
EVERY_FILE = [(kind, name) for kind in catalog.KINDS for name in catalog.names(kind)]

GOOD = '''"""min CE

Paper (2024).

First note.

Second note.
"""
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal
from annotated_types import Gt, Le
from bench.core.defense import Defense

raise RuntimeError("the catalog must not run this file")

@dataclass
class Mine(Defense):
    """A defense."""

    uses_threat: ClassVar[bool] = False
    norms: ClassVar[tuple[str, ...]] = ("L2",)
    sigma: Annotated[float, Gt(0), Le(2)] = 0.5
    """Noise of the
    inputs."""
    steps: int = 3
    level: Epsilon = Epsilon("8/255")
    mode: Literal["a", "b"] = "a"
    base: dict[str, Any] = field(default_factory=lambda: {"name": "standard"})
    many: list[int] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
'''


Plug = Callable[..., None]


@pytest.fixture
def plug(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Plug:
    """Writes files, by name without `.py`, and names them as `--plugin` does."""

    def write(folder: Path = tmp_path, **files: str) -> None:
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.setenv("BENCH_PLUGINS", os.pathsep.join(str(folder / f"{name}.py") for name in files))

    return write


def defense(*lines: str) -> str:
    """A plug-in file with these lines in its class."""
    body = "\n".join(f"    {line}" for line in lines)
    return f"@dataclass\nclass Mine(Defense):\n{body}\n"


@pytest.mark.parametrize(("kind", "name"), EVERY_FILE, ids=[f"{kind}/{name}" for kind, name in EVERY_FILE])
def test_every_built_in_file_is_read_without_import(kind: catalog.Kind, name: str) -> None:
    before = set(sys.modules)
    plugin = catalog.get(kind, name)
    module = f"{catalog.PACKAGES[kind]}.{name}"
    assert module not in set(sys.modules) - before
    assert plugin.formula
    assert plugin.path.name == f"{name}.py"
    required = [field.name for field in plugin.fields if field.default is REQUIRED]
    assert required == []  # so that the name alone is a valid entry of a spec
    names = {field.name for field in plugin.fields}
    names |= set(plugin.constant("retired_settings", {}))
    assert set(plugin.constant("settings_added_later", ())) <= names
    assert set(plugin.resolve({})) == names - set(plugin.constant("settings_added_later", ()))


@pytest.mark.parametrize("kind", catalog.KINDS)
def test_there_are_plugins_of_each_kind(kind: catalog.Kind) -> None:
    assert catalog.names(kind) == sorted(catalog.names(kind)) != []


def test_a_plugin_outside_the_tree_is_read_in_full(plug: Plug) -> None:
    plug(mine=GOOD)
    assert "mine" in catalog.names("defenses")
    assert "mine" not in catalog.names("attacks")
    plugin = catalog.get("defenses", "mine")
    assert (plugin.formula, plugin.source) == ("min CE", "Paper (2024).")
    assert plugin.notes == "First note.\n\nSecond note."
    assert plugin.constants == {"uses_threat": False, "norms": ("L2",)}
    assert plugin.constant("norms", None) == ("L2",)
    assert plugin.predictor == "deterministic"
    assert plugin.fields[0].doc == "Noise of the inputs."
    assert plugin.resolve({"sigma": "0.25"}) == {
        "sigma": 0.25,
        "steps": 3,
        "level": "8/255",
        "mode": "a",
        "base": {"name": "standard", "set": {}, "revision": 1},
        "many": [],
        "extra": {},
        "note": None,
    }
    assert plugin.resolve({"level": 8 / 255})["level"] == "8/255"
    assert str(Epsilon(plugin.resolve({"level": "0.25"})["level"])) == "0.25"


def test_6_and_6_point_0_resolve_alike(plug: Plug) -> None:
    plug(mine=GOOD)
    plugin = catalog.get("defenses", "mine")
    for name in ("sigma", "steps"):
        assert repr(plugin.resolve({name: 2})[name]) == repr(plugin.resolve({name: 2.0})[name])


def test_a_setting_added_later_is_left_out_of_a_job_at_its_default(plug: Plug) -> None:
    young = '    settings_added_later: ClassVar[tuple[str, ...]] = ("sigma",)\n    norms:'
    plug(mine=GOOD.replace("    norms:", young))
    plugin = catalog.get("defenses", "mine")
    assert "sigma" not in plugin.resolve({})
    assert plugin.resolve({"sigma": "0.5"}) == plugin.resolve({})
    assert plugin.resolve({"sigma": 1})["sigma"] == 1.0


def test_settings_given_beside_a_preset_take_precedence(plug: Plug) -> None:
    preset = """    presets: ClassVar[dict[str, dict[str, Any]]] = {"loud": {"sigma": 2, "steps": 9}}\n    norms:"""
    plug(mine=GOOD.replace("    norms:", preset))
    plugin = catalog.get("defenses", "mine")
    assert plugin.resolve({"preset": "loud"}) == plugin.resolve({"sigma": 2, "steps": 9})
    assert plugin.resolve({"preset": "loud", "steps": 3}) == plugin.resolve({"sigma": 2})
    with pytest.raises(LookupError, match=r"mine has no preset 'lod'. Did you mean 'loud'\? Known: loud"):
        plugin.resolve({"preset": "lod"})
    with pytest.raises(LookupError, match="trades has no setting 'preset'"):
        catalog.get("defenses", "trades").resolve({"preset": "loud"})


def test_the_base_class_determines_the_kind(plug: Plug) -> None:
    attack = "@dataclass\nclass Theirs(Evaluation):\n    steps: int = 1\n"
    plug(mine=defense("sigma: float = 1.0"), theirs=attack)
    assert "theirs" in catalog.names("attacks")
    assert "mine" in catalog.names("defenses")


def test_a_plugin_has_the_fields_and_constants_of_the_base_class_it_imports(plug: Plug) -> None:
    text = '''"""min L

(Nobody 2026)
"""
from dataclasses import dataclass
from typing import ClassVar
from defenses.trades import TRADES


@dataclass
class Mine(TRADES):
    """Mine."""

    revision: ClassVar[int] = 7

    rel_step_size: float = 0.5
    """Larger steps."""
    extra: int = 3
    """A setting of its own."""
'''
    plug(mine=text)
    mine, trades = catalog.get("defenses", "mine"), catalog.get("defenses", "trades")
    assert [f.name for f in mine.fields] == [*(f.name for f in trades.fields), "extra"]
    assert mine.resolve({}) == {**trades.resolve({}), "rel_step_size": 0.5, "extra": 3}
    assert mine.norms == ("Linf", "L2")
    assert (mine.revision, trades.revision) == (7, 1)
    assert "beta" in [f.name for f in mine.fields if f.doc]


def test_a_file_without_a_plugin_is_an_error(plug: Plug) -> None:
    plug(mine="x = 1\n")
    with pytest.raises(ValueError, match=r"mine\.py holds no class derived from Defense, Attack or Evaluation"):
        catalog.names("defenses")


@pytest.mark.parametrize("text", ["class (:", "x = '\0'"])
def test_a_file_that_is_not_python_is_an_error_with_its_path(plug: Plug, text: str) -> None:
    plug(mine=text)
    with pytest.raises(ValueError, match=r"^.*/mine\.py:1: "):
        catalog.names("defenses")


def test_a_plugin_cannot_have_the_name_of_a_built_in_one(plug: Plug) -> None:
    plug(noisy=defense("sigma: float = 1.0"))
    with pytest.raises(ValueError, match=r"noisy\.py has the name of .*; rename the file"):
        catalog.get("defenses", "noisy")


def test_naming_a_built_in_file_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = catalog.get("defenses", "noisy").path
    monkeypatch.setenv("BENCH_PLUGINS", str(path))
    catalog.get.cache_clear()
    assert catalog.get("defenses", "noisy").path == path


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["sigma: Tensor = 1"], r"/mine\.py:3: unknown type 'Tensor'; use "),
        (["sigma: torch.dtype = 1"], r"/mine\.py:3: cannot read the type 'torch\.dtype'"),
        (["sigma: exit(3) = 1"], r"cannot read the type 'exit\(3\)'"),
        (["sigma: Literal[9 ** 9 ** 9] = 1"], "cannot read the type"),
        (["sigma: Annotated[float, lambda: 1] = 1"], "cannot read the type"),
        (["sigma: int[3] = 1"], r"cannot read the type 'int\[3\]'"),
        (["sigma: float = math.pi"], r"/mine\.py:3: constants and defaults must be literals"),
        (["sigma: float = 2 * 3"], "must be literals"),
        (["sigma: dict = {[]: 1}"], "must be literals"),
        (["norms: ClassVar[tuple[str, ...]] = NORMS"], r"/mine\.py:3: constants and defaults must be literals"),
        (["many: list[int] = field(default_factory=set)"], "must be literals"),
        (["many: list[int] = field(default_factory=lambda: make())"], "must be literals"),
        (["level: Epsilon = Epsilon()"], "must be literals"),
        (["level: Epsilon = Epsilon('8 of 255')"], r"/mine\.py:3: '8 of 255' is not a number"),
    ],
)
def test_a_declaration_that_cannot_be_read_is_an_error(plug: Plug, lines: list[str], message: str) -> None:
    plug(mine=defense(*lines))
    with pytest.raises(ValueError, match=message):
        catalog.get("defenses", "mine")


def test_a_file_holds_one_plugin(plug: Plug) -> None:
    two = defense("a: int = 1") + defense("b: int = 1").replace("Mine", "Yours")
    plug(mine=two)
    with pytest.raises(ValueError, match=r"/mine\.py:\d+: expected one @dataclass plug-in in the file, found 2"):
        catalog.get("defenses", "mine")


def test_a_broken_file_leaves_the_other_plugins_usable(plug: Plug) -> None:
    plug(broken=defense("sigma: Tensor = 1"), mine=defense("sigma: float = 1"))
    assert {"broken", "mine", "noisy"} <= set(catalog.names("defenses"))
    assert catalog.get("defenses", "mine").resolve({}) == {"sigma": 1.0}
    assert catalog.get("defenses", "noisy").resolve({})["sigma"] == 0.6


def test_an_unknown_name_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(LookupError, match=r"no defense 'nosy'\. Did you mean 'noisy'\? Known: .*noisy"):
        catalog.get("defenses", "nosy")
    with pytest.raises(LookupError, match=r"no attack 'qqqqqq'\. Known: ") as error:
        catalog.get("attacks", "qqqqqq")
    assert "Did you mean" not in str(error.value)


def test_an_unknown_setting_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(LookupError, match=r"noisy has no setting 'sigm'\. Did you mean 'sigma'\? Known: .*learn_sigma"):
        catalog.get("defenses", "noisy").resolve({"sigm": 1})


@pytest.mark.parametrize("sigma", [0, -1, "0", "nan", "inf", float("inf"), "abc", None, [1]])
def test_an_invalid_value_is_an_error_of_one_line(sigma: Any) -> None:
    with pytest.raises(ValueError, match=r"^defenses noisy\.sigma: input should be .*$") as error:
        catalog.get("defenses", "noisy").resolve({"sigma": sigma}, "defenses ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "name", "settings", "message"),
    [
        ("defenses", "noisy", {"sigma": True}, r"noisy\.sigma: expected a number, not true or false, got True"),
        ("attacks", "eot", {"draws": [1, True]}, r"eot\.draws: expected a number, not true or false"),
        ("models", "mlp", {"width": True}, r"mlp\.width: expected a number, not true or false"),
        ("defenses", "trades", {"beta": "1e-400"}, r"trades\.beta: too small: it is zero as a float, got '1e-400'"),
    ],
)
def test_a_value_that_would_be_read_as_another_number(
    kind: catalog.Kind, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        catalog.get(kind, name).resolve(settings)


def test_the_word_true_can_be_a_choice() -> None:
    # YAML and the command line make a boolean of it
    mixture = catalog.get("defenses", "at_mixture")
    assert mixture.resolve({"label": True}) == mixture.resolve({"label": "true"}) == mixture.resolve({})
    assert mixture.resolve({"joint": True})["joint"] is True
    with pytest.raises(ValueError, match=r"at_mixture\.label: input should be 'true', 'pred' or"):
        mixture.resolve({"label": False})


def test_two_files_of_one_name_are_two_plugins(plug: Plug, tmp_path: Path) -> None:
    text = GOOD.replace(
        'raise RuntimeError("the catalog must not run this file")', "from bench.core.epsilon import Epsilon"
    )
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        plug(tmp_path / folder, mine=text)
        catalog.get.cache_clear()
        assert plugins.module("defenses", "mine").__file__ == str(catalog.get("defenses", "mine").path)
        assert Path(str(plugins.module("defenses", "mine").__file__)).parent.name == folder


@pytest.mark.parametrize("name", ["awp", "eot"])
def test_the_current_settings_of_a_job_are_those_of_a_spec(name: str) -> None:
    plugin = catalog.get("defenses" if name == "awp" else "attacks", name)
    settings = plugin.resolve({})
    assert "revision" in settings["base"]
    assert plugin.resolve(plugin.current(settings)) == settings


def test_a_base_with_retired_settings_can_be_built() -> None:
    pytest.importorskip("torch")
    from bench.planning.job_fields import JobThreat, PluginChoice

    plugin = catalog.get("defenses", "awp")
    settings = plugin.resolve({"base": "noisy"})
    assert settings["base"]["set"]["relu"] == "laplace"  # retired, and still in the key of a job
    defense = plugins.make("defenses", PluginChoice("awp", settings, plugin.revision), JobThreat("Linf", "0.1"))
    assert defense.base["name"] == "noisy"
    assert plugin.resolve(plugin.current(settings)) == settings
    settings["base"]["set"]["relu"] = "adf"
    with pytest.raises(LookupError, match=r"noisy\.relu was removed"):
        plugin.current(settings)
