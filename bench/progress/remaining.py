"""How long jobs still take: those that run, from what they say; those that were stopped, from what they kept.

Reads the results folder only, and no torch: it serves `bench plan`, `bench status` and the live view alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench.executors.schedule import bound
from bench.planning.job import Job
from bench.records.leases import holder_of
from bench.records.runtime_estimate import Estimator
from bench.records.store import Store

TELLING = 0.05  # share of a job from which on its own speed is worth more than that of others
HEADER = 2**24  # bytes; a longer header is none of ours


class Left(NamedTuple):
    """What is left of a job: seconds, None where nobody knows; `done`: seconds of work that are behind it."""

    seconds: float | None
    done: float = 0.0
    running: bool = False


def left(store: Store, job: Job, estimator: Estimator) -> Left:
    """Seconds until a job that is not over would be, on a slot of its own."""
    says, whole = store.progress(job.key), estimator.seconds(job)
    if not runs(store, job.key):
        kept = kept_seconds(store.folder(job.key))
        return Left(None if whole is None else max(whole - kept, 0.0), kept)
    now = time.time()
    share, began = float(says.get("share", 0.0)), says.get("began", now)
    at = says["now"] if says.get("now", 0.0) >= began else now  # when it last said something
    done = float(says.get("earlier", 0.0)) + max(at - began, 0.0)
    silent = max(now - at, 0.0)
    by_itself = done * (1 - share) / share if share > TELLING else None
    by_others = whole - done if whole is not None and whole > done + silent else None
    # a share of the images or steps of a training is one of its time; that of an attack's stages is not
    order = (by_itself, by_others) if job.kind == "train" else (by_others, by_itself)
    found = next((seconds for seconds in order if seconds is not None), None)
    return Left(None if found is None else max(found - silent, 0.0), done + silent, True)


def runs(store: Store, key: str) -> bool:
    """Is somebody at this job? Whoever is holds its lease; what it said outlives a stop."""
    return holder_of(store, key) is not None


def together(store: Store, jobs: Iterable[Job], estimator: Estimator, lanes: int) -> tuple[float, int]:
    """Seconds until all these jobs are over on so many lanes, and the number of jobs nothing is known about.

    Whatever waits for another job waits here too, and a single long job is not shared among lanes.
    """
    found = {job.key: (job, left(store, job, estimator).seconds) for job in jobs}
    known = {key: seconds for key, (_, seconds) in found.items() if seconds is not None}
    return bound([found[key][0] for key in known], known, lanes), len(found) - len(known)


def kept_seconds(folder: Path) -> float:
    """Seconds of work that a job which was stopped has kept: what it will not do again, unless code was changed."""
    return sum((_seconds(path) for path in (folder / "blocks").glob("*.safetensors")), 0.0)


def _seconds(path: Path) -> float:
    """What the head of a kept file (bench.training.checkpoint) says: of a block of images, or of a training."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            facts = json.loads(file.read(length if length < HEADER else 0)).get("__metadata__", {})
        return float(facts["seconds"] if "seconds" in facts else json.loads(facts["state"])["now"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0.0
