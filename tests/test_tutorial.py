"""docs/tutorial.md: what it types is typed, in its order, and prints what it shows."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("tutorial", Path(__file__).parent.parent / "docs" / "tutorial.py")
assert spec is not None
assert spec.loader is not None
tutorial = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tutorial)

PAGE = """\
Text.

```console
$ echo one
one
$ export WORD=2
```

<!-- file: a.txt -->
```python
x = 1
y = 1
```

<!-- edit: a.txt -->
```diff
 x = 1
-y = 1
+y = 2
+z = 3
```

```yaml
not: typed
```

```console
$ cat a.txt; echo $WORD
```
"""


def test_a_page_is_read_in_order() -> None:
    assert [(step.kind, step.what) for step in tutorial.steps(PAGE)] == [
        ("command", "echo one"),
        ("command", "export WORD=2"),
        ("file", "a.txt"),
        ("edit", "a.txt"),
        ("command", "cat a.txt; echo $WORD"),
    ]
    assert tutorial.steps(PAGE)[0].text == "one\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="the tutorial's commands are for bash")
def test_files_edits_and_exports_hold_for_what_follows(tmp_path: Path) -> None:
    done = [(step.what, printed, code) for step, printed, code in tutorial.run(tutorial.steps(PAGE), tmp_path)]
    assert done == [
        ("echo one", "one\n", 0),
        ("export WORD=2", "", 0),
        ("cat a.txt; echo $WORD", "x = 1\ny = 2\nz = 3\n2\n", 0),
    ]


def test_an_edit_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="are there 0 times, expected once"):
        tutorial.edited("x = 2\n", " x = 1\n+y = 1\n")
    with pytest.raises(ValueError, match="are there 2 times, expected once"):
        tutorial.edited("x = 1\nx = 1\n", " x = 1\n+y = 1\n")


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("a  61.00 *  +1.5\n", "a 7 -22.51\n"),  # numbers, signs, marks and spaces
        ("McNemar <0.001\n", "McNemar 0.031\n"),
        ("A (271b8285ef2a), OK\n", "A (0123456789ab), OK\n"),
        ("┏━━┳━━━┓\n", "┏━━━━┳━┓\n"),
        ("0 already done in 2 min 33 s; records\n", "0 already done in 9 s; records\n"),
        ("digits, mlp, 1437 training images, CPU AMD EPYC\n", "digits, mlp, 1437 training images, NVIDIA H100\n"),
        ("a\ndevices   cpu\n", "a\ndevices   GPU 0, GPU 1\n"),
    ],
)
def test_what_differs_between_machines_is_no_difference(shown: str, printed: str) -> None:
    assert tutorial.difference(shown, printed) == ""


@pytest.mark.parametrize(
    ("shown", "printed", "told"),
    [
        ("x OK\n", "x FLAG (C28)\n", "the page shows 'x OK', printed was 'x FLAG (C28)'"),
        ("a\n", "a\nb\n", "the page shows 'nothing', printed was 'b'"),
        ("a\nb\n", "a\n", "the page shows 'b', printed was 'nothing'"),
        ("C28\n", "C29\n", "the page shows 'C28', printed was 'C29'"),  # a code is a word, not a number
    ],
)
def test_another_word_is_a_difference(shown: str, printed: str, told: str) -> None:
    assert tutorial.difference(shown, printed) == told


def test_every_command_of_the_tutorial_shows_what_it_printed() -> None:
    silent = [s.what for s in tutorial.steps(tutorial.PAGE.read_text("utf-8")) if s.kind == "command" and not s.text]
    assert [what for what in silent if not what.startswith("export ")] == []  # else: python docs/tutorial.py --write


def test_a_star_on_the_page_is_what_its_text_says() -> None:
    text = tutorial.PAGE.read_text("utf-8")
    assert "McNemar's exact test finds at 5 % (p below 0.05) is marked `*`" in text
    lines = re.findall(r"[+-]\d+\.\d+ (\*)? +[+-][\d.]+ to [+-][\d.]+ +(<?[\d.]+)", text)
    assert {star for star, _ in lines} == {"*", ""}
    assert [p for star, p in lines if bool(star) != (float(p.removeprefix("<")) < 0.05)] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("bash") is None, reason="the tutorial's commands are for bash")
def test_every_command_of_the_tutorial_prints_what_the_page_shows(tmp_path: Path) -> None:
    todo = tutorial.steps(tutorial.PAGE.read_text("utf-8"))
    seen = []
    for step, printed, code in tutorial.run(todo, tmp_path):
        assert code == 0, printed
        assert tutorial.difference(step.text, printed) == "", step.what
        seen.append(step.what)
    assert seen == [step.what for step in todo if step.kind == "command"]
    assert {"run", "check", "plan", "compare", "explain", "leaderboard", "report"} <= {w.split()[1] for w in seen}
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert "my\\_method" in (tmp_path / "leaderboard.md").read_text("utf-8")


def accuracies(table: str) -> list[float]:
    """The percentages of a printed table, row by row."""
    return [float(number) for number in re.findall(r"([\d.]+) ±", table)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("bash") is None, reason="the README's commands are for bash")
def test_the_defense_of_the_readme_yields_the_table_of_the_readme(tmp_path: Path) -> None:
    """Other processors round differently: 18 of 360 images may change."""
    todo = tutorial.steps((tutorial.ROOT / "README.md").read_text("utf-8"))
    assert [step.kind for step in todo] == ["file", "command"]
    assert len([line for line in todo[0].text.splitlines() if line]) <= 20
    ((step, printed, code),) = tutorial.run(todo, tmp_path)
    assert code == 0, printed
    assert tutorial.difference(step.text, printed) == ""
    assert accuracies(printed) == pytest.approx(accuracies(step.text), abs=5)
    assert len(accuracies(printed)) == 12
