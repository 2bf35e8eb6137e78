"""The commands of README and of the pages it leads to: each is parsed, planned or answered as it stands."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import nets
import pytest
import torch
from factories import evaluated, trained
from harness import Bench
from safetensors.torch import save_file

from bench.records.store import Store

ROOT = Path(__file__).parent.parent


def typed(*pages: str) -> list[str]:
    """The commands of `bench` that these pages show, without their comments."""
    return [
        line.split("#")[0].strip()
        for page in pages
        for language, block in re.findall(
            r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
        for line in block.splitlines()
        if not language and line.startswith("bench ")
    ]


LINES = typed("README.md", "docs/cli.md", "docs/training.md", "docs/own_model.md")
START = typed("docs/quickstart.md")
# names of a hub and of a zoo need files: tests/planning/test_hub_checkpoints.py, tests/models/test_packages.py
LOADED = re.compile(r"bench (eval (?!hf:|robustbench:)|doctor \w+\.)")
MODELS = [line for line in LINES if LOADED.match(line) and "PATH" not in line]
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


@pytest.fixture
def committed(tmp_path: Path) -> Store:
    """A copy of the records that come with the source."""
    return Store(Path(shutil.copytree(ROOT / "results", tmp_path / "results")))


def test_comparisons_and_sweeps_of_the_readme_are_answered_by_the_committed_records(
    committed: Store, bench: Bench
) -> None:
    asked = [line for line in LINES if line.split()[1] in ("compare", "sweep") and "--optuna" not in line]
    assert {line.split()[1] for line in asked} == {"compare", "sweep"}
    for line in asked:
        words = [str(committed.root / word[8:]) if word.startswith("results/") else word for word in shlex.split(line)]
        place = [] if "--results-dir" in words else ["--results-dir", committed.root]
        outcome = bench(*words[1:], *place)
        assert (outcome.code, outcome.err) == (0, ""), line
    assert "worst case" in outcome.out


def test_a_search_of_the_readme_is_right_but_for_what_is_added_here(bench: Bench) -> None:
    pytest.importorskip("optuna")
    asked = [line for line in LINES if "--optuna" in line]
    assert asked
    for line in asked:
        outcome = bench(*shlex.split(line)[1:], "--validation", 60_000)
        assert (outcome.code, outcome.out) == (2, "")
        assert "data.validation is 60000; expected less than the 60000 training images" in outcome.err, line


def test_the_comparison_of_the_quick_start_is_answered_beside_the_committed_records(
    committed: Store, bench: Bench
) -> None:
    """Its first run adds `standard` and `pgd_at` on digits to the records that come with the source."""
    assert "bench run --defense pgd_at" in START
    digits = {"data": {"name": "digits", "train": 1437}}
    for name, eps in (("standard", None), ("pgd_at", "0.1")):
        train = trained(committed, name, eps=eps, **digits)
        evaluated(committed, train, "clean", [1] * 8)
        evaluated(committed, train, "pgd", [int(eps is not None)] * 8)
    asked = [line for line in START if line.startswith("bench compare")]
    assert asked
    for line in asked:
        outcome = bench(*shlex.split(line)[1:], "--results-dir", committed.root)
        assert (outcome.code, outcome.err) == (0, ""), line
        assert outcome.out.startswith("digits, Linf eps 0.1")
