"""What `bench plan` prints of time, disk and memory: from past records, from stopped jobs, and from the cost model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench.atomic import size_text
from bench.executors.devices import Slot, kind, lanes
from bench.executors.schedule import simulate
from bench.planning import catalog
from bench.planning.job import EvaluateJob, Job
from bench.progress import remaining
from bench.progress.cost_model import CostModel
from bench.progress.remaining import Left
from bench.records.runtime_estimate import Estimator, clock
from bench.records.store import Store
from bench.terminal import counted, say


def show(left: list[Job], jobs: list[Job], store: Store, root: Path, places: list[Slot]) -> None:
    """Print what the jobs `left` will need, one line per resource. `root`: the data folder."""
    model = CostModel(root, places[0])
    estimator = Estimator(store, kind(places), model)
    estimator.know(jobs)
    lines, _ = time(left, store, estimator, lanes(places))
    for line in [*equal_n(jobs, estimator, lanes(places)), *lines, *model.problems, *room(left, estimator, places)]:
        say(line)


def time(jobs: list[Job], store: Store, estimator: Estimator, count: int) -> tuple[list[str], int]:
    """How long the jobs take on this number of slots, and the number of jobs of unknown length, which are not counted
    in that."""
    found = [remaining.left(store, job, estimator) for job in jobs]
    total = remaining.together(store, jobs, estimator, count, simulate)
    unknown = f"{counted(total.unknown, 'job')} with neither a past record nor a declared cost" if total.unknown else ""
    if total.unknown == len(jobs):
        return [f"time      unknown: {unknown}", *_begun(found)], total.unknown
    guess = f"{total.about()} on {counted(count, 'slot')}, {total.source()}"
    return [f"time      {guess}{'; plus ' * bool(unknown)}{unknown}", *_begun(found)], total.unknown


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


def _begun(found: list[Left]) -> list[str]:
    """Jobs that are running, and stopped jobs with a part of their work done."""
    running = sum(one.running for one in found)
    stopped = [one.done for one in found if one.done and not one.running]
    lines = [f"running   {running} of these jobs now"] if running else []
    if stopped:
        saved = clock(sum(stopped))
        lines.append(f"saved     {saved} (not counted above) in the checkpoints of {counted(len(stopped), 'job')}")
    return lines


def room(jobs: list[Job], estimator: Estimator, places: list[Slot]) -> list[str]:
    """Disk and memory of the jobs, if similar jobs were measured."""
    size, unknown = estimator.disk(jobs)
    count, lines = lanes(places), []
    if unknown < len(jobs):
        more = f" + {counted(unknown, 'job')} of unknown size" if unknown else ""
        lines.append(f"disk      about {size_text(size)}{more}")
    for where, name in (("rss", "memory"), ("cuda", "GPU memory")):
        peaks = sorted((peak for job in jobs if (peak := estimator.memory(job, where))), reverse=True)
        if peaks and (where == "rss" or kind(places) == "cuda"):
            together = f", {sum(peaks[:count]):.0f} MB for the {count} largest at a time" if count > 1 else ""
            lines.append(f"{name:<9} at most {peaks[0]:.0f} MB a job{together}")
    return lines
