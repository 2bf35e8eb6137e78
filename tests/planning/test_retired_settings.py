"""Records of settings that a plug-in no longer has: still read, listed and shown; only not computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_store
import pytest
from harness import Bench

from bench.planning.job import Job
from bench.planning.job_json import job_of
from bench.planning.labels import label

RESULTS = Path("results")
OLD: dict[str, Any] = {
    **{"sigma": 0.3, "learn_sigma": False, "site": "input", "structure": "diag", "rows": 1, "probes": 1},
    **{"relu": "adf", "target": "logits", "w_mse": 0.0, "w_prob": 0.0, "w_ece": 1.0},
}


def jobs() -> list[Job]:
    """Two trainings with settings that left, and a clean evaluation and an attack on each."""
    found = []
    for settings in (OLD, {**OLD, "site": ["input", 0], "structure": "sampled", "scale": "relative"}):
        for job in fake_store.matrix(1, 2):
            if job.kind == "train":
                defense = {"name": "noisy", "set": settings, "revision": 1}
                train = job_of("train", {**job.content(), "defense": defense, "threat": None})
                found.append(train)
            else:
                found.append(job_of(job.kind, job.content(), (train.key,)))
    return found


@pytest.mark.parametrize("command", ["leaderboard", "report", "compare", "status", "timing"])
def test_old_records_are_read_and_shown(bench: Bench, command: str) -> None:
    made = jobs()
    fake_store.run(RESULTS, made)
    words = [job.key for job in made if job.kind == "train"] if command == "compare" else []
    words += ["--output", "out"] if command in ("leaderboard", "report") else []
    outcome = bench(command, *words, "--results-dir", RESULTS)
    assert outcome.code == 0, outcome.err
    if command in ("leaderboard", "report"):
        assert "structure=sampled" in Path("out").read_text(encoding="utf-8")


def test_labels_name_removed_settings_with_another_value_than_the_last() -> None:
    assert label("defenses", "noisy", OLD) == (
        "noisy (relu=adf, sigma=0.3, site=input, structure=diag, w_ece=1, w_mse=0, w_prob=0)"
    )
    assert "relu" not in label("defenses", "noisy", {**OLD, "relu": "laplace"})
