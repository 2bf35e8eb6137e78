"""Time until jobs are done: of running ones from their progress, of stopped ones from their checkpoints.

The only place that computes it, for `bench plan`, `bench status` and the live view. Reads the results folder only;
torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from bench.executors.schedule import bound
from bench.planning.job import Job, TrainJob
from bench.progress.saved import saved_seconds
from bench.records.leases import holder_of
from bench.records.runtime_estimate import Estimator, clock
from bench.records.store import Store
from bench.terminal import counted

RELIABLE = 0.05  # progress from which the speed of the job itself is used instead of that of past jobs


class Left(NamedTuple):
    """Time left of a job: seconds, None if unknown; `done`: seconds of work that are finished."""

    seconds: float | None
    done: float = 0.0
    running: bool = False


def left(store: Store, job: Job, estimator: Estimator) -> Left:
    """Seconds until an unfinished job is done, on a slot of its own."""
    progress, whole = store.progress(job.key), estimator.seconds(job)
    if not runs(store, job.key):
        saved = saved_seconds(store, job)
        return Left(None if whole is None else max(whole - saved, 0.0), saved)
    now = time.time()
    share, began = float(progress.get("share", 0.0)), progress.get("began", now)
    at = progress["now"] if progress.get("now", 0.0) >= began else now  # when it last reported
    done = float(progress.get("earlier", 0.0)) + max(at - began, 0.0)
    silent = max(now - at, 0.0)
    late = whole is not None and whole <= done + silent
    by_itself = done * (1 - share) / share if share > (0 if late else RELIABLE) else None
    by_others = None if whole is None or late else whole - done
    # a share of the images or steps of a training is one of its time; that of an attack's stages is not
    order = (by_itself, by_others) if isinstance(job, TrainJob) else (by_others, by_itself)
    found = next((seconds for seconds in order if seconds is not None), None)
    if (found is None and late) or (found is not None and found <= silent):
        # longer than expected: if nothing was reported, it is expected to take as long again
        found = (done + silent) * ((1 - share) / share if share else 1.0) + silent
    return Left(None if found is None else found - silent, done + silent, True)


def runs(store: Store, key: str) -> bool:
    """Whether a process runs this job: it holds the lease then. progress.json remains after a stop."""
    return holder_of(store, key) is not None


class TimeLeft(NamedTuple):
    """Seconds until jobs are done, with their range; the number of past records and of jobs by the cost model that the
    estimate uses; and the number of jobs of unknown length."""

    seconds: float
    low: float
    high: float
    records: int
    modeled: int
    unknown: int

    def describe(self) -> str:
        """`about 4 min 00 s (2 min 00 s to 8 min 00 s) + 2 jobs of unknown length`."""
        more = f"{counted(self.unknown, 'job')} of unknown length" if self.unknown else ""
        return more if more and not self.seconds else " + ".join(filter(None, (self.about(), more)))

    def about(self) -> str:
        """`about 4 min 00 s (2 min 00 s to 8 min 00 s)`: the jobs of known length."""
        low, high = clock(self.low), clock(self.high)
        return f"about {clock(self.seconds)}" + (f" ({low} to {high})" if low != high else "")

    def source(self) -> str:
        """Where the estimate comes from: `estimated from 3 past records`, `estimated from the cost model`."""
        names = [counted(self.records, "past record")] if self.records else []
        names += ["the cost model" + (f" ({counted(self.modeled, 'job')})" if names else "")] if self.modeled else []
        return f"estimated from {' and '.join(names)}" if names else "estimated from the progress of the jobs"


Schedule = Callable[[list[Job], dict[str, float], int], float]


def together(
    store: Store, jobs: Iterable[Job], estimator: Estimator, lanes: int, schedule: Schedule = bound
) -> TimeLeft:
    """Time until all these jobs are done on `lanes` slots.

    Dependencies are respected, and a single long job is not shared among slots. `schedule`: from jobs, their seconds
    and the number of slots to the seconds of all (default: a lower bound, which is fast).
    """
    known, unknown = dict[str, Job](), 0
    seconds, low, high = dict[str, float](), dict[str, float](), dict[str, float]()
    records, modeled = dict[tuple[str, ...], int](), 0
    for job in jobs:
        here, whole = left(store, job, estimator), estimator.estimate(job)
        if here.seconds is None:
            unknown += 1
            continue
        known[job.key], seconds[job.key] = job, here.seconds
        ends = (whole.low / whole.seconds, whole.high / whole.seconds) if whole and whole.seconds else (1.0, 1.0)
        low[job.key], high[job.key] = (here.seconds * end for end in ends)
        if whole is not None and whole.records:
            records[whole.likeness] = whole.records
        modeled += whole is not None and not whole.records and not job.parts
    mean, least, most = (schedule(list(known.values()), each, lanes) for each in (seconds, low, high))
    return TimeLeft(mean, least, most, sum(records.values()), modeled, unknown)
