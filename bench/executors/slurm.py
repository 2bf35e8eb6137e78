"""A Slurm cluster: each job is `bench worker KEY`, submitted in job arrays whose tasks wait for what they depend on.

Slurm may end and requeue a job at any moment; its checkpoints remain. The records are the truth, not Slurm's states.
Each worker takes the lease of its own job.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.atomic import write_atomic
from bench.executors.base import Backend, Exit, Handle, todo, unnoted
from bench.executors.sbatch import (
    ACTIVE,
    Batch,
    Request,
    SlurmError,
    batches,
    command,
    describe_ending,
    ending,
    queue,
    read_trail,
    script,
)
from bench.jobs import retries
from bench.jobs.attempt import HELD
from bench.planning.job import Job
from bench.records.leases import Claims, holder_of
from bench.records.record import Retry
from bench.records.runtime_estimate import CostModel, Estimator
from bench.records.store import Store

FASTEST, SLOWEST = 1.0, 15.0  # seconds between two looks at the queue, by the length of the run so far
GRACE = 10.0  # seconds until a record that was written on another machine must be visible here
PATIENCE = 1800.0  # seconds without an answer of Slurm's, or of the results folder, after which the driver gives up
KINDS: dict[str, retries.Kind] = {"OUT_OF_MEMORY": "oom", "TIMEOUT": "timeout"}  # by Slurm's state of a task
NAMES = {"oom": "KilledForMemory", "timeout": "Timeout", "died": "WorkerDied"}


@dataclass(eq=False)
class Task(Handle):
    """A submitted job. `number`: Slurm's, such as 12_0, empty until the next `poll` submits it; `mine`: submitted by
    this command; `shares`: other jobs are in the same task of Slurm's; `alone`: it has failed before, and shares none;
    `lost`: when Slurm was first seen to have ended it without a record."""

    number: str = ""
    mine: bool = True
    shares: bool = False
    alone: bool = False
    lost: float | None = None


@dataclass
class Slurm(Backend):
    """Backend of Slurm. `root`: the data folder; `max_jobs`: most jobs in the queue at a time; `detach`: submit
    everything and leave; `cost_model`: tells which evaluations are short where no record does."""

    worker_claims: ClassVar[bool] = True
    chains: ClassVar[bool] = True
    retries: ClassVar[frozenset[retries.Step]] = frozenset({"halve"})
    root: Path
    asked: Request = Request()  # noqa: RUF009 - frozen
    kind: str = "cpu"
    max_jobs: int | None = None
    detach: bool = False
    cost_model: CostModel | None = None

    def __post_init__(self) -> None:
        self.lanes = self.max_jobs or 8

    def devices(self) -> str:
        """See Backend."""
        return f"{self.kind}, on the nodes that Slurm assigns"

    def share(self, job: Job) -> float:
        """See Backend."""
        return self.asked.devices(job.kind, self.kind)

    def problems(self, jobs: list[Job], store: Store, note: Callable[[str], None] = unnoted) -> list[str]:
        """See Backend. Raises SlurmError if Slurm does not answer. Slurm checks the options when the first job is
        submitted."""
        queue(store.root)
        return super().problems(jobs, store, note)

    def open(self, store: Store, jobs: list[Job]) -> None:
        """See Backend."""
        self.store, self.began = store, time.monotonic()
        self.tasks: dict[str, Task] = {}
        self.estimator = self._estimator(store, jobs)
        self._look()
        self._pause()

    def _estimator(self, store: Store, jobs: list[Job]) -> Estimator:
        found = Estimator(store, self.kind, self.cost_model)
        found.know([*store.jobs().values(), *jobs])  # the estimate of an evaluation depends on its training
        return found

    def _look(self) -> None:
        """Ask for the states of all tasks in the queue; None while the controller does not answer."""
        self._others: dict[str, tuple[str, bool]] | None = None
        self.states: dict[str, str] | None = None
        try:
            self.states = queue(self.store.root)
            self.answered = time.monotonic()
        except SlurmError:
            if not self.tasks or time.monotonic() - self.answered > PATIENCE:
                raise

    def _pause(self) -> None:
        now = time.monotonic()
        self.next_look = now + min(SLOWEST, max(FASTEST, (now - self.began) / 20))

    @property
    def patience(self) -> float:
        """See Backend."""
        return 0.0 if self.detach or not any(task.number for task in self.tasks.values()) else PATIENCE

    def room(self, job: Job, attempts: Sequence[Retry]) -> bool:
        """See Backend. Submits only right after a look at the queue, and nothing that waits for a lost task."""
        if self.states is None or any(key in self.tasks and self.tasks[key].lost for key in job.waits):
            return False
        return self.max_jobs is None or len(self.tasks) < self.max_jobs or job.key in self._queued()

    def submit(self, job: Job, attempts: Sequence[Retry]) -> Task:
        """The next `poll` submits the job; one that another command submitted and that is still queued is followed."""
        number, shares = self._queued().get(job.key, ("", False))
        task = Task(job, number=number, mine=not number, shares=shares, alone=bool(attempts))
        self.tasks[job.key] = task
        return task

    def _queued(self) -> dict[str, tuple[str, bool]]:
        """The active tasks of this results folder by key, whoever submitted them: number, and whether jobs share it."""
        if self._others is None:
            self._others = {}
            for path in sorted((self.store.root / "slurm").glob("[0-9]*")):
                for index, word in enumerate(path.read_text(encoding="utf-8").split()):
                    if self.states is not None and self.states.get(f"{path.name}_{index}") in ACTIVE:
                        ended = {key for key, code in self._trail(f"{path.name}_{index}").items() if code is not None}
                        for key in set(word.split("+")) - ended:
                            self._others.setdefault(key, (f"{path.name}_{index}", "+" in word))
        return self._others

    def poll(self, seconds: float) -> list[Exit]:
        """Submit what was collected; look at the queue when it is time."""
        if any(not task.number for task in self.tasks.values()):
            return self._flush()
        wait = self.next_look - time.monotonic()
        if wait > 0:
            self.states = None  # of the last look: too old to submit by
            time.sleep(min(wait, seconds))
            return []
        self._look()
        ends = [end for task in list(self.tasks.values()) if (end := self._end(task)) is not None]
        for end in ends:
            del self.tasks[end.handle.job.key]
        self._pause()  # not before: an error above must come again in the next round
        return ends

    def _flush(self) -> list[Exit]:
        """Submit the collected jobs as arrays. Those that Slurm refuses wait until something else of this run has left
        the queue; raises SlurmError if nothing else is in it."""
        self.states = None  # submit no more before the next look
        while new := [task for task in self.tasks.values() if not task.number]:
            live = {key: task.number for key, task in self.tasks.items() if task.number}
            try:
                self._sbatch(batches([task.job for task in new], live, self.asked, self._expected)[0], live)
            except SlurmError:
                for task in new:
                    del self.tasks[task.job.key]
                if not live:
                    raise
                return [Exit(task, "held") for task in new]
        return []

    def _expected(self, job: Job) -> float | None:
        """Seconds of a job that may share a task: one that failed before runs alone."""
        return None if self.tasks[job.key].alone else self.estimator.seconds(job)

    def _sbatch(self, batch: Batch, live: dict[str, str]) -> None:
        folder = self.store.root / "slurm"
        folder.mkdir(exist_ok=True)
        text = script(self.asked.options, self.store.root, self.root, self.kind, [])
        write_atomic(folder / "job.sh", lambda file: file.write(os.fsencode(text)))  # sbatch makes a copy of its own
        words = batch.words()
        answer = command("sbatch", *batch.options(live), str((folder / "job.sh").absolute()), *words)
        number = answer.strip().partition(";")[0]  # the name of a cluster may follow
        for index, jobs in enumerate(batch.tasks()):
            for task in (self.tasks[job.key] for job in jobs):
                task.number, task.shares = f"{number}_{index}", len(jobs) > 1
        write_atomic(folder / number, lambda file: file.write(" ".join(words).encode()))

    def _end(self, task: Task) -> Exit | None:
        """Has a job ended? The store decides first, then Slurm's state of the task, if it is known."""
        os.stat(self.store.root)  # a results folder that is away is an error, not one without records
        with contextlib.suppress(FileNotFoundError):  # a packed job has no folder before it begins
            os.listdir(self.store.folder(task.job.key))  # makes a network file system look again
        recorded = self.store.record(task.job.key) is not None
        state = None if self.states is None else self.states.get(task.number, "")
        if task.shares and not task.started:  # Slurm's state is that of all jobs of the task
            task.started = task.job.key in self._trail(task.number)
        if recorded and state == "PENDING" and not task.started:
            return Exit(task, "over")
        task.started = task.started or (state == "RUNNING" and not task.shares)
        if recorded:
            return Exit(task)
        return self._vanished(task) if state is not None and state not in ACTIVE else None

    def _vanished(self, task: Task) -> Exit | None:
        """Slurm has ended a task without a record: an error, unless the record is on its way or others run the job.

        An evaluation that Slurm killed for memory is submitted again with half the batch in each pass; after anything
        else the user decides: the same command tries it again.
        """
        found = ending(task.number)
        code = found.get("ExitCode", "").partition(":")[0]
        if task.shares and (trail := self._trail(task.number)):
            if task.job.key not in trail and found.get("JobState") != "CANCELLED":
                return Exit(task, "held")  # its turn never came
            code = str(trail.get(task.job.key))
        dropped = found.get("Reason") == "DependencyNeverSatisfied"  # a job that it depends on did not end there
        cancelled = found.get("JobState") == "CANCELLED" and not task.mine
        if dropped or cancelled or code == str(HELD) or holder_of(self.store, task.job.key):
            return Exit(task, "held")
        task.lost = task.lost or time.monotonic()
        if time.monotonic() - task.lost < GRACE:
            return None
        kind = KINDS.get(found.get("JobState", ""), "died")
        message = f"the worker ended without a record: {describe_ending(found)} (job {task.number})"
        return Exit(task, fault=retries.Fault(kind, NAMES[kind], message))

    def cancel(self, handle: Handle) -> None:
        """See Backend."""
        task = self.tasks.pop(handle.job.key, None)
        if task is not None and task.number and all(other.number != task.number for other in self.tasks.values()):
            _cancel([task.number])

    def close(self) -> None:
        """See Backend. Leaves the tasks of other commands, and with `detach` all of them, in the queue."""
        mine = [task.number for task in self.tasks.values() if task.mine and task.number and not self.detach]
        _cancel(list(dict.fromkeys(mine)))

    def script(self, jobs: list[Job], store: Store) -> str:
        """The script that submits the pending jobs, for clusters where people submit by hand."""
        waiting = todo(jobs, store)
        claims = Claims(store, [job.key for job in jobs])
        for job in jobs:
            store.add(job)
        for job in waiting:  # a valid record whose files are missing would stop the worker
            if store.done(job.key) and claims.take(job.key) == "run":
                claims.release(job.key)
        arrays = batches(waiting, (), self.asked, self._estimator(store, jobs).seconds)
        return script(self.asked.options, store.root, self.root, self.kind, arrays)

    def _trail(self, number: str) -> dict[str, int | None]:
        """Which jobs of a shared task have begun, and with which exit codes they ended."""
        return read_trail(self.store.root / "slurm" / f"trail-{number}")


def _cancel(tasks: list[str]) -> None:
    """Take tasks out of the queue; those that have ended meanwhile do not matter."""
    if tasks:
        with contextlib.suppress(SlurmError, ImportError):
            command("scancel", *tasks)
