"""A Slurm cluster: each job is `bench worker KEY`, submitted as array tasks that wait for what they need.

Slurm may end and requeue a job at any moment: what was kept stays, and records are the truth, not Slurm's states. The
worker takes the lease of its job; this driver asks who holds it, and submits what nobody is at.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.atomic import write_atomic
from bench.executors.base import Event, begin, blocker, elsewhere, ended, todo
from bench.executors.sbatch import ACTIVE, Batch, SlurmError, batches, command, ending, fields, parse_job, queue, script
from bench.executors.submitted import Submitted
from bench.jobs import retries
from bench.jobs.attempt import HELD, forget, retry, tried
from bench.planning.job import Job
from bench.records.leases import Claims, holder_of
from bench.records.store import Store

TICK = 0.5  # seconds between ticks
FASTEST, SLOWEST = 1.0, 15.0  # seconds between looks at the queue: often in a short run, seldom in a long one
GRACE = 10.0  # seconds that a record may take to be seen from another machine
PATIENCE = 1800.0  # seconds without an answer of Slurm's, or of the results folder, after which the driver gives up
KINDS: dict[str, retries.Kind] = {"OUT_OF_MEMORY": "oom", "TIMEOUT": "timeout"}  # by Slurm's state of a task
NAMES = {"oom": "KilledForMemory", "timeout": "Timeout", "died": "WorkerDied"}


@dataclass
class Slurm:
    """Slurm executor. `root`: the data folder; `asked`: options of sbatch, such as `partition=gpu`; `max_jobs`: most
    jobs in the queue at a time; `detach`: submit everything and leave."""

    root: Path
    asked: tuple[str, ...] = ()
    device: str = "cpu"
    max_jobs: int | None = None
    detach: bool = False

    def devices(self) -> str:
        """See Executor."""
        return f"{self.device}, on the nodes that Slurm gives"

    def problems(self, jobs: list[Job], store: Store) -> list[str]:
        """See Executor. What Slurm thinks of the options is told when the first job is submitted."""
        from bench.executors.local import Local

        queue(store.root)  # no Slurm, or none that answers: told before anything is written
        return Local(self.root, []).problems(jobs, store)

    def run(self, jobs: list[Job], store: Store) -> Iterator[Event]:
        """See Executor. Closing the iterator cancels what was submitted, unless `detach`."""
        claims, waiting = yield from begin(jobs, store)
        pending = {job.key for job in waiting}
        run = Submitted(store, claims, {job.key: job for job in jobs}, pending, waiting)
        try:
            yield from self._follow(run)
        finally:
            claims.close()
            _cancel([task for task in run.live.values() if task in run.mine] if not self.detach else [])

    def _follow(self, run: Submitted) -> Iterator[Event]:
        """Look, submit, wait, until every job is over. A controller that restarts, or a file server that is away for a
        moment, is no reason to give up a week's work."""
        states: dict[str, str] | None = queue(run.store.root) if run.pending else {}
        began = well = time.monotonic()
        while run.pending:
            try:
                yield from self._round(run, states)
                well = time.monotonic() if states is not None else well
            except OSError:
                nothing_to_lose = self.detach or not (run.mine or run.live)
                if nothing_to_lose or time.monotonic() - well > PATIENCE:
                    raise
            if self.detach:
                return
            pause = min(SLOWEST, max(FASTEST, (time.monotonic() - began) / 20))
            until = time.monotonic() + (pause if run.pending else 0)
            while time.monotonic() < until:
                yield Event("tick")
                time.sleep(TICK)
            try:
                states = queue(run.store.root)
            except SlurmError:
                if time.monotonic() - well > PATIENCE:
                    raise
                states = None

    def _round(self, run: Submitted, states: dict[str, str] | None) -> Iterator[Event]:
        """One look; submits what can be. What an error leaves undone is done in the next round."""
        yield from self._look(run, states)
        yield from self._blocked(run)
        if states is not None:
            yield from self._adopt(run, states)
            yield from self._submit(run)

    def script(self, jobs: list[Job], store: Store) -> str:
        """The script that submits what is left to do; for labs where people submit by hand."""
        waiting = todo(jobs, store)
        claims = Claims(store, [job.key for job in jobs])
        for job in jobs:
            store.add(job)
        for job in waiting:  # a record that stands, but whose files are gone, would stop its worker
            if store.done(job.key) and claims.take(job.key) == "run":
                claims.release(job.key)
        return script(self.asked, store.root, self.root, self.device, batches(waiting))

    def _adopt(self, run: Submitted, states: dict[str, str]) -> Iterator[Event]:
        """Jobs that another command submitted and that are still in the queue are followed, not submitted twice."""
        wanted = {job.key: job for job in run.waiting if job.key not in run.held}
        if not wanted:
            return
        for path in sorted((run.store.root / "slurm").glob("[0-9]*")):
            for index, key in enumerate(path.read_text(encoding="utf-8").split()):
                if key in wanted and states.get(f"{path.name}_{index}") in ACTIVE:
                    _, event = run.take(wanted.pop(key))
                    if event is not None:
                        yield event
                    else:
                        run.live[key] = f"{path.name}_{index}"
        run.waiting = [job for job in run.waiting if job.key not in run.live]

    def _submit(self, run: Submitted) -> Iterator[Event]:
        """Arrays for what there is room for. A refusal is raised only when nothing else of ours is in the queue."""
        run.held = {job.key for job in run.waiting if holder_of(run.store, job.key)}
        while batch := next(iter(batches(run.free(), run.live)), None):
            room = len(batch.jobs) if self.max_jobs is None else self.max_jobs - len(run.live)
            if room < 1:
                return
            taken = list[Job]()
            for job in batch.jobs[:room]:
                free, event = run.take(job)
                taken += [job] if free else []
                if event is not None:
                    yield event
            try:
                self._sbatch(run, Batch(tuple(taken), batch.hard, batch.soft))
            except SlurmError:
                if run.live:
                    return
                raise

    def _sbatch(self, run: Submitted, batch: Batch) -> None:
        if not batch.jobs:
            return
        folder = run.store.root / "slurm"
        folder.mkdir(exist_ok=True)
        text = script(self.asked, run.store.root, self.root, self.device, [])
        write_atomic(folder / "job.sh", lambda file: file.write(os.fsencode(text)))  # sbatch keeps a copy of its own
        keys = [job.key for job in batch.jobs]
        said = command("sbatch", *batch.options(run.live), str((folder / "job.sh").absolute()), *keys)
        number = said.strip().partition(";")[0]  # a cluster's name may follow
        run.submit(list(batch.jobs), [f"{number}_{index}" for index in range(len(keys))])
        write_atomic(folder / number, lambda file: file.write(" ".join(keys).encode()))

    def _blocked(self, run: Submitted) -> Iterator[Event]:
        for key in [job.key for job in run.jobs.values() if job.key in run.pending]:
            reason = blocker(run.jobs[key], run.store, run.pending)
            if reason and key not in run.started:
                _cancel([run.live[key]] if key in run.live else [])
                run.over(key)
                yield Event("blocked", run.jobs[key], reason)

    def _look(self, run: Submitted, states: dict[str, str] | None) -> Iterator[Event]:
        """Events of the submitted jobs, by what lies in the store first and by Slurm's states (if known) second."""
        for key, task in list(run.live.items()):
            job, event = run.jobs[key], None
            os.listdir(run.store.folder(key))  # a network file system looks again
            event = ended(job, run.store)
            state = None if states is None else states.get(task, "")
            if state == "PENDING" and event is not None and key not in run.started:
                event = elsewhere(job, run.store)
            elif state is not None and event is None and state not in ACTIVE:
                event = self._vanished(run, job, task)
            if key not in run.started and (state == "RUNNING" or (event is not None and event.kind != "skipped")):
                run.started.add(key)
                yield Event("started", job)
            if event is not None:
                if event.kind != "retried":
                    run.over(key)
                yield event

    def _vanished(self, run: Submitted, job: Job, task: str) -> Event | None:
        """Slurm is done with a job that has no record: an error, unless one is on its way or others are at the job."""
        said = ending(task)
        found = fields(said)
        dropped = found.get("Reason") == "DependencyNeverSatisfied"  # what it waits for did not end there
        cancelled = found.get("JobState") == "CANCELLED" and task not in run.mine
        if dropped or cancelled or found.get("ExitCode") == f"{HELD}:0" or holder_of(run.store, job.key):
            run.back(job)
            return None
        if time.monotonic() - run.lost.setdefault(job.key, time.monotonic()) < GRACE:
            return None
        return self._failed(run, job, task, said)

    def _failed(self, run: Submitted, job: Job, task: str, said: str) -> Event:
        """A job that left no record: an evaluation that Slurm killed for memory is submitted again, with half the
        batch in each pass; anything else is an error, which the same command tries again."""
        kind = KINDS.get(fields(said).get("JobState", ""), "died")
        fault = retries.Fault(kind, NAMES[kind], f"the worker ended without a record: {parse_job(said)}")
        before = tried(run.store, job.key)
        if kind == "oom" and (step := retries.step(fault, job, before, shared=False)) == "halve":
            retry(run.store, job.key, [*before, retries.entry(fault, step)])
            run.back(job)
            return Event("retried", job, f"{fault.message}; {retries.WORDS[step]}")
        content: dict[str, Any] = {"error": {"type": fault.name, "message": fault.message}, "metrics": {}, "files": {}}
        run.store.put(job, retries.final(fault), content | ({"attempts": before} if before else {}))
        forget(run.store, job.key)
        return Event("error", job, f"{fault.message} (job {task})")


def _cancel(tasks: list[str]) -> None:
    """Take tasks out of the queue; those that ended meanwhile are no matter."""
    if tasks:
        with contextlib.suppress(SlurmError, ImportError):
            command("scancel", *tasks)
