"""A matrix of jobs whose worker needs neither torch nor NumPy: what fault tests kill, starve and corrupt.

Records, samples and weights have the shape that real ones have, so that the real leaderboard is made of them.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from factories import toy_job

from bench.atomic import file_hash, write_atomic
from bench.executors.debug import Debug
from bench.executors.driver import drive
from bench.planning.job import Job
from bench.records.record import EvaluationMetrics, Metrics, PeakMemory, Provenance, Record, Time, TrainMetrics
from bench.records.store import IMAGES, SAMPLES, Store, weights_file

N = 16  # images of an evaluation


def matrix(trainings: int = 4, evaluations: int = 3) -> list[Job]:
    """Trainings with seeds 0, 1, ... and some evaluations of each."""
    jobs = []
    for number in range(trainings):
        train = toy_job(
            "train",
            {
                "engine": 1,
                "data": {"name": "toy", "train": 100, "validation": 0, "size": None},
                "model": {"name": "tiny", "set": {}, "revision": 1},
                "defense": {"name": "guard", "set": {}, "revision": 1},
                "threat": {"norm": "Linf", "eps": "0.1"},
                "recipe": "shared",
                "train": {"epochs": 2, "lr": 0.1},
                "seed": number,
            },
        )
        jobs.append(train)
        for name in ("clean", "steep", "onestep", "square")[:evaluations]:
            threat = None if name == "clean" else {"norm": "Linf", "eps": "0.1"}
            attack = {"name": name, "set": {}, "revision": 1}
            what = {"engine": 1, "attack": attack, "threat": threat, "n": N, "seed": number, "weights": "last"}
            jobs.append(toy_job("evaluate", what, (train.key,)))
    return jobs


def work(root: Path, key: str, data: Path, device: str) -> str:
    """What a worker does: files, then the record that names them. The outcome depends on the key alone."""
    store = Store(root)
    job, folder = store.job(key), store.folder(key)
    if job.kind == "train":
        files = {weights_file("last"): f"weights of {key}".encode() * 8}
        metrics: Metrics = TrainMetrics(
            train_seconds=10.0, seconds_per_epoch=5.0, predictor="deterministic", inference_ms_per_image=0.5
        )
    else:
        if file_hash(store.folder(job.needs[0]) / weights_file("last")) is None:
            raise ValueError(f"{key} began before its training ended")
        right = [byte > 60 for byte in hashlib.sha256(key.encode()).digest()[:N]]
        files = {SAMPLES: npz(index=list(range(N)), correct=right)}
        if job.threat:
            files[IMAGES] = f"images of {key}".encode() * 8
        metrics = EvaluationMetrics(n=N, test_hash="toy", attack_seconds=2.0)
    for name, content in files.items():
        write_atomic(folder / name, lambda file, content=content: file.write(content))  # type: ignore[misc]
    hashes = {name: file_hash(folder / name) for name in files}
    where = Provenance(commit="abc", dirty=False, device="CPU x", workers=1)
    time = Time("2026-01-01T00:00:00+00:00", 1.0)
    held = PeakMemory(rss=300.0)
    store.put(job, Record("done", metrics, files=hashes, provenance=where, time=time, peak_memory_mb=held))
    return "done"


def npz(**columns: list[Any]) -> bytes:
    """An uncompressed .npz of int64 and bool columns."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, values in columns.items():
            flags = isinstance(values[0], bool)
            kind, size = ("|b1", 1) if flags else ("<i8", 8)
            header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({len(values)},), }}"
            header = header.ljust(117) + "\n"
            body = b"".join(int(value).to_bytes(size, "little") for value in values)
            head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), head + body)
    return packed.getvalue()


def run(root: Path, jobs: list[Job], do: Callable[..., str] = work) -> dict[str, int]:
    """All jobs by the in-process executor, as `bench run --executor debug` does; gives the number of each event."""
    store = Store(root)
    store.prepare()
    counts: dict[str, int] = {}
    for event in drive(Debug(root, work=do), jobs, store):
        if event.kind != "tick":
            counts[event.kind] = counts.get(event.kind, 0) + 1
    return counts


def told(path: Path) -> Callable[..., str]:
    """The worker above, which notes in `path` that it begins with a job, and that it has told somebody of its end."""

    def do(root: Path, key: str, data: Path, device: str) -> str:
        note(path, f"begin {key}")
        state = work(root, key, data, device)
        note(path, f"end {key}")
        return state

    return do


def note(path: Path, line: str) -> None:
    """One line, whole and on disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def contents(root: Path) -> dict[str, bytes]:
    """Every file of every job folder: to be compared bit by bit."""
    files = [path for path in sorted(root.glob("*/*")) if path.parent.name != "quarantine" and path.is_file()]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}
