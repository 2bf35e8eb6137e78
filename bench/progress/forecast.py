"""What `bench plan` says of time, device hours, disk and memory: from past records, stopped jobs and the cost model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.atomic import size_text
from bench.executors.base import Backend
from bench.executors.schedule import simulate
from bench.planning import catalog
from bench.planning.job import EvaluateJob, Job
from bench.progress import remaining
from bench.progress.cost_model import CostModel
from bench.progress.remaining import Left, TimeLeft
from bench.records.runtime_estimate import Estimator, clock, kind_of_device, took
from bench.records.store import Store
from bench.results.grouping import grouped
from bench.terminal import counted

DEVICES = {"cpu": "CPU", "cuda": "GPU"}


class Hours(NamedTuple):
    """Device hours of a matrix: over all its jobs the sum of hours times devices taken, with its range.

    `kind`: cpu (hours of a core) or cuda (of a GPU). `spent`: those of finished jobs and of what stopped and running
    ones have done, a part of the sum; `elsewhere`: those spent on the other kind of device, no part of it. Jobs of
    unknown length are counted in `unknown` only.
    """

    kind: str
    expected: float
    low: float
    high: float
    spent: float
    elsewhere: float
    unknown: int

    def __str__(self) -> str:
        """`about 2.9 GPU hours (1.7 to 5.3), of which 0.5 are spent`."""
        unit = f"{DEVICES[self.kind]} hours"
        low, high = _rounded(self.low), _rounded(self.high)
        exact = self.low == self.high
        text = f"{'' if exact else 'about '}{_rounded(self.expected)} {unit}" + ("" if exact else f" ({low} to {high})")
        text += f" + {counted(self.unknown, 'job')} of unknown length" if self.unknown else ""
        part = "all of them" if self.spent == self.expected else f"of which {_rounded(self.spent)} are"
        text += f", {part} spent" if self.spent else ""
        other = next(name for kind, name in DEVICES.items() if kind != self.kind)
        return text + (f"; {_rounded(self.elsewhere)} {other} hours besides" if self.elsewhere else "")


def _rounded(hours: float) -> str:
    """Two digits that count, never as 2e-05."""
    return f"{hours:.{max(1 - math.floor(math.log10(hours)), 0)}f}" if hours else "0"


def survey(
    left: list[Job], jobs: list[Job], store: Store, root: Path, backend: Backend
) -> tuple[list[str], dict[str, Any]]:
    """What the jobs `left` of `jobs` will need, one line per resource; and their time and hours by name, None where
    they are unknown. `root`: the data folder."""
    model = CostModel(root, backend.slots[0]) if backend.slots else None  # nodes of a cluster are not timed from here
    estimator = Estimator(store, backend.kind, model)
    estimator.know(jobs)
    found = [remaining.left(store, job, estimator) for job in left]
    total = remaining.together(store, left, estimator, backend.lanes, simulate)
    whole = hours(left, jobs, store, estimator, backend)
    lines = equal_n(jobs, estimator, backend.lanes) if left else []
    lines += _time(total, found, backend.lanes) if left else []
    lines += [f"cost      {whole}"] if total.unknown < len(left) or whole.spent or whole.elsewhere else []
    lines += [*(model.problems if model else ()), *room(left, estimator, backend)]
    known = bool(not left or total.unknown < len(left))
    return lines, {
        "seconds_left": total.seconds if known else None,
        "seconds_left_low": total.low if known else None,
        "seconds_left_high": total.high if known else None,
        "jobs_of_unknown_length": total.unknown,
        "device": whole.kind,
        "device_hours": whole.expected if known else None,
        "device_hours_low": whole.low if known else None,
        "device_hours_high": whole.high if known else None,
        "device_hours_spent": whole.spent,
        "device_hours_elsewhere": whole.elsewhere,
    }


def hours(left: list[Job], jobs: list[Job], store: Store, estimator: Estimator, backend: Backend) -> Hours:
    """Device hours of all `jobs`, of which `left` are to be done."""
    rest, spent = {job.key for job in left}, dict.fromkeys(DEVICES, 0.0)
    for job in jobs:
        record = None if job.key in rest else store.record(job.key)
        if record is not None:
            spent[kind_of_device(record) or backend.kind] += backend.share(job) * took(job, record) / 3600
    ends, unknown = [0.0, 0.0, 0.0], 0
    for share, some in grouped(left, backend.share).items():
        total = remaining.together(store, some, estimator, 1)  # one at a time: the sum
        ends = [end + share * seconds / 3600 for end, seconds in zip(ends, total[:3], strict=True)]
        spent[backend.kind] += share * sum(remaining.left(store, job, estimator).done for job in some) / 3600
        unknown += total.unknown
    own = spent.pop(backend.kind)
    expected, low, high = (own + end for end in ends)
    return Hours(backend.kind, expected, low, high, own, sum(spent.values()), unknown)


def time(jobs: list[Job], store: Store, estimator: Estimator, count: int) -> tuple[list[str], int]:
    """How long the jobs take on this number of slots, and the number of jobs of unknown length, which are not counted
    in that."""
    found = [remaining.left(store, job, estimator) for job in jobs]
    total = remaining.together(store, jobs, estimator, count, simulate)
    return _time(total, found, count), total.unknown


def _time(total: TimeLeft, found: Sequence[Left], count: int) -> list[str]:
    unknown = f"{counted(total.unknown, 'job')} with neither a past record nor a declared cost" if total.unknown else ""
    if total.unknown == len(found):
        return [f"time      unknown: {unknown}", *_begun(found)]
    guess = f"{total.about()} on {counted(count, 'slot')}, {total.source()}"
    return [f"time      {guess}{'; plus ' * bool(unknown)}{unknown}", *_begun(found)]


def equal_n(jobs: list[Job], estimator: Estimator, count: int) -> list[str]:
    """A warning, or none, where attacks of one worst case get different numbers of images, and the time on `count`
    slots that it takes to give the largest number to all."""
    attacks = [job for job in jobs if isinstance(job, EvaluateJob) and _in_worst_case(job)]
    most = max((job.n for job in attacks), default=0)
    fewer = {job.key: replace(job, parts=()) for job in attacks if job.n < most}
    if not fewer:
        return []
    pairs = [(estimator.seconds(job), estimator.seconds(replace(job, n=most))) for job in fewer.values()]
    known = [more - now for now, more in pairs if now is not None and more is not None]
    took = f"about {clock(sum(known) / count)} more" if len(known) == len(pairs) else "an unknown time"
    names = ", ".join(dict.fromkeys(f"{job.attack.name} {job.n}" for job in fewer.values()))
    return [
        f"warning   attacks get different numbers of images ({names}, others {most}); the worst case is over the "
        f"fewest. {most} for all would take {took}: leave n out of these attacks"
    ]


def _in_worst_case(job: EvaluateJob) -> bool:
    plugin = catalog.get("attacks", job.attack.name)
    return job.attack.name == "clean" or (job.threat is not None and not plugin.constant("metric", ""))


def _begun(found: Sequence[Left]) -> list[str]:
    """Jobs that are running, and stopped jobs with a part of their work done."""
    running = sum(one.running for one in found)
    stopped = [one.done for one in found if one.done and not one.running]
    lines = [f"running   {running} of these jobs now"] if running else []
    if stopped:
        saved = clock(sum(stopped))
        lines.append(f"saved     {saved} (not counted above) in the checkpoints of {counted(len(stopped), 'job')}")
    return lines


def room(jobs: list[Job], estimator: Estimator, backend: Backend) -> list[str]:
    """Disk and memory of the jobs, if similar jobs were measured."""
    size, unknown = estimator.disk(jobs)
    count, lines = backend.lanes, []
    if unknown < len(jobs):
        more = f" + {counted(unknown, 'job')} of unknown size" if unknown else ""
        lines.append(f"disk      about {size_text(size)}{more}")
    for where, name in (("rss", "memory"), ("cuda", "GPU memory")):
        peaks = sorted((peak for job in jobs if (peak := estimator.memory(job, where))), reverse=True)
        if peaks and (where == "rss" or backend.kind == "cuda"):
            together = f", {sum(peaks[:count]):.0f} MB for the {count} largest at a time" if count > 1 else ""
            lines.append(f"{name:<9} at most {peaks[0]:.0f} MB a job{together}")
    return lines
