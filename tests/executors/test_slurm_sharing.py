"""Slurm under stress: jobs put back in mid-training, and a results folder shared with other drivers and workers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import Bench, outcomes, states, tiny, write_plugins
from slurm_cluster import active, empty_queue, requeue, slurm, start, tasks, until  # noqa: F401  # with fixtures

from bench.records.leases import holder_of
from bench.records.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm", "empty_queue"), pytest.mark.timeout(900)]
ON = ["--executor", "slurm"]
COUNTED = '''"""min CE, a step in 30 ms

Nobody (2024).
"""
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
import torch.nn.functional as F
from torch import nn
from bench.core.defense import Batch, Defense, Losses

@dataclass
class Counted(Defense):
    uses_threat: ClassVar[bool] = False
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        if len(batch.x) > 2:  # no trial step
            with Path(__file__).with_suffix(".seen").open("a") as file:
                file.write(".")
            time.sleep(0.03)
        noise = batch.x.new_empty(batch.x.shape).normal_()
        return {"ce": F.cross_entropy(net(batch.x + 0.1 * noise), batch.y)}
'''
EPOCHS, STEPS, REQUEUES = 20, 25, 10


def lines(folder: Path) -> list[dict[str, Any]]:
    """train.jsonl without its times."""
    return [{**json.loads(line), "seconds": 0} for line in (folder / "train.jsonl").read_text().splitlines()]


def test_ten_requeues_in_mid_training_change_no_bit_and_repeat_no_step(bench: Bench, tmp_path: Path) -> None:
    """F7. Slurm sends SIGTERM; the training is kept, and goes on where it was, under the same job."""
    (tmp_path / "counted.py").write_text(COUNTED)
    seen = tmp_path / "counted.seen"
    train = ("--train-n", 20 * STEPS, "--epochs", EPOCHS, "--set", "train.batch_size=20", "--set", "train.average=ema")
    words = [*tiny("--plugin", tmp_path / "counted.py", defense="counted", attack="clean"), *train]
    assert bench(*words, "--results-dir", tmp_path / "here").code == 0
    assert seen.stat().st_size == EPOCHS * STEPS
    seen.write_text("")
    there = Store(tmp_path / "there")
    driver = start(*words, "--results-dir", there.root, *ON)
    try:
        until(lambda: there.root.is_dir() and len(there.jobs()) == 2)
        key = next(job.key for job in there.jobs().values() if job.kind == "train")
        made = [0]
        for _ in range(REQUEUES):
            until(lambda: seen.stat().st_size >= made[-1] + 5)
            (task,) = tasks("RUNNING")
            requeue(task)
            made.append(seen.stat().st_size)
        out, err = driver.communicate(timeout=200)
    finally:
        driver.kill()
    assert driver.returncode == 0, out + err
    assert made[-1] < EPOCHS * STEPS  # all of them came in mid-training
    assert outcomes(there.root) == outcomes(tmp_path / "here")  # the SHA-256 of the weights among them
    assert lines(there.root / key) == lines(tmp_path / "here" / key)
    assert [line["epoch"] for line in lines(there.root / key)] == list(range(1, EPOCHS + 1))
    assert seen.stat().st_size == EPOCHS * STEPS  # no step was made twice
    record, log = there.record(key), (there.root / key / "log.txt").read_text()
    assert record is not None
    assert record.metrics.resumed == REQUEUES
    assert [int(found) for found in re.findall(r"resumes after (\d+) steps", log)] == made[1:]


def begun(results: Path) -> Counter[str]:
    """How often each job was begun, by its log."""
    found: Counter[str] = Counter()
    for path in results.glob("*/log.txt"):
        found[path.parent.name] = len(re.findall(rf"^\w+ {path.parent.name} on cpu, pid", path.read_text(), re.M))
    return found


@pytest.mark.parametrize("other", [["--workers", 1], ON], ids=["local", "slurm"])
def test_two_drivers_share_a_folder_and_each_job_is_done_once(
    bench: Bench, tmp_path: Path, other: list[object]
) -> None:
    words = tiny("--seeds", "0,1,2", *write_plugins(tmp_path), attack="clean,wobble", defense="plain,fragile")
    assert bench(*words, "--results-dir", tmp_path / "here").code == 0
    there = tmp_path / "there"
    drivers = [start(*words, "--results-dir", there, *more) for more in (ON, other)]
    try:
        said = [driver.communicate(timeout=500) for driver in drivers]
    finally:
        for driver in drivers:
            driver.kill()
    assert [driver.returncode for driver in drivers] == [0, 0], said
    assert outcomes(there) == outcomes(tmp_path / "here")
    assert begun(there) == dict.fromkeys(Store(there).keys(), 1)
    assert len(begun(there)) == 18


def test_a_job_that_somebody_does_by_hand_is_left_to_him(bench: Bench, tmp_path: Path) -> None:
    """Slurm's task finds it held and leaves; what waits for it, which Slurm then drops, is submitted again."""
    plugins = write_plugins(tmp_path)
    (tmp_path / "fragile.todo").write_text("sleep")
    words = [*tiny(*plugins, defense="fragile", attack="clean"), "--results-dir", tmp_path / "r"]
    script = bench(*words, *ON, "--print-script")
    assert script.code == 0
    (tmp_path / "all.sh").write_text(script.out)
    store = Store(tmp_path / "r")
    (key,) = (job.key for job in store.jobs().values() if job.kind == "train")
    command = [sys.executable, "-m", "bench", "worker", key, "--results-dir", str(store.root), *map(str, plugins)]
    worker = subprocess.Popen(command, env=dict(os.environ))
    try:
        until(lambda: holder_of(store, key) is not None and store.progress(key))
        driver = start(*words, *ON)
        subprocess.run(["bash", tmp_path / "all.sh"], check=True, stdout=subprocess.DEVNULL)
        until(lambda: "is held" in (store.folder(key) / "log.txt").read_text())
        until(lambda: not active())  # Slurm gave up both jobs of the script
        assert worker.poll() is None
        assert driver.poll() is None
        (tmp_path / "fragile.todo").unlink()
        assert worker.wait(timeout=60) == 0
        out, err = driver.communicate(timeout=200)
    finally:
        worker.kill()
        driver.kill()
    assert driver.returncode == 0, out + err
    assert "1 job run, 1 already done" in out
    assert states(store.root) == {"fragile": "done", "fragile/clean": "done"}
    assert set(begun(store.root).values()) == {1}
