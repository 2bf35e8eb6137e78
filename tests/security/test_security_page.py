"""docs/reliability.md shows the figures that the security tests run with."""

from __future__ import annotations

from pathlib import Path

import fuzzed
import test_checkpoints
import test_dependencies
import test_names
import test_plugins_by_name
import test_quiet_run
import test_yaml

PAGE = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_the_page_shows_what_the_tests_run_with() -> None:
    told = {line.split(" | ")[0].strip("| "): line for line in PAGE.splitlines() if line.startswith("| S")}
    assert set(told) == {f"S{number}" for number in range(1, 13)}
    rows = [line for line in PAGE.splitlines() if line.startswith("| S")]
    secrets = len({*test_quiet_run.SECRETS.values(), test_quiet_run.HOME})
    shown = {
        "S1": f"| {len(test_checkpoints.HOSTILE)} files |",
        "S3": f"| {len(test_yaml.BAD)} documents | {len(test_yaml.BAD)} refused",
        "S4": f"hostile names in {len(test_names.COMMANDS)} commands",
        "S5": f"| {fuzzed.COUNT} strings |",
        "S6": f"in {len(test_plugins_by_name.PLACES)} places",
        "S7": f"| {len(test_dependencies.REVIEWED)} of {len(test_dependencies.REVIEWED)} |",
        "S10": f"| {secrets} secrets |",
    }
    assert [
        name
        for name, text in shown.items()
        if not any(line.startswith(f"| {name} |") and text in line for line in rows)
    ] == []
    assert f"| {len(test_names.NAMES)} names, 9 links |" in PAGE
