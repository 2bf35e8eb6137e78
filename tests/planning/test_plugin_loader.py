"""Built-in plug-ins are those beside bench; a user's folders come behind them; entry points count once named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import Bench, write_plugins

from bench.planning import catalog

ATTACK = '''"""x' = x

Nobody (2024).
"""
from dataclasses import dataclass
from torch import Tensor, nn
from bench.core.attack import Attack, Columns, Context

@dataclass
class {title}(Attack):
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        return x, {{}}
'''
WORDS = ["--defense", "standard", "--no-baseline", "--model", "mlp", "--dataset", "digits", "--attack", "clean,pgd"]
SHORT = ["--train-n", "64", "--n", "16", "--epochs", "1", "--checks", "off", "--device", "cpu", "-q"]


def python(*words: str, **env: str) -> str:
    """A fresh interpreter in the working folder, which is first on its path."""
    root = str(catalog.ROOT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([env.pop("first", ""), root]).strip(os.pathsep), **env}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with packages `attacks` and `defenses` of its own, one file named as a built-in one."""
    monkeypatch.chdir(tmp_path)
    for kind in ("attacks", "defenses"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "__init__.py").write_text("raise RuntimeError('imported in place of the built-in package')")
    (tmp_path / "attacks" / "pgd.py").write_text("raise RuntimeError('imported in place of the built-in attack')")
    (tmp_path / "attacks" / "mine.py").write_text("VALUE = 7")
    return tmp_path


def test_a_folder_named_attacks_does_not_hide_built_in_attacks(taken: Path) -> None:
    listed = python("-m", "bench", "list", "attacks")
    assert [line.split()[0] for line in listed.splitlines() if line.startswith("  ")] == catalog.names("attacks")
    assert "mine" not in listed


@pytest.mark.parametrize("first", [False, True], ids=["working folder", "PYTHONPATH"])
def test_a_run_uses_the_built_in_attacks_beside_a_folder_of_that_name(taken: Path, first: bool) -> None:
    place = {"first": str(taken)} if first else {}
    out = python("-m", "bench", "run", *WORDS, *SHORT, **place)
    assert "pgd" in out


def test_a_users_modules_of_that_name_can_still_be_imported(taken: Path) -> None:
    code = "import bench.plugins, attacks.mine, attacks.pgd; print(attacks.mine.VALUE, attacks.pgd.PGD.__name__)"
    assert python("-c", code).split() == ["7", "PGD"]


def test_a_package_that_was_imported_before_is_replaced(taken: Path) -> None:
    (taken / "attacks" / "__init__.py").write_text("")
    (taken / "attacks" / "pgd.py").write_text("")
    code = "import attacks.pgd, bench.plugins; print(bench.plugins.load('attacks', 'pgd').__name__)"
    assert python("-c", code).split() == ["PGD"]


def announce(folder: Path, name: str, value: str) -> None:
    """An installed package that announces a plug-in by an entry point."""
    package = folder / "lab"
    package.mkdir()
    (package / "__init__.py").write_text(f"open({str(folder / 'imported')!r}, 'w').close()")
    (package / "still.py").write_text(ATTACK.format(title="Still"))
    about = folder / "lab-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[bench.attacks]\n{name} = {value}\n")


def test_an_entry_point_is_used_once_it_is_named(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, "still", "lab.still:Still")
    monkeypatch.syspath_prepend(tmp_path)
    assert "still" not in bench("list", "attacks").out
    assert "\n  still " in bench("list", "attacks", "--plugin", "still").out
    assert not (tmp_path / "imported").exists()  # it is read, and imported by its job alone
    checked = bench("check", "still", "--plugin", "still")
    assert (checked.code, checked.out.startswith("ok   attacks/still: ")) == (0, True), checked.out + checked.err
    missing = bench("list", "attacks", "--plugin", "stil")
    assert missing.code == 2
    assert "installed packages announce still" in missing.err


def test_an_entry_point_has_the_name_of_its_file(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, "calm", "lab.still")
    monkeypatch.syspath_prepend(tmp_path)
    refused = bench("list", "attacks", "--plugin", "calm")
    assert (refused.code, refused.err) == (
        2, "error: entry point calm leads to still.py; expected calm.py\n"
    )  # fmt: skip


def test_the_doctor_says_where_the_packages_come_from(taken: Path, bench: Bench) -> None:
    out = python("-m", "bench", "doctor")
    assert f"bench from {catalog.ROOT / 'bench'}" in out
    assert f"attacks from {catalog.ROOT / 'attacks'}; behind it {taken / 'attacks'}" in out
    assert f"defenses from {catalog.ROOT / 'defenses'}; behind it {taken / 'defenses'}" in out


def test_new_files_go_into_a_checkout_or_else_into_the_working_folder(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = tmp_path / "site-packages"
    installed.mkdir()
    monkeypatch.setattr(catalog, "ROOT", installed)
    made = bench("new", "attack", "mine")
    assert (made.code, made.out.splitlines()[0]) == (0, str(Path("attacks", "mine.py")))
    assert list(installed.iterdir()) == []
    (installed / "pyproject.toml").touch()
    assert bench("new", "attack", "other").out.splitlines()[0] == str(installed / "attacks" / "other.py")


def test_a_file_is_named_as_before(bench: Bench, tmp_path: Path) -> None:
    assert "wobble" in bench("list", "attacks", *write_plugins(tmp_path)).out
