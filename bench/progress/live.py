"""Output of a run: a live table on a terminal, plain lines elsewhere, JSON events for programs."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.executors.base import Event
from bench.planning.job import Job, ModelJob, TrainJob
from bench.progress.remaining import TimeLeft, together
from bench.records import training_log
from bench.records.runtime_estimate import CostModel, Estimator, clock
from bench.records.store import Store
from bench.terminal import plain as printable


def safe(text: str) -> Text:
    """Text for rich without markup and without control characters of the terminal; line breaks are preserved."""
    return Text("\n".join(printable(line) for line in text.split("\n")))


ALWAYS_SHOWN = ("error", "blocked", "retried")
LINE_EVERY = 30.0  # seconds between plain progress lines
ESTIMATE_EVERY = 2.0  # seconds between estimates of the time left


def title(job: Job, jobs: dict[str, Job]) -> str:
    """`train noisy seed 0` or `pgd Linf 8/255 on noisy seed 0`, with the settings that distinguish the jobs."""
    trained = job if isinstance(job, ModelJob) else jobs.get(job.model_key)
    # a results folder may hold an evaluation without its training
    return job.describe(f"{trained.label()} seed {trained.seed}" if trained else f"training {job.model_key}")


class View:
    """Shows the events of a run and counts them.

    `mode`: "live", "plain", "json" or "quiet"; `workers`: number of slots; `device`, `cost_model`: see `Estimator`.
    """

    def __init__(
        self,
        console: Console,
        store: Store,
        jobs: list[Job],
        mode: str,
        workers: int,
        device: str | None = None,
        cost_model: CostModel | None = None,
    ) -> None:
        self.console, self.store, self.mode, self.workers = console, store, mode, workers
        self.jobs = {job.key: job for job in jobs}
        self.estimator = Estimator(store, device, cost_model)
        self.estimator.know(jobs)
        self.next_estimate, self.time_left = 0.0, TimeLeft(0.0, 0.0, 0.0, 0, 0, 0)
        self.running: dict[str, float] = {}
        self.left = set(self.jobs)
        self.counts = {"skipped": 0, "ok": 0, "error": 0, "blocked": 0}
        self.last_line = time.monotonic()

    def follow(self, events: Iterator[Event]) -> None:
        """Show all events as they come."""
        if self.mode != "live":
            for event in events:
                self._handle(event)
            return
        # redirected, sys.stdout would be rich's proxy of our Screen, and rich's own escapes would pass the filter
        with Live(
            self._table(),
            console=self.console,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ) as live:
            for event in events:
                self._handle(event)
                live.update(self._table())

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
            done = len(self.jobs) - len(self.left)
            name = {"started": "start ", "ok": "done  ", "error": "FAILED"}.get(event.kind, event.kind)
            style = "red" if event.kind in ("error", "blocked") else ""
            text = f"[{done}/{len(self.jobs)}] {name} {title(job, self.jobs)} ({job.key})"
            self.console.print(safe(text + (f": {event.message}" if event.message else "")), style=style)

    def _heartbeat(self) -> None:
        """Without a live table, print the running jobs, their progress and the time left every 30 s."""
        if self.mode == "plain" and time.monotonic() - self.last_line > LINE_EVERY:
            self.last_line = time.monotonic()
            parts = [f"{title(self.jobs[key], self.jobs)} {self._share(key):.0%}" for key in self.running]
            self.console.print(safe(f"[{len(self.jobs) - len(self.left)}/{len(self.jobs)}] {'; '.join(parts)}"))
            self.console.print(safe(f"  time left: {self._left()}"))

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

    def _table(self) -> Table:
        done = len(self.jobs) - len(self.left)
        table = Table(title=f"{done}/{len(self.jobs)} jobs, left: {self._left()}", title_justify="left", box=None)
        for name in ("job", "progress", "detail", "by epoch", "time"):
            table.add_column(name, overflow="fold")
        for key, began in self.running.items():
            job, detail = safe(title(self.jobs[key], self.jobs)), safe(_detail(self.store.progress(key)))
            table.add_row(job, f"{self._share(key):.0%}", detail, self._epochs(key), clock(time.monotonic() - began))
        return table

    def _epochs(self, key: str) -> str:
        """Loss and validation accuracy (if measured) of the finished epochs of a training: bars and the last value."""
        log = training_log.read(self.store, key) if isinstance(self.jobs[key], TrainJob) else []
        losses = [training_log.total(line) for line in log]
        validation = [line[training_log.VALIDATION] for line in log if training_log.VALIDATION in line]
        parts = [f"loss {training_log.sparkline(losses)} {losses[-1]:.3g}"] if training_log.sparkline(losses) else []
        parts += [f"val {training_log.sparkline(validation)} {validation[-1]:.1%}"] if validation else []
        return "\n".join(parts)


def _detail(progress: dict[str, Any]) -> str:
    parts = [f"epoch {progress['epoch']}/{progress['epochs']}"] if "epochs" in progress else []
    parts += [f"{name} {progress[name]:.3f}" for name in ("loss", "accuracy") if name in progress]
    return ", ".join(parts + ([str(progress["note"])] if progress.get("note") else []))


def plain(table: tuple[list[str], list[list[str]], list[str]], echo: Callable[[Any], None], width: int) -> None:
    """Print a (header, rows, notes) table with rich, notes below it.

    Nothing is cut off: headers wrap, and columns that do not fit beside the first two go into further tables.
    """
    header, rows, notes = table
    cells = [max((len(row[k]) for row in rows), default=0) for k in range(len(header))]
    wide = [max(cell, *map(len, name.split())) for cell, name in zip(cells, header, strict=True)]
    names = [textwrap.fill(name, size, break_long_words=False) for name, size in zip(header, wide, strict=True)]
    fixed, groups, used = list(range(min(2, len(header)))), [list[int]()], 0
    for k in range(len(fixed), len(header)):
        used += wide[k] + 3
        if groups[-1] and sum(wide[f] + 3 for f in fixed) + used + 1 > width:
            groups.append([])
            used = wide[k] + 3
        groups[-1].append(k)
    for group in groups:
        shown = Table(header_style="bold")
        for k in fixed + group:
            shown.add_column(safe(names[k]), justify="left" if k == 0 else "right", overflow="fold", no_wrap=k > 0)
        for row in rows:
            shown.add_row(*(safe(row[k]) for k in fixed + group))
        echo(shown)
    for note in notes:
        echo(safe(note))
