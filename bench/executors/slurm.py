"""A Slurm cluster: each job is `bench worker KEY`, submitted as array tasks that wait for what they need.

Slurm may end and requeue a job at any moment: finished blocks stay, and records are the truth, not Slurm's states.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.executors.base import Event, blocker, ended, todo
from bench.executors.sbatch import ACTIVE, Batch, SlurmError, batches, command, queue, script, why
from bench.job import Job
from bench.store import Store, write_atomic

TICK = 0.5  # seconds between ticks
FASTEST, SLOWEST = 1.0, 15.0  # seconds between looks at the queue: often in a short run, seldom in a long one
GRACE = 10.0  # seconds that a record may take to be seen from another machine
PATIENCE = 1800.0  # seconds without an answer of Slurm's after which the driver gives up


@dataclass
class _Run:
    """Where a run stands. `live`: task of each submitted job; `mine`: those tasks that this command submitted."""

    store: Store
    jobs: dict[str, Job]
    pending: set[str]
    waiting: list[Job]
    live: dict[str, str] = field(default_factory=dict)
    mine: set[str] = field(default_factory=set)
    started: set[str] = field(default_factory=set)
    lost: dict[str, float] = field(default_factory=dict)  # when Slurm was first seen to be done with a job

    def over(self, key: str) -> None:
        """A job has ended or will never begin."""
        self.pending.discard(key)
        self.live.pop(key, None)
        self.waiting = [job for job in self.waiting if job.key != key]


@dataclass
class Slurm:
    """Slurm executor. `root`: the data folder; `asked`: options of sbatch, such as `partition=gpu`; `max_jobs`: most
    jobs in the queue at a time; `detach`: submit everything and leave."""

    root: Path
    asked: tuple[str, ...] = ()
    device: str = "cpu"
    max_jobs: int | None = None
    detach: bool = False

    def problems(self, jobs: list[Job], store: Store) -> list[str]:
        """See Executor. What Slurm thinks of the options is told when the first job is submitted."""
        from bench.executors.local import Local

        queue(store.root)  # no Slurm, or none that answers: told before anything is written
        return Local(self.root, []).problems(jobs, store)

    def run(self, jobs: list[Job], store: Store) -> Iterator[Event]:
        """See Executor. Closing the iterator cancels what was submitted, unless `detach`."""
        waiting = todo(jobs, store)
        pending = {job.key for job in waiting}
        for job in jobs:
            store.add(job)
            if job.key not in pending:
                yield Event("skipped", job)
        run = _Run(store, {job.key: job for job in jobs}, pending, waiting)
        if pending:
            self._adopt(run)
        began = answered = time.monotonic()
        try:
            while run.pending:
                yield from self._blocked(run)
                self._submit(run)
                if self.detach:
                    return
                try:
                    states = queue(store.root)
                    answered = time.monotonic()
                except SlurmError:  # a controller that restarts is no reason to give up a week's work
                    if time.monotonic() - answered > PATIENCE:
                        raise
                    states = None
                yield from self._look(run, states)
                pause = min(SLOWEST, max(FASTEST, (time.monotonic() - began) / 20))
                until = time.monotonic() + (pause if run.pending else 0)
                while time.monotonic() < until:
                    yield Event("tick")
                    time.sleep(TICK)
        finally:
            _cancel([run.live[key] for key in run.live if key in run.mine] if not self.detach else [])

    def script(self, jobs: list[Job], store: Store) -> str:
        """The script that submits what is left to do; for labs where people submit by hand."""
        waiting = todo(jobs, store)
        for job in jobs:
            store.add(job)
        return script(self.asked, store.root, self.root, self.device, batches(waiting))

    def _adopt(self, run: _Run) -> None:
        """Jobs that an earlier command submitted and that are still in the queue are followed, not submitted twice."""
        states = queue(run.store.root)
        for path in sorted((run.store.root / "slurm").glob("[0-9]*")):
            for index, key in enumerate(path.read_text(encoding="utf-8").split()):
                if key in run.pending and states.get(f"{path.name}_{index}") in ACTIVE:
                    run.live[key] = f"{path.name}_{index}"
        run.waiting = [job for job in run.waiting if job.key not in run.live]

    def _submit(self, run: _Run) -> None:
        """Arrays for what there is room for. A refusal is raised only when nothing else of ours is in the queue."""
        for batch in batches(run.waiting, run.live):
            room = len(batch.jobs) if self.max_jobs is None else self.max_jobs - len(run.live)
            if room < 1:
                return
            taken = Batch(batch.jobs[:room], batch.hard, batch.soft)
            try:
                self._sbatch(run, taken)
            except SlurmError:
                if run.live:
                    return
                raise
            if len(taken.jobs) < len(batch.jobs):
                return

    def _sbatch(self, run: _Run, batch: Batch) -> None:
        folder = run.store.root / "slurm"
        folder.mkdir(exist_ok=True)
        text = script(self.asked, run.store.root, self.root, self.device, [])
        write_atomic(folder / "job.sh", lambda file: file.write(os.fsencode(text)))  # sbatch keeps a copy of its own
        for job in batch.jobs:
            (run.store.folder(job.key) / "record.json").unlink(missing_ok=True)  # that of an error
        keys = [job.key for job in batch.jobs]
        said = command("sbatch", *batch.options(run.live), str((folder / "job.sh").absolute()), *keys)
        number = said.strip().partition(";")[0]  # a cluster's name may follow
        run.live |= {key: f"{number}_{index}" for index, key in enumerate(keys)}
        run.mine |= set(keys)
        run.waiting = [job for job in run.waiting if job.key not in run.live]
        write_atomic(folder / number, lambda file: file.write(" ".join(keys).encode()))

    def _blocked(self, run: _Run) -> Iterator[Event]:
        for key in [job.key for job in run.jobs.values() if job.key in run.pending]:
            reason = blocker(run.jobs[key], run.store, run.pending)
            if reason and key not in run.started:
                _cancel([run.live[key]] if key in run.live else [])
                run.over(key)
                yield Event("blocked", run.jobs[key], reason)

    def _look(self, run: _Run, states: dict[str, str] | None) -> Iterator[Event]:
        """Events of the submitted jobs, by what lies in the store first and by Slurm's states (if known) second."""
        for key, task in list(run.live.items()):
            job, event = run.jobs[key], None
            os.listdir(run.store.folder(key))  # a network file system looks again
            event = ended(job, run.store)
            if states is not None and event is None and states.get(task) not in ACTIVE:
                event = self._vanished(run, job, task)
            running = states is not None and states.get(task) == "RUNNING"
            if key not in run.started and (running or event is not None):
                run.started.add(key)
                yield Event("started", job)
            if event is not None:
                run.over(key)
                yield event

    def _vanished(self, run: _Run, job: Job, task: str) -> Event | None:
        """Slurm is done with a job that has no record: an error, unless the record is on its way."""
        if not run.pending.isdisjoint(job.waits):  # Slurm dropped it because another one failed: that is told first
            return None
        if time.monotonic() - run.lost.setdefault(job.key, time.monotonic()) < GRACE:
            return None
        message = f"the worker ended without a record: {why(task)}"
        content = {"error": {"type": "WorkerDied", "message": message}, "metrics": {}, "files": {}}
        run.store.put(job, "error", content)
        return Event("error", job, f"{message} (job {task})")


def _cancel(tasks: list[str]) -> None:
    """Take tasks out of the queue; those that ended meanwhile are no matter."""
    if tasks:
        with contextlib.suppress(SlurmError, ImportError):
            command("scancel", *tasks)
