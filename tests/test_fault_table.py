"""The table of planted faults: each can still be planted, and the tests that must find it exist."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fault_table import FAULTS
from paths import ROOT, TESTS


def test_each_fault_can_be_planted() -> None:
    for fault in FAULTS:
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        assert text.count(fault.old) == 1, fault
        assert fault.new != fault.old, fault
        ast.parse(text.replace(fault.old, fault.new))
        files = [Path(word.partition("::")[0]) for word in fault.tests.split() if word.startswith("tests/")]
        assert files, fault
        assert all((ROOT / file).is_file() for file in files), fault


def test_no_fault_is_planted_twice() -> None:
    assert len({(fault.file, fault.old, fault.new) for fault in FAULTS}) == len(FAULTS) >= 60


def test_the_page_cites_the_stored_runs() -> None:
    record = json.loads((ROOT / "benchmarks/results/planted_faults.json").read_text(encoding="utf-8"))
    assert len(record["faults"]) == record["planted"] == len(FAULTS)
    assert not [entry for entry in record["faults"] if "dirty" in entry["commit"]]
    page = " ".join((ROOT / "docs/reliability.md").read_text(encoding="utf-8").split())
    assert f"{record['found']} of {record['planted']} found" in page
    assert record["found"] >= record["planted"] - 3


@pytest.mark.slow
def test_three_of_them_drawn_at_random_are_found(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, str(TESTS / "planted_faults.py"), "--sample", "3", "--record", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["outcome"] for entry in json.loads(record.read_text())["faults"]] == ["found"] * 3
