"""`--tracker tensorboard`: the scalars of a run's trainings in the format of TensorBoard.

The driver writes them from the train.jsonl that each worker appends to: workers and job keys do not depend on a
tracker, and it works with every executor. `results/tensorboard/` holds nothing that is not in the records; the folder
of a training that starts again is overwritten.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from bench.executors.base import Event, MissingDependency
from bench.planning.job import TrainJob
from bench.records import training_log
from bench.records.store import Store

NAMES = ("tensorboard",)
FOLDER = "tensorboard"
EVERY = 1.0  # seconds between two readings of the logs
_LOSS = "loss"


def tracker(name: str | None, store: Store) -> TensorBoard | None:
    """The tracker of this name. Raises ValueError for an unknown name, MissingDependency without its package."""
    if name is None:
        return None
    if name not in NAMES:
        raise ValueError(f"--tracker is '{name}'; expected {' or '.join(NAMES)}")
    try:
        import tensorboard.summary.writer.event_file_writer  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"--tracker tensorboard needs the package tensorboard, which does not import ({error}); "
            'install it with: pip install "defense-bench[tensorboard]"'
        ) from None
    return TensorBoard(store)


class TensorBoard:
    """One TensorBoard run for each training: a scalar for each number of train.jsonl, by epoch."""

    def __init__(self, store: Store) -> None:
        self.store, self.last = store, 0.0
        self._open: dict[str, tuple[Any, int]] = {}  # by key: the writer, and the epochs written

    def follow(self, events: Iterator[Event]) -> Generator[Event]:
        """The same events, with the scalars written in between. Closing it closes `events`."""
        try:
            for event in events:
                self._handle(event)
                yield event
        finally:
            getattr(events, "close", lambda: None)()
            for key in list(self._open):
                self._close(key)

    def _handle(self, event: Event) -> None:
        job = event.job
        if isinstance(job, TrainJob):
            folder = self.folder(job)
            if event.kind == "started" or (event.kind == "skipped" and not folder.exists()):
                self._begin(job, folder)
            if event.kind != "started" and job.key in self._open:
                self._write(job.key)
                self._close(job.key)
        elif time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            for key in self._open:
                self._write(key)

    def folder(self, job: TrainJob) -> Path:
        """The folder of a training: a readable name, then its key."""
        name = re.sub(r"[^a-z0-9.=]+", "-", job.label().lower()).strip("-.")[:60]
        return self.store.root / FOLDER / f"{name}-seed-{job.seed}-{job.key}"

    def _begin(self, job: TrainJob, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        self._open[job.key] = EventFileWriter(str(folder)), 0

    def _write(self, key: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary

        writer, done = self._open[key]
        log = training_log.read(self.store, key)
        for line in log[done:]:
            named = {_LOSS if name == training_log.TOTAL else name: v for name, v in line.items() if name != "epoch"}
            values = [Summary.Value(tag=name, simple_value=v) for name, v in named.items() if math.isfinite(v)]
            writer.add_event(Record(wall_time=time.time(), step=int(line["epoch"]), summary=Summary(value=values)))
        if log[done:]:
            writer.flush()
        self._open[key] = writer, max(len(log), done)

    def _close(self, key: str) -> None:
        writer, _ = self._open.pop(key)
        writer.close()
