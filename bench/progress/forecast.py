"""What `bench plan` says of time, disk and memory: from past records, from what stopped jobs kept, or from a probe."""

from __future__ import annotations

from pathlib import Path

from bench.executors.devices import Slot, kind, lanes
from bench.executors.schedule import simulate
from bench.planning.job import Job
from bench.progress import probe as probing
from bench.progress import remaining
from bench.progress.remaining import Left
from bench.records.runtime_estimate import Estimator, clock
from bench.records.store import Store


def show(left: list[Job], jobs: list[Job], store: Store, root: Path, places: list[Slot], probe: bool) -> None:
    """Print what the jobs `left` will take, a line for each thing. `probe`: measure what no record tells."""
    estimator = Estimator(store, kind(places))
    estimator.know(jobs)
    if probe:
        for line in probing.probe(left, store, root, places, estimator):
            print(line, flush=True)
    for line in [*time(left, store, estimator, lanes(places)), *room(left, estimator, places)]:
        print(line)


def time(jobs: list[Job], store: Store, estimator: Estimator, count: int) -> list[str]:
    """How long it takes on so many slots; what is not known is said to be missing, and never counted as nothing."""
    found = {job.key: remaining.left(store, job, estimator) for job in jobs}
    known = [job for job in jobs if found[job.key].seconds is not None]
    seconds = {job.key: found[job.key].seconds or 0.0 for job in known}
    guess = f"about {clock(simulate(known, seconds, count))} on {count} slots" if known else "unknown"
    ends = [clock(simulate(known, _at_end(known, seconds, estimator, end), count)) for end in (0, 1)]
    if ends[0] != ends[1]:
        guess += f" ({ends[0]} to {ends[1]})"
    unknown = len(jobs) - len(known)
    more = f", {unknown} jobs with no past record" if unknown else ""
    return [f"time      {guess}{more}", *_begun(list(found.values()))]


def _at_end(jobs: list[Job], seconds: dict[str, float], estimator: Estimator, end: int) -> dict[str, float]:
    """The seconds left of each job if it is as fast (end 0) or as slow (1) as any that is like it."""
    found = {}
    for job in jobs:
        whole = estimator.seconds(job)
        found[job.key] = seconds[job.key] * (estimator.span(job)[end] / whole if whole else 1.0)
    return found


def _begun(found: list[Left]) -> list[str]:
    """What is under way, or was stopped with a part of it done."""
    running = sum(one.running for one in found)
    kept = [one for one in found if one.done and not one.running]
    lines = [f"running   {running} of these jobs run just now"] if running else []
    if kept:
        spared = clock(sum(one.done for one in kept))
        lines.append(f"kept      {len(kept)} jobs go on where they were stopped, {spared} of work spared above")
    return lines


def room(jobs: list[Job], estimator: Estimator, places: list[Slot]) -> list[str]:
    """What disk and memory the jobs will take, as far as jobs like them were measured."""
    size, unknown = estimator.disk(jobs)
    count, lines = lanes(places), []
    if unknown < len(jobs):
        more = f" + {unknown} jobs of unknown size" if unknown else ""
        lines.append(f"disk      about {size / 2**20:.0f} MB{more}")
    for where, name in (("rss", "memory"), ("cuda", "GPU memory")):
        peaks = sorted((peak for job in jobs if (peak := estimator.memory(job, where))), reverse=True)
        if peaks and (where == "rss" or kind(places) == "cuda"):
            together = f", {sum(peaks[:count]):.0f} MB for the {count} largest at a time" if count > 1 else ""
            lines.append(f"{name:<9} at most {peaks[0]:.0f} MB a job{together}")
    return lines
