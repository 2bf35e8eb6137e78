"""What `--search` may ask for: bounds within those that a defense declares, choices, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.planning import catalog
from bench.planning.search_space import Dimension, _declared, dimensions, typed

PLUGIN = '''"""min CE

Nobody (2024).
"""
from dataclasses import dataclass
from typing import Annotated, Literal
from annotated_types import Ge, Gt, Le, Lt
from bench.core.defense import Defense

@dataclass
class Many(Defense):
    free: float = 1.0
    half: Annotated[float, Gt(0)] = 1.0
    share: Annotated[float, Ge(0), Le(1)] = 0.5
    inner: Annotated[float, Gt(0), Lt(1)] = 0.5
    steps: Annotated[int, Gt(0), Le(10)] = 3
    maybe: Annotated[float, Ge(0), Le(2)] | None = None
    kind: Literal["one", "two", "three"] = "one"
    on: bool = False
    base: dict = None
    name: str = ""
'''


@pytest.fixture
def many(fresh_catalog: None, tmp_path: Path) -> catalog.Plugin:
    path = tmp_path / "many.py"
    path.write_text(PLUGIN)
    return catalog.Plugin.read("defenses", path)


def test_bounds_as_typed_and_as_declared(many: catalog.Plugin) -> None:
    texts = ["free=-1:1", "half=0.01:10:log", "share", "many.inner", "steps", "maybe", "kind=three,one", "on"]
    found = dimensions(many, texts)
    assert found == [
        Dimension("free", -1.0, 1.0),
        Dimension("half", 0.01, 10.0, log=True),
        Dimension("share", 0.0, 1.0),
        Dimension("inner", 0.001, 0.999),  # both ends are excluded
        Dimension("steps", 1, 10, whole=True),
        Dimension("maybe", 0.0, 2.0),
        Dimension("kind", choices=("three", "one")),
        Dimension("on", choices=(False, True)),
    ]
    assert [str(found[k]) for k in (1, 6, 7)] == [
        "half from 0.01 to 10 (log)", "kind one of three, one", "on one of false, true",
    ]  # fmt: skip
    assert dimensions(many, ["share=0:1"]) == [Dimension("share", 0.0, 1.0)]  # included ends may be typed
    assert dimensions(many, ["steps=1:8:log"]) == [Dimension("steps", 1, 8, whole=True, log=True)]
    assert dimensions(many, ["kind"])[0].choices == ("one", "two", "three")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half=0:1", "low is 0, but many declares half above 0"),
        ("share=0:1.5", "high is 1.5, but many declares share at least 0 and at most 1"),
        ("inner=0.5:1", "high is 1, but many declares inner above 0 and below 1"),
        ("steps=0:3", "low is 0, but many declares steps above 0 and at most 10"),
        ("steps=1.5:3", "'1.5' is no whole number"),
        ("free=0:inf", "'inf' is no number"),
        ("free=0:x", "'x' is no number"),
        ("free=2:1", "low is 2, high is 1; expected low below high"),
        ("free=1:1", "expected low below high"),
        ("free=-1:1:log", "low is -1; a log scale needs one above 0"),
        ("free=0:1:lin", "expected two bounds, as in free=LOW:HIGH or free=LOW:HIGH:log"),
        ("free=1", "expected two bounds"),
        ("free=", "expected two bounds"),
        ("free", "many declares free without bounds, not both bounds; give them as free=LOW:HIGH"),
        ("half", "many declares half above 0, not both bounds"),
        ("kind=one,for", "'for' is none of its choices; expected some of one, two, three"),
        ("kind=one", "fewer than two choices; expected some of one, two, three"),
        ("base", "base is dict; a search varies numbers, true and false, named choices"),
        ("name=a,b", "name is str; a search varies numbers"),
        ("shares", "many has no setting 'shares'. Did you mean 'share'?"),
    ],
)
def test_mistakes_are_told_in_one_line(many: catalog.Plugin, text: str, message: str) -> None:
    with pytest.raises((LookupError, ValueError)) as error:
        dimensions(many, [text])
    assert message in error.value.args[0]
    assert error.value.args[0].startswith(f"--search {text}: ")
    assert "\n" not in error.value.args[0]


def test_no_setting_and_one_twice(many: catalog.Plugin) -> None:
    with pytest.raises(
        ValueError, match=r"--optuna needs --search.*share \(at least 0 and at most 1\).*kind \(one, two"
    ):
        dimensions(many, [])
    with pytest.raises(ValueError, match="--search names share twice"):
        dimensions(many, ["share", "many.share=0:0.5"])


def test_numbers_are_rounded_to_what_is_typed_and_stay_inside() -> None:
    wide, narrow = Dimension("a", 0.05, 1.5, log=True), Dimension("b", 0.123456, 0.123457)
    assert wide.rounded(0.31374827) == 0.3137
    assert [narrow.rounded(x) for x in (0.123456, 0.12345654321, 0.123457)] == [0.123456, 0.123456543, 0.123457]
    assert (typed(0.3137), typed(0.123456), typed(2.0), typed(True), typed("one")) == (
        *("0.3137", "0.123456", "2", "true", "one"),
    )
    assert (Dimension("c", 1, 9, whole=True).rounded(7), Dimension("d", choices=("x",)).rounded("x")) == (7, "x")
    assert [wide.holds(value) for value in (0.05, 1.5, 1.6, None, True)] == [True, True, False, False, False]


def test_every_bound_of_a_shipped_defense_can_be_read() -> None:
    for name in catalog.names("defenses"):
        plugin = catalog.get("defenses", name)
        for field in plugin.fields:
            declared = _declared(field.type)
            if declared is not None and not declared.choices and field.default is not None:
                assert not declared.outside(field.default), f"{name}.{field.name}"
