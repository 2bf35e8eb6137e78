"""The order of jobs: first the one with the most work behind it. Free of processes and files, for simulations."""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Callable, Iterable, KeysView
from graphlib import TopologicalSorter

from bench.planning.job import Job

# seconds of a job where no record of its kind exists; of equally urgent jobs, those of the first kind go first
NOMINAL = {"audit": 60.0, "evaluate": 60.0, "shard": 60.0, "import": 10.0, "train": 600.0}
KINDS = tuple(NOMINAL)


def expected(jobs: list[Job], seconds: Callable[[Job], float | None]) -> dict[str, float]:
    """Seconds of every job by key. A job of unknown length counts as the longest known one of its kind: an early start
    costs little, and its measurement comes early."""
    known = {job.key: seconds(job) for job in jobs}
    longest: dict[str, float] = {}
    for job in jobs:
        longest[job.kind] = max(longest.get(job.kind, 0.0), known[job.key] or 0.0)
    unknown = {job.key: longest[job.kind] or NOMINAL[job.kind] for job in jobs}
    return {key: unknown[key] if mine is None else mine for key, mine in known.items()}


def urgencies(jobs: Iterable[Job], seconds: dict[str, float], lanes: int) -> dict[str, float]:
    """A lower bound on the seconds left when a job starts: its own plus those of its dependents, which are the longest
    chain or all of that work shared among the lanes, whichever is more."""
    known = {job.key: job for job in jobs}
    after = children(known.values())
    chains, behind = dict[str, float](), dict[str, set[str]]()
    for key in reversed(_in_order(known)):
        behind[key] = set(after[key]).union(*(behind[child] for child in after[key]))
        chains[key] = seconds[key] + max((chains[child] for child in after[key]), default=0.0)
    shared = {key: seconds[key] + sum(seconds[each] for each in behind[key]) / lanes for key in known}
    return {key: max(chains[key], shared[key]) for key in known}


def children(jobs: Iterable[Job]) -> dict[str, list[str]]:
    """Keys of the jobs that wait for each of these jobs."""
    found: dict[str, list[str]] = {job.key: [] for job in jobs}
    for job in jobs:
        for key in dict.fromkeys(job.waits):
            if key in found:
                found[key].append(job.key)
    return found


def _in_order(known: dict[str, Job]) -> list[str]:
    """Keys, each after those of the jobs that it waits for."""
    graph = {key: [need for need in job.waits if need in known] for key, job in known.items()}
    return list(TopologicalSorter(graph).static_order())


class Queue:
    """Jobs that have to run, and those of them that can start, most urgent first; equal ones keep the planned order.

    A job enters once all it waits for is over. Costs of a step do not grow with the number of jobs that wait for
    others, and nothing is read from disk.
    """

    def __init__(self, jobs: list[Job], seconds: dict[str, float], lanes: int) -> None:
        self.jobs = {job.key: job for job in jobs}
        self.lanes = lanes
        self._place = {key: place for place, key in enumerate(self.jobs)}
        self._order = _in_order(self.jobs)
        self._after = children(jobs)
        self._open = {job.key: {need for need in job.waits if need in self.jobs} for job in jobs}
        self._started: set[str] = set()
        self._ready: list[tuple[float, int, int, str]] = []
        self.weigh(seconds)

    def __len__(self) -> int:
        """Jobs that have not started."""
        return len(self._open) - len(self._started)

    def weigh(self, seconds: dict[str, float]) -> None:
        """Sort again by new estimates of the seconds of each job."""
        left = [self.jobs[key] for key in self._open]
        self._urgency = urgencies(left, seconds, self.lanes)
        self._ready = sorted(
            self._rank(key) for key, needs in self._open.items() if not needs and key not in self._started
        )

    def ready(self) -> list[Job]:
        """The jobs that can start now, most urgent first."""
        return [self.jobs[key] for *_, key in self._ready]

    def waiting(self) -> list[Job]:
        """All jobs that have not started, each after those that it waits for."""
        return [self.jobs[key] for key in self._order if key in self._open and key not in self._started]

    def start(self, job: Job) -> None:
        """A job runs from now on, or starts without further action once the jobs that it waits for have ended."""
        if not self._open[job.key]:
            self._ready.remove(self._rank(job.key))
        self._started.add(job.key)

    def again(self, job: Job) -> None:
        """A started job has to start again."""
        self._started.remove(job.key)
        if not self._open[job.key]:
            insort(self._ready, self._rank(job.key))

    def over(self, job: Job) -> list[Job]:
        """A job has ended or will never start; returns the jobs that waited for it."""
        if job.key not in self._started and not self._open[job.key]:
            self._ready.remove(self._rank(job.key))
        self._started.discard(job.key)
        del self._open[job.key]
        waited = [key for key in self._after[job.key] if key in self._open]
        for key in waited:
            self._open[key].discard(job.key)
            if not self._open[key] and key not in self._started:
                insort(self._ready, self._rank(key))
        return [self.jobs[key] for key in waited]

    @property
    def pending(self) -> KeysView[str]:
        """Keys of all jobs that have not ended."""
        return self._open.keys()

    def _rank(self, key: str) -> tuple[float, int, int, str]:
        return -self._urgency[key], KINDS.index(self.jobs[key].kind), self._place[key], key


def simulate(jobs: list[Job], seconds: dict[str, float], lanes: int, guess: dict[str, float] | None = None) -> float:
    """Seconds until all jobs have ended on `lanes` lanes. `guess`: estimates for the order (default: `seconds`)."""
    queue, now = Queue(jobs, seconds if guess is None else guess, lanes), 0.0
    running: list[tuple[float, int, Job]] = []
    count = 0
    while queue or running:
        for job in queue.ready()[: lanes - len(running)]:
            queue.start(job)
            heapq.heappush(running, (now + seconds[job.key], count, job))
            count += 1
        now, _, job = heapq.heappop(running)
        queue.over(job)
    return now


def bound(jobs: list[Job], seconds: dict[str, float], lanes: int) -> float:
    """A lower bound on the seconds of any order: the longest chain, or all work shared evenly, whichever is more."""
    known = {job.key: job for job in jobs}
    ends: dict[str, float] = {}
    for key in _in_order(known):
        ends[key] = seconds[key] + max((ends[need] for need in known[key].waits if need in known), default=0.0)
    return max(max(ends.values(), default=0.0), sum(seconds[key] for key in known) / lanes)
