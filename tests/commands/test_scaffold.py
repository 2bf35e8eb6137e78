"""`bench new` writes a plug-in and a test that pass as they are, and overwrites nothing."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Bench

from bench.commands.new import write
from bench.planning import catalog

pytest.importorskip("torch")


@pytest.fixture(autouse=True)
def forget_plugins() -> Iterator[None]:
    """Plug-ins of these tests share names and differ in their folders."""
    yield
    for name in [name for name in sys.modules if name.startswith("bench_plugin_")]:
        del sys.modules[name]


@pytest.mark.parametrize("kind", ["defense", "attack"])
def test_what_is_written_passes_the_contract_as_it_is(bench: Bench, kind: str) -> None:
    made = bench("new", kind, "my_method", "--dir", ".")
    assert (made.code, made.err) == (0, "")
    plugin, test, step = (Path(line) for line in made.out.splitlines())
    assert plugin == Path("defenses" if kind == "defense" else "attacks", "my_method.py")
    assert test == Path("tests", plugin.parent, "test_my_method.py")
    assert ast.parse(test.read_text())
    assert str(step).endswith(f"then bench check {plugin}")
    checked = bench("check", plugin)
    assert checked.code == 0, checked.out
    chosen = "--defense my_method" if kind == "defense" else "--attack clean,my_method"
    assert checked.out.splitlines()[-1] == f"next: bench run {chosen} --plugin {plugin}"
    assert checked.out.startswith(f"ok   {plugin.parent}/my_method: ")
    shown = bench("list", plugin.parent, "my_method", "--plugin", plugin)
    assert "my_method (authors year, arXiv number)." in shown.out


@pytest.mark.parametrize("kind", ["defense", "attack"])
def test_a_broken_copy_fails_the_check(bench: Bench, kind: str) -> None:
    bench("new", kind, "my_method", "--dir", ".")
    plugin = Path("defenses" if kind == "defense" else "attacks", "my_method.py")
    text = plugin.read_text()
    hurt = text.replace("net(noisy)", "net(noisy).detach()").replace("x + delta), {}", "x), {}").replace("1[", "")
    hurt = hurt.replace("project_to_image(x, x)", "project_to_image(x, x) + 1")
    assert hurt != text
    plugin.write_text(hurt)
    checked = bench("check", "my_method", "--plugin", plugin)
    assert checked.code == 1
    assert checked.out.startswith(f"FAIL {plugin.parent}/my_method: ")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    plugin, test = write("defense", "mine", tmp_path)
    test.unlink()
    plugin.write_text("my work")
    with pytest.raises(FileExistsError, match=r"mine\.py exists; choose another name"):
        write("defense", "mine", tmp_path)
    assert plugin.read_text() == "my work"
    assert not test.exists()


@pytest.mark.parametrize("name", ["Mine", "1st", "a-b", "../mine", "a/b", "", "a" * 65, "mine\n", "mîne"])
def test_odd_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a plug-in name; expected lower-case letters, digits and underscores"):
        write("defense", name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["none", "true", "defense", "attack", "batch", "losses", "gt", "any", "tensor"])
def test_names_that_make_a_class_of_the_file_s_own_words_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a word that the file itself uses"):
        write("defense", name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_the_tree_is_refused_where_it_would_be_used(
    fresh_catalog: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plugin, _ = write("defense", "noisy", tmp_path)
    monkeypatch.setenv("BENCH_PLUGINS", str(plugin))
    with pytest.raises(ValueError, match=r"has the name of .*; rename the file"):
        catalog.names("defenses")
