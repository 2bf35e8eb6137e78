"""What the driver and its backends share: events, handles, exits, the interface of a backend, and what has to run."""

from __future__ import annotations

import abc
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from bench.executors.devices import Slot
from bench.jobs.retries import Fault, Step
from bench.planning.job import AuditJob, Job, ModelJob, TrainJob
from bench.records.evaluated_weights import outdated
from bench.records.record import Record, Retry
from bench.records.store import Store

EventKind = Literal["skipped", "started", "retried", "ok", "error", "blocked", "tick"]
FAILED = ("error", "diverged", "oom", "timeout")  # states whose record contains an error


def unnoted(text: str) -> None:
    """A `note` of `Backend.problems` that says nothing."""


class MissingDependency(ImportError):
    """A package or program that an executor or a tracker needs is not installed; the message names the remedy."""


@dataclass(frozen=True)
class Event:
    """A change in the state of a job. A `tick` has no job and only lets the caller redraw its display; `retried` means
    that the job failed for a reason outside of itself and will run again."""

    kind: EventKind
    job: Job | None = None
    message: str = ""


@dataclass(eq=False)
class Handle:
    """A submitted job. The backend sets `started` once a worker has begun it; backends add fields of their own."""

    job: Job
    started: bool = False


@dataclass(frozen=True)
class Exit:
    """The end of a submitted job, as its backend saw it.

    `result`: `ended` (with a record, unless there is a `fault`), `over` (another process had finished the job before
    this worker began) or `held` (another process is running the job; it has to be submitted again later).
    `shared`: other jobs ran on the same device, so that running alone may cure a lack of memory.
    """

    handle: Handle
    result: Literal["ended", "over", "held"] = "ended"
    fault: Fault | None = None
    shared: bool = False


class Backend(abc.ABC):
    """A place where jobs run. Between `open` and `close` it holds the state of one run.

    - `root`: the data folder; `kind`: "cpu" or "cuda"; `lanes`: how many jobs run at the same time.
    - `slots`: the places for jobs on this machine; none where jobs run on a cluster.
    - `worker_claims`: the worker takes the lease of its job itself, since it may outlive the driver.
    - `chains`: jobs can be submitted before the jobs that they depend on have ended (Slurm's dependencies).
    - `in_process`: jobs run in the driver's process, which they occupy.
    - `detach`: the driver leaves after everything was submitted once.
    - `retries`: the steps of bench.jobs.retries that the driver may take here after a fault.
    """

    worker_claims: ClassVar[bool] = False
    chains: ClassVar[bool] = False
    in_process: ClassVar[bool] = False
    retries: ClassVar[frozenset[Step]] = frozenset()
    root: Path
    kind: str
    lanes: int
    slots: Sequence[Slot] = ()
    detach: bool = False

    @abc.abstractmethod
    def devices(self) -> str:
        """A description of the devices for the user."""

    def problems(self, jobs: list[Job], store: Store, note: Callable[[str], None] = unnoted) -> list[str]:
        """One line for each reason why pending jobs can never work (bench.jobs.preflight). Writes nothing.

        `note`: called with what is being checked, if that takes seconds.
        """
        from bench.executors.processes import preflight

        return preflight(todo(jobs, store), self.root, note)

    @abc.abstractmethod
    def open(self, store: Store, jobs: list[Job]) -> None:
        """Begin a run. `jobs`: the jobs that have to run."""

    def seconds(self, job: Job) -> float | None:
        """Estimated run time of a job, from which the driver makes the order; None where it is unknown."""
        return None

    def learn(self, job: Job, record: Record) -> bool:
        """Use a finished job for later estimates. Returns True if jobs of this kind had no estimate before."""
        return False

    def share(self, job: Job) -> float:
        """Devices of its kind that a job takes, from which hours are counted: GPUs, or cores."""
        return 1.0

    @property
    def unusable(self) -> str:
        """Why no job can start here any more; empty while jobs can."""
        return ""

    @property
    def patience(self) -> float:
        """Seconds for which the driver tolerates a results folder that cannot be read (an absent file server)."""
        return 0.0

    def room(self, job: Job, attempts: Sequence[Retry]) -> bool:
        """Can the job be submitted now? The driver asks in order of urgency. `attempts`: the retries so far."""
        return True

    @abc.abstractmethod
    def submit(self, job: Job, attempts: Sequence[Retry]) -> Handle:
        """Submit a job for which there is `room`."""

    @abc.abstractmethod
    def poll(self, seconds: float) -> list[Exit]:
        """The jobs that ended since the last call. Waits up to `seconds` for the first one."""

    @abc.abstractmethod
    def cancel(self, handle: Handle) -> None:
        """End a submitted job; it will not be reported by `poll`."""

    @abc.abstractmethod
    def close(self) -> None:
        """End the run and every submitted job."""


def todo(jobs: list[Job], store: Store) -> list[Job]:
    """The jobs that have to run: those without a valid record, and those whose files a pending job needs but cannot
    find.

    Records may come from git without weights and images, and files may be damaged; only another run of the job can
    restore these. A record is invalid if it evaluated other weights than those that its training has now. Shards of a
    finished evaluation do not run.
    """
    known = {job.key: job for job in jobs}
    valid = {job.key for job in jobs if store.intact(job.key) and not outdated(store, job)}
    unneeded = {part for job in jobs if job.key in valid for part in job.parts}
    pending = {key for key in known if key not in valid and key not in unneeded}
    found = list(pending)
    while found:
        job = known[found.pop()]
        for key in job.waits:
            if key in known and key not in pending and _lacks(store, known[key], job):
                pending.add(key)
                found.append(key)
    return [job for job in jobs if job.key in pending]


def _lacks(store: Store, need: Job, job: Job) -> bool:
    """Is a file of the finished `need` that `job` will read missing or damaged?"""
    record = store.record(need.key)
    if record is None:  # a shard that never ran, of an evaluation that was valid until now
        return True
    if record.state != "done" or (isinstance(job, AuditJob) and not isinstance(need, TrainJob)):
        return False  # an audit uses whatever images exist
    wanted = "weights-" if isinstance(need, ModelJob) else "samples" if need.key in job.parts else "adversarial"
    return any(name.startswith(wanted) and not store.matches(need.key, name, record) for name in record.files)


def ended(job: Job, store: Store) -> Event | None:
    """The event of a job that just ended, from its record; None without a record."""
    record = store.record(job.key)
    if record is None:
        return None
    if record.state in FAILED:
        return Event("error", job, record.problem or "")
    return Event("ok", job, record.reason or "")


def elsewhere(job: Job, store: Store) -> Event:
    """The event of a job that another driver finished during this run."""
    event = ended(job, store)
    if event is None or event.kind == "ok":
        return Event("skipped", job, "done by another run")
    return event


def blocker(job: Job, store: Store, pending: Container[str]) -> str | None:
    """Why a job can never start: its training ended without weights, or a shard without samples. None otherwise.

    Other evaluations whose images the job reuses only have to end: one collapsed defense must not blank a whole column.
    """
    for need in (*job.needs[:1], *job.parts):
        record = None if need in pending else store.record(need)
        if record is not None and record.state != "done":
            return f"{'training' if need in job.needs else 'shard'} {need} ended as {record.state}"
    return None
