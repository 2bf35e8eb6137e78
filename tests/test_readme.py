"""The commands of README, docs/training.md and docs/own_model.md: each is parsed and planned as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import nets
import pytest
import torch
from harness import Bench
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
LINES = [
    line.split("#")[0].strip()
    for page in ("README.md", "docs/training.md", "docs/own_model.md")
    for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.startswith("bench ")
]
MODELS = [line for line in LINES if line.startswith("bench eval") or re.match(r"bench doctor \w+\.", line)]
RUNS = [line for line in LINES if line.startswith("bench run") and not re.search("FOLDER|PATH|my_method", line)]


@pytest.mark.parametrize("line", RUNS)
def test_a_run_of_the_readme_can_be_planned(line: str, bench: Bench) -> None:
    words = [str(ROOT / word) if word.startswith("specs/") else word for word in shlex.split(line)[2:]]
    outcome = bench("plan", *words)
    assert (outcome.code, outcome.err) == (0, "")
    assert "to do" in outcome.out


@pytest.mark.parametrize("line", MODELS)
def test_a_model_of_the_readme_can_be_loaded(line: str, bench: Bench) -> None:
    net = nets.mlp(width=256, depth=2)
    save_file(net.state_dict(), "net.safetensors")
    torch.save(net.state_dict(), "net.pt")
    torch.save(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).state_dict(), "linear.pt")
    Path("my.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    words = shlex.split(line)[1:]
    if words[0] == "doctor":
        outcome = bench(*words)
        assert (outcome.code, outcome.err) == (4, "")  # these weights were never trained
        assert "OK    loading: net.safetensors" in outcome.out
        return
    outcome = bench(*words, "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    assert "to do" in outcome.out


def test_every_command_of_the_readme_exists(bench: Bench) -> None:
    named = {line.split()[1] for line in LINES}
    assert {"run", "plan", "status", "leaderboard", "list", "doctor", "new", "check", "eval"} <= named
    known = bench("--help").out
    assert [name for name in named if f" {name} " not in known] == []
