"""The README's commands are commands: each is parsed and planned as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from harness import Bench

ROOT = Path(__file__).parent.parent
LINES = [
    line.split("#")[0].strip()
    for block in re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("bench ")
]
RUNS = [line for line in LINES if line.startswith("bench run") and not re.search("FOLDER|PATH|my_method", line)]


@pytest.mark.parametrize("line", RUNS)
def test_a_run_of_the_readme_can_be_planned(line: str, bench: Bench) -> None:
    words = [str(ROOT / word) if word.startswith("specs/") else word for word in shlex.split(line)[2:]]
    outcome = bench("plan", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert "to do" in outcome.out


def test_every_command_of_the_readme_exists(bench: Bench) -> None:
    named = {line.split()[1] for line in LINES}
    assert {"run", "plan", "status", "leaderboard", "list", "doctor", "new", "check"} <= named
    known = bench("--help").out
    assert [name for name in named if f" {name} " not in known] == []
