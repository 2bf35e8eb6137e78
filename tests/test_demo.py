"""The demo as a user runs it: real defenses and attacks on digits, then again, then the tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.records.store import Store
from bench.results.evaluations import evaluations
from bench.results.rows import rows

LAST = "autoattack_fast (audit=100)"
SPEC = Path(__file__).parent.parent / "specs" / "demo.yaml"


def bench(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *words]
    return subprocess.run(command, cwd=cwd, env=dict(os.environ), capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_the_demo_runs_once_and_resumes_to_nothing(tmp_path: Path) -> None:
    first = bench("run", str(SPEC), "--json", cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    events = [json.loads(line)["event"] for line in first.stdout.splitlines()]
    assert events.count("ok") == 51  # 5 trainings, 36 evaluations, 10 audits
    assert set(events) == {"started", "ok", "row"}

    again = bench("run", str(SPEC), "--json", cwd=tmp_path)
    assert {json.loads(line)["event"] for line in again.stdout.splitlines()} == {"skipped", "row"}

    store = Store(tmp_path / "results")
    found = {row.defense: row for row in rows(store, evaluations(store).readable)}
    assert set(found) == {"standard", "noisy", "pgd_at", "trades", "smoothing"}
    for row in found.values():
        assert row.accuracy.worst.n == 360
        strongest = row.accuracy.attacks["eot (base=pgd, draws=[1, 16])" if row.defense == "smoothing" else LAST]
        assert row.accuracy.worst.mean <= min(strongest.mean, row.accuracy.clean.mean)
        assert row.provisional == ()
    # what nobody doubts: adversarial training helps against a budget at which the plain net loses half its accuracy
    assert found["pgd_at"].accuracy.worst.mean > found["standard"].accuracy.worst.mean + 0.15
    assert found["smoothing"].accuracy.certified[0.25].mean > found["smoothing"].accuracy.certified[0.5].mean > 0.2

    shown = bench("run", str(SPEC), cwd=tmp_path).stdout
    assert "†" not in shown
    assert "flags" not in shown
    assert shown.count(" OK ") == 5

    made = bench("leaderboard", "--output", "board.md", cwd=tmp_path)
    assert made.returncode == 0
    text = (tmp_path / "board.md").read_bytes()
    assert bench("leaderboard", "--output", "board.md", cwd=tmp_path).returncode == 0
    assert (tmp_path / "board.md").read_bytes() == text
    assert b"pgd\\_at" in text
