"""Jobs that need no torch: what they do stands in a file `<key>.do` of the data folder, which is no part of a key.

A worker finds `work` here by name, as it finds bench.jobs.worker.work in a real run. A line of the file is read at each
start, the last one again and again: ok, raise, kill, sleep, oom, device, host (SIGKILL counted as the kernel's),
polite (saves when asked to stop), deaf (does not stop when asked), family (sleeps with a child in a group of its own),
clan (whose child has one too). A number behind it: seconds until it ends, by a kill too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from factories import toy_job

from bench.executors.base import Event
from bench.planning.job import Job, TrainJob
from bench.records.record import EvaluationMetrics, JobError, PeakMemory, Record, Retry, State, TrainMetrics
from bench.records.store import Store

ERRORS = {
    "raise": ("RuntimeError", "broken on purpose"),
    "oom": ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB"),
    "device": ("AcceleratorError", "CUDA error: an illegal memory access was encountered"),
}


def train(seed: int, images: int = 100, defense: str = "standard") -> Job:
    """A training; its length follows its images."""
    about = {"data": {"name": "digits", "train": images}, "model": {"name": "mlp"}, "train": {"epochs": 1}}
    return toy_job("train", {**about, "defense": {"name": defense, "set": {}}, "seed": seed})


def evaluate(trained: Job, n: int = 100, attack: str = "pgd") -> Job:
    """An evaluation of a training; its length follows its images."""
    what = {"attack": {"name": attack, "set": {}}, "n": n, "seed": 0, "threat": {"norm": "Linf", "eps": "0.1"}}
    return toy_job("evaluate", what, (trained.key,))


def measured(store: Store, job: Job, seconds: float, cuda: float | None = None) -> None:
    """A past record of a job: what estimates come from."""
    store.add(job)
    train = job.kind == "train"
    metrics = TrainMetrics(train_seconds=seconds) if train else EvaluationMetrics(attack_seconds=seconds)
    store.put(job, Record("done", metrics, peak_memory_mb=PeakMemory(rss=100.0, cuda=cuda)))


def says(root: Path, job: Job, *lines: str) -> None:
    """What a job does at its first start, its second one, ..."""
    (root / f"{job.key}.do").write_text("\n".join(lines))


def starts(root: Path, job: Job) -> list[dict[str, Any]]:
    """What each start of a job was told: time, environment, workers, retries."""
    path = root / f"{job.key}.starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def order(events: Sequence[Event]) -> list[str]:
    """Keys in the order in which they started."""
    return [event.job.key for event in events if event.kind == "started" and event.job]


def kinds(events: Sequence[Event], job: Job) -> list[str]:
    """What happened to a job."""
    return [event.kind for event in events if event.job == job]


def work(results: Path, key: str, root: Path, device: str, workers: int, before: Sequence[Retry]) -> str:
    """Body of a fake worker, in place of bench.jobs.worker.work."""
    store = Store(results)
    job, file = store.job(key), root / f"{key}.do"
    lines = file.read_text().splitlines() if file.exists() else ["ok"]
    told = root / f"{key}.starts"
    count = len(told.read_text().splitlines()) if told.exists() else 0
    shown = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")}
    line = {
        "at": time.monotonic(),
        "device": device,
        "pid": os.getpid(),
        "workers": workers,
        "before": [each.step for each in before],
    }
    with told.open("a") as out:
        out.write(json.dumps({**line, "shown": shown}) + "\n")
    act, _, amount = lines[min(count, len(lines) - 1)].partition(" ")
    _misbehave(act, float(amount) if amount else 0.0, root / f"{key}.saved", root / f"{key}.child")
    time.sleep(float(amount) if amount else 0.0)
    bad = root / f"{key}.bad"  # names a GPU that is lost
    act = "device" if bad.exists() and bad.read_text() == shown["CUDA_VISIBLE_DEVICES"] else act
    trained = isinstance(job, TrainJob)
    metrics = TrainMetrics(train_seconds=1.0) if trained else EvaluationMetrics(attack_seconds=1.0)
    peak = PeakMemory(rss=50.0, cuda=2000.0 if device == "cuda" else None)
    error = JobError(*ERRORS[act]) if act in ERRORS else None
    state: State = "oom" if act == "oom" else "error" if error else "done"
    store.put(job, Record(state, metrics, error=error, peak_memory_mb=peak, retries=tuple(before)))
    return state


def _misbehave(act: str, seconds: float, saved: Path, child: Path) -> None:
    if act in ("kill", "host"):
        time.sleep(seconds)
        if act == "host":
            (saved.parent / "kernel").open("a").write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if act in ("family", "clan"):
        words = [sys.executable, "-c", "import time; time.sleep(300)"]
        if act == "clan":
            inner = f"subprocess.Popen({words!r}, start_new_session=True)"
            words[-1] = f"import subprocess, time; print({inner}.pid, flush=True); time.sleep(300)"
        sleeper = subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        below = [str(sleeper.pid)]
        if act == "clan" and sleeper.stdout is not None:
            below.append(sleeper.stdout.readline().decode().strip())
        child.write_text(" ".join(below))
    try:
        while act in ("sleep", "polite", "deaf", "family", "clan"):
            time.sleep(0.02)
    except SystemExit:
        if act == "polite":
            saved.write_text("saved")
        raise
