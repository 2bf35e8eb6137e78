"""`--probe`: how long kinds of jobs take that were never run, from a few seconds of each in a process of its own.

Each kind (bench.records.runtime_estimate: a method with its settings, on a model and data set) is measured once, by its
largest job.
On the CPU as many kinds are measured at a time as there are slots, since jobs will share the machine as well. Nothing
is written. Free of torch itself: what a process does is bench.progress.probing.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

from bench.executors import processes
from bench.executors.devices import Slot, lanes
from bench.planning.job import Job
from bench.progress.live import title
from bench.records.runtime_estimate import Estimator, clock, size
from bench.records.store import Store

CAP = 3.0  # seconds that are timed of one kind, warm-up and loading apart; one step or image is always finished
LIMIT = 120.0  # seconds after which a kind is given up


class Probe(NamedTuple):
    """What was measured of one kind. `seconds`, `low` and `high`: of all work of `job`; `beside`: to load and build."""

    job: Job
    seconds: float
    low: float
    high: float
    beside: float
    peaks: dict[str, float]
    bytes: int
    how: str


class Task(NamedTuple):
    """All that a process is told. `trained`: the training that an evaluation needs; `cap`: seconds to time."""

    job: Job
    trained: Job | None
    store: Path
    root: Path
    device: str
    environment: dict[str, str]
    cap: float


def probe(left: list[Job], store: Store, root: Path, places: list[Slot], estimator: Estimator) -> Iterator[str]:
    """Measure what the estimator knows nothing of, teach it, and yield a line for each kind and one for all."""
    began = time.monotonic()
    groups = kinds(left, estimator)
    known = {**estimator.jobs, **{job.key: job for job in left}}
    tasks = []
    for jobs in groups.values():
        job = max(jobs, key=size)
        trained = known.get(job.needs[0]) if job.needs else None
        place = places[0]
        tasks.append(Task(job, trained, store.root, root, place.device, dict(place.environment), CAP))
    if not tasks:
        yield "probe     nothing: a record tells of every kind of job that is left"
        return
    at_a_time = 1 if places[0].device == "cuda" else lanes(places)
    many = {max(jobs, key=size).key: len(jobs) for jobs in groups.values()}
    measured = 0
    for task, found in run(tasks, at_a_time):
        name = f"probe     {title(task.job, known)}: "
        if isinstance(found, str):
            yield f"{name}no estimate; {found}"
            continue
        measured += 1
        estimator.assume(task.job, found.seconds, (found.low, found.high), found.beside, found.peaks, found.bytes)
        spread = f" ({clock(found.low)} to {clock(found.high)})" if clock(found.low) != clock(found.high) else ""
        more = f", {many[task.job.key]} jobs of this kind" if many[task.job.key] > 1 else ""
        yield f"{name}{found.how}; about {clock(found.seconds + found.beside)}{spread}{more}"
    took = clock(time.monotonic() - began)
    yield f"probed    {measured} of {len(tasks)} kinds of jobs in {took}, {at_a_time} at a time; nothing was written"


def kinds(left: list[Job], estimator: Estimator) -> dict[tuple[str, ...], list[Job]]:
    """The jobs that no record tells anything of, by kind, in the planned order. Imports, which are short, are none."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in left:
        alike = estimator.likeness(job)
        if alike and estimator.seconds(job) is None:
            groups.setdefault(alike[0], []).append(job)
    return groups


def run(tasks: list[Task], at_a_time: int) -> Iterator[tuple[Task, Probe | str]]:
    """Each task in a process of its own; what it found, or why there is nothing."""
    processes.preload([task.job for task in tasks])
    waiting, running = list(tasks), dict[Any, tuple[Task, ForkServerProcess, float]]()
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                task = waiting.pop(0)
                receiver, sender = processes.context().Pipe(duplex=False)
                process = processes.context().Process(target=_answer, args=(sender, task, processes.carried()))
                process.start()
                sender.close()
                running[receiver] = (task, process, time.monotonic())
            ready = wait(list(running), timeout=1.0)
            for receiver in list(running):
                task, process, began = running[receiver]
                if receiver in ready:
                    found = _read(receiver)
                elif time.monotonic() - began > LIMIT:
                    found = f"not one step or image was over within {clock(LIMIT)}"
                else:
                    continue
                del running[receiver]
                processes.kill(process)
                yield task, found
    finally:
        for _, process, _ in running.values():
            processes.kill(process)


def _read(receiver: Any) -> Probe | str:
    try:
        found: Probe | str = receiver.recv()
        return found
    except EOFError:
        return "its process was killed, perhaps for memory"


def _answer(sender: Connection, task: Task, files: dict[str, str]) -> None:
    """Body of a process; a plug-in's prints are not the answer."""
    processes.leave_the_driver(files)
    os.environ.update(task.environment)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from bench.progress import probing

        try:
            found: Probe | str = probing.measure(task)
        except Exception as error:
            found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    sender.send(found)
