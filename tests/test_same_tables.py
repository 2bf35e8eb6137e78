"""The demo, without two of its defenses and audits, gives the same tables on this machine, on Slurm and on Ray: only
times differ."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import outcomes
from slurm_cluster import slurm  # noqa: F401  # a fixture

from bench.tables.overview import COST

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SPEC = Path(__file__).parent.parent / "specs" / "demo.yaml"
TIMES = ("attack_seconds", "train_seconds", "seconds_per_epoch", "inference_ms", "peak_memory_mb")
SHARED = ("workers", "attack_workers")  # how many jobs were on the device differs as well
LESS = ("--defense", "standard,noisy,smoothing", "--checks", "off")
# what depends on the moment; a front counts seconds as well
COLUMNS = ("Training s (× standard)", "Attacks s", "Peak GB", "Pareto front", COST)


def bench(*words: object) -> None:
    command = [sys.executable, "-m", "bench", *map(str, words)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr


def run(folder: Path, *options: object) -> Path:
    """The demo, and its tables beside the records."""
    bench("run", SPEC, *LESS, "--device", "cpu", "-q", "--results-dir", folder / "results", *options)
    bench("leaderboard", "--results-dir", folder / "results", "--output", folder / "leaderboard.md")
    return folder


def board(folder: Path) -> list[str]:
    """leaderboard.md without the cells of times, memory and fronts."""
    found: list[str] = []
    left_out: set[int] = set()
    for line in (folder / "leaderboard.md").read_text(encoding="utf-8").splitlines():
        cells = line.removesuffix(" |").split(" | ")
        if cells[0] == "| Rank":
            left_out = {cells.index(name) for name in COLUMNS if name in cells}
        kept = [cell for place, cell in enumerate(cells) if place not in left_out]
        found.append(" | ".join(kept) if len(cells) > 1 else line)
    return found


def evaluations(folder: Path) -> list[dict[str, str]]:
    """evaluations.csv without times, memory and neighbors."""
    with (folder / "results" / "tables" / "evaluations.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(TIMES + SHARED) <= set(rows[0])
    return [{name: cell for name, cell in row.items() if name not in TIMES + SHARED} for row in rows]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("here"), "--workers", 2)


@pytest.mark.parametrize("executor", ["slurm", "ray"])
def test_the_demo_gives_the_same_tables(
    executor: str, here: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if executor == "slurm":
        request.getfixturevalue("slurm")
    else:
        pytest.importorskip("ray", reason="ray is not installed: pip install 'defense-bench[ray]'")
    there = run(tmp_path, "--executor", executor)
    same: list[Any] = [outcomes(folder / "results") for folder in (here, there)]
    assert len(same[0]) == 25
    assert same[0] == same[1]
    assert board(there) == board(here)
    assert sum(COLUMNS[0] in line for line in (here / "leaderboard.md").read_text().splitlines()) == 2
    assert evaluations(there) == evaluations(here)
