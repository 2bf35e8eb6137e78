"""Output of a run: a live table on a terminal, plain lines elsewhere, JSON events for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.executors.base import Event
from bench.planning.job import Job, ModelJob, TrainJob
from bench.progress import forecast
from bench.progress.cost_model import CostModel
from bench.progress.remaining import TimeLeft, together
from bench.progress.saved import kept
from bench.records import training_log
from bench.records.runtime_estimate import Estimator, clock
from bench.records.store import Store
from bench.terminal import counted, say
from bench.terminal import plain as printable


def safe(text: str) -> Text:
    """Text for rich without markup and without control characters of the terminal; line breaks are preserved."""
    return Text("\n".join(printable(line) for line in text.split("\n")))


ALWAYS_SHOWN = ("error", "blocked", "retried")
LINE_EVERY = (2.0, 30.0)  # seconds between plain progress lines: at first, and at most, as a log is read later
ESTIMATE_EVERY = 2.0  # seconds between estimates of the time left


def title(job: Job, jobs: dict[str, Job]) -> str:
    """`train noisy seed 0` or `pgd Linf 8/255 on noisy seed 0`, with the settings that distinguish the jobs."""
    trained = job if isinstance(job, ModelJob) else jobs.get(job.model_key)
    # a results folder may hold an evaluation without its training
    return job.describe(f"{trained.label()} seed {trained.seed}" if trained else f"training {job.model_key}")


@contextmanager
def waiting(console: Console, mode: str, what: str) -> Iterator[Callable[[str], None]]:
    """Show what takes time before the first job can start: on a terminal with the seconds that it has taken.

    Yields a function that takes a note on what takes so long, which is shown behind it, or printed where there is no
    live display.
    """
    began, notes = time.monotonic(), [what]
    if mode == "live":
        with _screen(console, lambda: safe(f"{': '.join(notes)} ({clock(time.monotonic() - began)})")):
            yield lambda text: notes.__setitem__(slice(1, None), [text])
    else:
        yield lambda text: say(f"{what}: {text}") if mode == "plain" else None


def _screen(console: Console, drawn: Callable[[], RenderableType]) -> Live:
    """What is drawn anew four times a second, and removed at the end."""
    # redirected, sys.stdout would be rich's proxy of our Screen, and rich's own escapes would pass the filter; lines of
    # stderr go above what is drawn, which would otherwise not be removed whole
    own = sys.stderr.isatty()
    return Live(console=console, get_renderable=drawn, transient=True, redirect_stdout=False, redirect_stderr=own)


class View:
    """Shows the events of a run and counts them.

    `mode`: "live", "plain", "json" or "quiet"; `workers`: number of slots; `device`: see `Estimator`.
    """

    def __init__(
        self,
        console: Console,
        store: Store,
        jobs: list[Job],
        mode: str,
        workers: int,
        device: str | None = None,
    ) -> None:
        self.console, self.store, self.mode, self.workers = console, store, mode, workers
        self.jobs = {job.key: job for job in jobs}
        self.number = {key: number for number, key in enumerate(self.jobs, start=1)}  # its place in the plan
        self.estimator = Estimator(store, device)
        self.estimator.know(jobs)
        self.next_estimate, self.time_left = 0.0, TimeLeft(0.0, 0.0, 0.0, 0, 0, 0)
        self.running: dict[str, float] = {}
        self.left = set(self.jobs)
        self.counts = {"skipped": 0, "ok": 0, "error": 0, "blocked": 0}
        self.last_line, self.pause = time.monotonic(), LINE_EVERY[0]

    def estimate(self, cost_model: CostModel | None) -> list[str] | None:
        """Estimate with this model from now on. Lines for the user about the time of the jobs without a record; None if
        a forward pass has yet to be timed for that, which the model may not do."""
        self.estimator.cost_model = cost_model
        left = [job for job in self.jobs.values() if not self.store.done(job.key)]
        if not left or self.mode not in ("live", "plain"):
            return []
        lines, unknown = forecast.time(left, self.store, self.estimator, self.workers)
        if unknown and cost_model is not None and not cost_model.measure:
            return None
        return [*forecast.equal_n(list(self.jobs.values()), self.estimator, self.workers), *lines]

    def follow(self, events: Iterator[Event]) -> None:
        """Show all events as they come."""
        if self.mode != "live":
            for event in events:
                self._handle(event)
            return
        shown = self._table()
        with _screen(self.console, lambda: shown):
            for event in events:
                self._handle(event)
                shown = self._table()

    def kept(self) -> list[str]:
        """What each job that was running has kept, a line each: `train noisy seed 0: 12 of 200 epochs kept`."""
        return [f"{title(self.jobs[key], self.jobs)}: {kept(self.store, self.jobs[key])}" for key in self.running]

    def _handle(self, event: Event) -> None:
        job = event.job
        if job is None:
            self._heartbeat()
            return
        if event.kind == "started":
            self.running[job.key] = time.monotonic()
        elif event.kind == "retried":
            self.running.pop(job.key, None)
        else:
            self.counts[event.kind] += 1
            self.left.discard(job.key)
            self.running.pop(job.key, None)
            record = self.store.record(job.key) if event.kind == "ok" else None
            if record is not None and record.state == "done":
                self.estimator.learn(job, record)
        self._print(event, job)

    def _print(self, event: Event, job: Job) -> None:
        if self.mode == "json":
            line = {"event": event.kind, "key": job.key, "kind": job.kind, "message": event.message}
            print(json.dumps({**line, "job": title(job, self.jobs)}), flush=True)
        elif event.kind in ALWAYS_SHOWN or (self.mode == "plain" and event.kind in ("ok", "started")):
            # no count of ended jobs: which job ends first depends on the machine; sorted, equal runs are equal
            name = {"started": "start ", "ok": "done  ", "error": "FAILED"}.get(event.kind, event.kind)
            style = "red" if event.kind in ("error", "blocked") else ""
            text = f"{name} #{self.number[job.key]} {title(job, self.jobs)} ({job.key})"
            self.console.print(safe(text + (f": {event.message}" if event.message else "")), style=style)

    def _heartbeat(self) -> None:
        """Without a live table, print the running jobs, their progress and the time left at growing intervals."""
        if self.mode == "plain" and self.running and time.monotonic() - self.last_line > self.pause:
            self.last_line, self.pause = time.monotonic(), min(2 * self.pause, LINE_EVERY[1])
            for key in self.running:
                detail = _detail(self.store.progress(key), self.jobs[key])
                say(f"  {self._share(key):4.0%} {title(self.jobs[key], self.jobs)}{': ' * bool(detail)}{detail}")
            say(f"[{len(self.jobs) - len(self.left)}/{len(self.jobs)}] time left {self._left()}")

    def _share(self, key: str) -> float:
        return float(self.store.progress(key).get("share", 0.0))

    def _left(self) -> str:
        """The time until all jobs are done; computed every few seconds, since it reads the progress of running jobs."""
        if time.monotonic() >= self.next_estimate:
            began = time.monotonic()
            waiting = [self.jobs[key] for key in self.left]
            self.time_left = together(self.store, waiting, self.estimator, self.workers)
            self.next_estimate = time.monotonic() + max(ESTIMATE_EVERY, 50 * (time.monotonic() - began))
        return f"{self.time_left.describe()}, {self.time_left.source()}"

    def _table(self) -> Group:
        done = len(self.jobs) - len(self.left)
        rest = f"; time left {self._left()}" if self.left else ""
        heading = safe(
            f"{done} of {counted(len(self.jobs), 'job')} done{rest}"
        )  # a title would be as narrow as the table
        table = Table(box=None)
        for name in ("job", "progress", "time", "detail"):
            table.add_column(name, overflow="fold", header_style="dim", justify="left" if name != "time" else "right")
        for key, began in self.running.items():
            detail = _detail(self.store.progress(key), self.jobs[key])
            lines = "\n".join(filter(None, (detail, self._epochs(key))))
            job, share = safe(title(self.jobs[key], self.jobs)), f"{self._share(key):.0%}"
            table.add_row(job, share, clock(time.monotonic() - began), safe(lines))
        return Group(heading, table)

    def _epochs(self, key: str) -> str:
        """Loss and validation accuracy (if measured) of the finished epochs of a training: bars and the last value."""
        log = training_log.read(self.store, key) if isinstance(self.jobs[key], TrainJob) else []
        losses = [training_log.total(line) for line in log]
        validation = [line[training_log.VALIDATION] for line in log if training_log.VALIDATION in line]
        parts = [f"loss {training_log.sparkline(losses)} {losses[-1]:.3g}"] if training_log.sparkline(losses) else []
        parts += [f"val {training_log.sparkline(validation)} {validation[-1]:.1%}"] if validation else []
        return "\n".join(parts)


def _detail(progress: dict[str, Any], job: Job) -> str:
    """`epoch 12 of 200, step 40 of 390`; what an attack reports, and the forward passes that it has made an image."""
    parts = [f"epoch {progress['epoch']} of {progress['epochs']}"] if {"epoch", "epochs"} <= progress.keys() else []
    parts += [f"step {progress['step']} of {progress['steps']}"] if {"step", "steps"} <= progress.keys() else []
    parts += [str(progress["note"])] if progress.get("note") else []
    parts += [f"accuracy {progress['accuracy']:.3f}"] if "accuracy" in progress else []
    passes = progress.get("passes", 0) / max(job.size, 1.0)
    parts += [counted(int(passes), "pass") + " an image"] if passes >= 2 else []
    return ", ".join(parts)
