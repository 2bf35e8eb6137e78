"""What a newcomer reads: plug-ins in words, `bench list NAME`, the help of every command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import Bench

from bench import cli
from bench.planning import catalog, describe

pytestmark = pytest.mark.usefixtures("fresh_catalog")
COMMANDS = sorted(cli.COMMANDS)
MINE = '''"""min CE

Mine (Nobody 2024): a defense.
"""
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal
from annotated_types import Ge, Gt, Lt
from bench.core.defense import Defense

@dataclass
class Mine(Defense):
    presets: ClassVar[dict[str, dict[str, Any]]] = {"big": {"width": 2.0, "on": True}}
    many: list[Annotated[int, Gt(0)]] = field(default_factory=lambda: [1, 4])
    width: Annotated[float, Ge(0), Lt(1)] | None = None
    mode: Literal["a", "b"] | list[int | Literal["c"]] = "a"
    on: bool = False
    base: dict[str, Any] = field(default_factory=lambda: {"name": "trades"})
    inner: dict[str, Any] = field(default_factory=lambda: {"name": "pgd", "set": {"steps": 2}})
    start: Start = "zero"
    level: Epsilon = Epsilon("8/255")
'''


def mine(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str = MINE) -> catalog.Plugin:
    (folder / "mine.py").write_text(text)
    monkeypatch.setenv("BENCH_PLUGINS", str(folder / "mine.py"))
    return catalog.get("defenses", "mine")


def test_settings_are_described_as_they_are_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plugin = mine(monkeypatch, tmp_path)
    assert {f.name: (describe.default(f.default), describe.values(f)) for f in plugin.fields} == {
        "many": ("[1, 4]", "[int > 0, ...]"),
        "width": ("null", "float >= 0, < 1 or null"),
        "mode": ("a", "a | b or [int or c, ...]"),
        "on": ("false", "bool"),
        "base": ("trades", "{name: value, ...}"),
        "inner": ("{name: pgd, set: {steps: 2}}", "{name: value, ...}"),
        "start": ("zero", "uniform | normal | zero"),
        "level": ("8/255", "Epsilon"),
    }
    assert describe.presets(plugin) == {"big": "width=2.0, on=true"}
    assert describe.example(plugin) == "bench run --defense mine --set mine.mode=a"


def test_the_default_of_every_setting_can_be_typed(bench: Bench) -> None:
    for kind in ("defenses", "attacks"):
        for name in catalog.names(kind):
            plugin = catalog.get(kind, name)
            for field in plugin.fields:
                if isinstance(field.default, dict) and list(field.default) != ["name"]:
                    continue  # a mapping belongs into a file
                from bench.planning.options import value

                typed = value(describe.default(field.default))
                assert plugin.resolve({field.name: typed}) == plugin.resolve({}), f"{name}.{field.name}"


def test_facts_of_a_defense_name_missing_declarations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = describe.facts(mine(monkeypatch, tmp_path))
    assert told["trains at a budget"] == "yes, in Linf, L2, L1"
    assert told["cost"].startswith("not said (")
    assert told["adaptive attack"] == "none named, so its rows are flagged (check C28)"
    assert told["recipe settings it follows"].startswith("none of ")
    assert describe.facts(catalog.get("defenses", "smoothing"))["trains at a budget"].startswith("no: ")
    assert describe.facts(catalog.get("models", "mlp")) == {}


def test_facts_of_an_attack_name_what_it_needs() -> None:
    def facts(name: str) -> dict[str, str]:
        return describe.facts(catalog.get("attacks", name))

    assert facts("square")["sees"] == "scores only"
    assert facts("pgd")["sees"] == "gradients of the model's surrogate"
    assert facts("clean")["budget"].startswith("none")
    assert "sees" not in facts("clean")
    assert facts("eot")["only for"] == "stochastic models"
    assert facts("certify")["only for"] == "smoothed models"
    assert facts("flatness")["measures"] == "adversarial_rise, which is not robustness"
    assert facts("surface")["measures"] == "nonlinearity, which is not robustness"
    assert facts("corruption")["measures"] == "corruption_accuracy, which is not robustness"
    assert facts("corruption")["budget"] == "none: norm and eps play no part in it"
    assert "sees" not in facts("transfer")


@pytest.mark.parametrize("name", ["noisy", "pgd", "mlp", "digits"])
def test_a_name_alone_is_described_in_full(bench: Bench, name: str) -> None:
    kind = {"noisy": "defenses", "pgd": "attacks", "mlp": "models", "digits": "datasets"}[name]
    alone = bench("list", name)
    assert (alone.code, alone.err) == (0, "")
    assert alone.out == bench("list", kind, name).out
    assert bench("list", "nosy").code == 2


@pytest.mark.parametrize("kind", ["attacks", "models"])
def test_lists_explain_their_columns(bench: Bench, kind: str) -> None:
    lines = bench("list", kind).out.splitlines()
    assert [line.split()[0] for line in lines] == catalog.names(kind)  # type: ignore[arg-type]
    if kind == "attacks":
        assert next(line for line in lines if "certify" in line).split()[1:3] == ["no", "budget"]


def test_the_first_help_is_complete(bench: Bench) -> None:
    shown = bench("--help").out
    lines = dict(re.findall(r"^  (\w+)  +(\S.*)$", shown.partition("Commands:")[2], re.MULTILINE))
    assert sorted(lines) == COMMANDS
    assert {"run", "plan", "list", "report", "eval", "doctor", "new"} <= set(COMMANDS)
    assert [line for line in lines.values() if line.endswith("...")] == []  # cut off by the width


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_and_argument_has_a_line_of_help(bench: Bench, command: str) -> None:
    shown = bench(command, "--help").out
    assert cli.COMMANDS[command] in " ".join(shown.split())  # `bench --help` prints it without importing the command
    listed = re.findall(r"^  (-\S+(?:, -\S+)?(?: / -\S+)?|\w[\w.]*)(?: <[^>]+>)?(?: {2,}(\S.*))?$", shown, re.MULTILINE)
    assert len(listed) > 1
    assert [name for name, told in listed if name.startswith("-") and (not told or told.startswith("["))] == []


def test_tables_know_a_plugin_only_with_its_option(bench: Bench) -> None:
    assert bench("new", "defense", "mine", "--dir", ".").code == 0
    plugin = ("--plugin", "defenses/mine.py")
    small = ("--n", "16", "--train-n", "64", "--epochs", "1", "--attack", "clean,pgd", "--checks", "off")
    ran = bench("run", *plugin, "--defense", "mine", *small, "--workers", "1", "--device", "cpu", "-q")
    assert ran.code == 0, ran.err
    assert bench("leaderboard", *plugin).code == 0
    known = Path("leaderboard.md").read_text("utf-8")
    assert "C28 F" in known
    assert "| mine (authors year, arXiv number)" in known
    assert bench("leaderboard").code == 0
    assert "C28 F" not in Path("leaderboard.md").read_text("utf-8")  # without the option, its declaration is unknown
    for command in (("compare", "mine", "standard"), ("timing",)):
        assert "mine (sigma=0.1)" in bench(*command).out
        shown = bench(*command, *plugin)
        assert (shown.code, shown.err) == (0, "")
        assert "sigma" not in shown.out
    assert bench("report", *plugin).code == 0


def test_a_filter_without_matching_rows_lists_the_existing_values(bench: Bench) -> None:
    small = ("--n", "16", "--train-n", "64", "--epochs", "1", "--attack", "clean,fgsm", "--checks", "off")
    ran = bench("run", "--defense", "logit_squeezing", *small, "--workers", "1", "--device", "cpu", "-q")
    assert ran.code == 0, ran.err
    two = ("compare", "logit_squeezing", "standard")
    for words, message in (
        ((*two, "--eps", "0.3"), "no record has eps 0.3. There are: 0.1"),
        ((*two, "--norm", "L2"), "no row has norm L2; there are: digits Linf"),
        ((*two, "--seed", "5"), "'logit_squeezing' has no seed 5; trained: 0"),
        (("timing", "--dataset", "mnist"), "no record has data set mnist. There are: digits"),
        (("leaderboard", "--output", "."), "--output . is a folder; name a file in it"),
        (("report", "--output", "."), "--output . is a folder; name a file in it"),
        (("report", "--figures", "leaderboard.md"), "leaderboard.md: File exists"),
        (("merge", "."), ". holds no job; expected a results folder"),
        (("check", "elsewhere"), "no defense or attack 'elsewhere'. `bench list` names them; for your own file type"),
    ):
        Path("leaderboard.md").write_text("in the way")
        outcome = bench(*words)
        assert (outcome.code, outcome.out) == (2, ""), words
        assert outcome.err.startswith(f"error: {message}")
        assert outcome.err.count("\n") == 1
    assert bench(*two, "--seed", "0", "--norm", "linf", "--dataset", "digits").code == 0
