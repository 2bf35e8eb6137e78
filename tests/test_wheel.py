"""The wheel away from the checkout: installed into a folder of its own and used in an empty one."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

from bench.planning import shipped_specs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel of this source is installed in, without its dependencies."""
    made, target = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(made), str(ROOT)]
    subprocess.run([*pip, *build], check=True, timeout=200)
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert [name for name in names if name.startswith(("tests/", "results/", "docs/"))] == []
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=200)
    return target


def test_the_wheel_runs_a_spec_by_name_and_writes_plug_ins_into_the_working_folder(
    installed: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "BENCH_CACHE": str(tmp_path / "cache")}
    folder = tmp_path / "work"
    folder.mkdir()

    def call(*words: str, program: str = "bench") -> str:
        command = [sys.executable, str(installed / "bin" / program), *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [sys.executable, "-c", "import bench; print(bench.__file__)"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()) == installed / "bench" / "__init__.py"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert call("--version") == f"bench {version} from {installed / 'bench'}\n"
    listed = call("list", "specs", program="defense-bench")
    assert [line.split()[0] for line in listed.splitlines()] == list(shipped_specs.names())
    assert "| noisy" in call("run", "demo", "--n", "20", "--epochs", "1", "--workers", "1", "--checks", "off").replace(
        "│", "|"
    )
    assert "wong_mnist" in call("reproduce")
    call("leaderboard")
    call("report", "--output", "report.html")
    call("new", "defense", "mine")
    assert {path.name for path in folder.iterdir()} >= {"results", "leaderboard.md", "report.html", "defenses"}
    assert not (installed / "defenses" / "mine.py").exists()
    assert "mine" in call("check", "defenses/mine.py")
