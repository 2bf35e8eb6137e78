"""The gate of `bench run` and `bench eval`: limits, files, exit codes, and the page and action that describe it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from harness import Bench

ROOT = Path(__file__).parents[2]
RUN = ["run", "--dataset", "digits", "--eps", "0.02", "--attack", "clean,fgsm", "--n", "60", "--epochs", "4"]
RUN += ["--executor", "debug", "--checks", "off"]


@pytest.fixture
def net(bench: Bench) -> Path:
    """The weights of a small net that reads digits, in the working folder."""
    assert bench(*RUN, "--defense", "standard", "--results-dir", "trained").code == 0
    (weights,) = Path("trained").rglob("weights-last.safetensors")
    shutil.copy(weights, "net.safetensors")
    return Path("net.safetensors")


def page_command() -> list[str]:
    """The first command of docs/ci.md as words after `bench`."""
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)
    return shlex.split(block.replace("\\\n", " "))[1:]


def test_the_example_of_the_page_passes_and_a_higher_limit_fails(bench: Bench, net: Path) -> None:
    words = [*page_command(), "--attack", "clean,fgsm", "--workers", "1"]
    passed = bench(*words)
    assert passed.code == 0, passed.err
    (suite,) = ElementTree.parse("bench.xml").iter("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("1", "0")
    failed = bench(*words, "--min-robust", "0.999", "--json")
    assert failed.code == 4
    assert re.search(
        r"gate: worst case of net at Linf eps 0.02: 0\.\d+ \(100 images, .*\); --min-robust is 0.999", failed.err
    )
    row = json.loads(failed.out.splitlines()[-1])
    assert (row["event"], row["method"], row["n"], row["eps"]) == ("row", "net", 100, "0.02")
    assert row["low"] < row["robust"] < row["high"] < 1
    assert len(row["failures"]) == 1
    (case,) = ElementTree.parse("bench.xml").iter("testcase")
    assert [failure.get("type") for failure in case.iter("failure")] == ["min-robust"]
    (run,) = json.loads(Path("bench.sarif").read_text())["runs"]
    limit = next(result for result in run["results"] if result["ruleId"] == "min-robust")
    assert limit["level"] == "error"
    assert limit["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "net.safetensors"
    assert {result["ruleId"] for result in run["results"]} == {rule["id"] for rule in run["tool"]["driver"]["rules"]}


def test_the_action_runs_the_command_of_the_page(net: Path) -> None:
    action = yaml.safe_load((ROOT / ".github" / "actions" / "bench" / "action.yml").read_text())
    example = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "ci.md").read_text(), re.DOTALL)
    assert example is not None
    steps = yaml.safe_load(example[1])["jobs"]["robustness"]["steps"]
    given = next(step["with"] for step in steps if step["uses"] == "./.github/actions/bench")
    values = {name: given.get(name, about.get("default", "")) for name, about in action["inputs"].items()}
    values["options"] += " --attack clean,fgsm --workers 1"
    step = action["runs"]["steps"][-1]
    found = {
        name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda m: values[m[1]], text)
        for name, text in step["env"].items()
    }
    folder = Path("bin")
    folder.mkdir()
    script = f"#!{sys.executable}\nfrom bench.cli import main\nif __name__ == '__main__':\n    main()\n"
    (folder / "bench").write_text(script)
    (folder / "bench").chmod(0o755)
    environment = {**os.environ, **found, "PATH": f"{folder.resolve()}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "gate:" not in done.stderr
    assert Path("bench.sarif").is_file()


def test_a_limit_is_met_by_its_own_value_and_missed_by_a_little_less(bench: Bench, net: Path) -> None:
    words = [*page_command(), "--attack", "clean,fgsm", "--workers", "1", "--json"]
    outcome = bench(*words)
    robust = json.loads(outcome.out.splitlines()[-1])["robust"]
    assert bench(*words, "--min-robust", str(robust)).code == 0
    assert bench(*words, "--min-robust", str(robust + 0.001)).code == 4


def test_the_baseline_beside_other_defenses_is_not_measured_by_the_limits(bench: Bench) -> None:
    both = bench(*RUN, "--defense", "standard,noisy", "--min-robust", "0.9999", "--min-clean", "0.9999")
    assert both.code == 4
    assert [line.split(": ")[1] for line in both.err.splitlines() if line.startswith("gate: ")] == [
        "worst case of noisy at Linf eps 0.02", "clean accuracy of noisy at Linf eps 0.02"
    ]  # fmt: skip
    alone = bench(*RUN, "--defense", "standard", "--min-clean", "0.9999")
    assert alone.code == 4
    assert "clean accuracy of standard" in alone.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--min-robust", "60"], "'--min-robust': Input should be less than or equal to 1"),
        (["--min-clean", "0.5", "--attack", "fgsm"], "--min-clean needs the attack clean"),
        (["--min-robust", "0.5", "--attack", "clean"], "--min-robust needs an attack"),
        (["--junit", "nowhere/a.xml"], "--junit nowhere/a.xml: no folder nowhere"),
        (["--sarif", "."], "--sarif . is a folder"),
    ],
)
def test_a_limit_that_cannot_be_checked_is_an_error_before_anything_runs(
    bench: Bench, words: list[str], message: str
) -> None:
    done = bench("run", "--dataset", "digits", "--eps", "0.02", "--results-dir", "none", *words)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert not Path("none").exists()


def test_a_badge_shows_one_row_and_its_verdict(bench: Bench) -> None:
    bench(*RUN, "--defense", "standard,noisy", "--results-dir", "r")
    done = bench("badge", "--results-dir", "r", "--defense", "noisy")
    assert done.code == 0, done.err
    svg = ElementTree.parse("robustness.svg").getroot()
    title = svg.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert re.fullmatch(r"robust accuracy: \d+\.\d % ± \d+\.\d, Linf 0\.02, n=60, NOT CHECKED", title.text or "")
    assert "not" not in done.out
    several = bench("badge", "--results-dir", "r", "--defense", "standard,noisy")
    assert several.code == 2
    assert "a badge is about one row, found 2 rows" in several.err
