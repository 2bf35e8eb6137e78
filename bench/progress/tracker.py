"""`--tracker`: the scalars of a run's trainings for TensorBoard, Weights & Biases or MLflow.

The driver writes them from the train.jsonl that each worker appends to: workers and job keys do not depend on a
tracker, and it works with every executor. A tracker holds nothing that is not in the records. The run of a training
that starts again replaces the earlier one. A tracker that fails is left out from there on; the jobs go on.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.executors.base import Event, MissingDependency
from bench.planning.job import TrainJob
from bench.records import training_log
from bench.records.store import Store
from bench.terminal import plain, say

FOLDER = "tensorboard"
PROJECT = "bench"  # of Weights & Biases; the experiment of MLflow
EVERY = 1.0  # seconds between two readings of the logs
_LOSS = "loss"


def tracker(name: str | None, store: Store) -> Tracker | None:
    """The tracker of this name. Raises ValueError for an unknown name, MissingDependency without its package."""
    if name is None:
        return None
    if name not in TRACKERS:
        raise ValueError(f"--tracker is '{name}'; expected {' or '.join(TRACKERS)}")
    kind = TRACKERS[name]
    try:
        for module in kind.modules:
            import_module(module)
    except ImportError as error:
        raise MissingDependency(
            f"--tracker {name} needs the package {name}, which does not import ({error}); "
            f'install it with: pip install "defense-bench[{name}]"'
        ) from None
    return kind(store)


class Tracker:
    """One run for each training: a scalar for each number of train.jsonl, by epoch. Subclasses write them."""

    modules: tuple[str, ...] = ()

    def __init__(self, store: Store) -> None:
        self.store, self.last = store, 0.0
        self._open: dict[str, tuple[Any, int]] = {}  # by key: the run, and the epochs written
        self._failed = False

    def has(self, job: TrainJob) -> bool:
        """Whether the tracker holds a run of this training."""
        raise NotImplementedError

    def begin(self, job: TrainJob) -> Any:
        """A new run in the place of any earlier one of this training."""
        raise NotImplementedError

    def add(self, run: Any, epoch: int, scalars: dict[str, float]) -> None:
        """Write the finite numbers of an epoch."""
        raise NotImplementedError

    def close(self, run: Any, good: bool) -> None:
        """End a run; `good`: the training has a result."""
        raise NotImplementedError

    def follow(self, events: Iterator[Event]) -> Generator[Event]:
        """The same events, with the scalars written in between. Closing it closes `events`."""
        try:
            for event in events:
                self._guarded(event)
                yield event
        finally:
            getattr(events, "close", lambda: None)()
            self._guarded(None)

    def _guarded(self, event: Event | None) -> None:
        """Handle an event, or the end. Whatever a tracker raises (a full disk, no network) is told once."""
        if self._failed:
            return
        try:
            if event is not None:
                self._handle(event)
            else:
                for key in list(self._open):
                    self._close(key, good=False)
        except Exception as error:
            self._failed = True
            name = next(name for name, kind in TRACKERS.items() if isinstance(self, kind))
            what = plain(f"{type(error).__name__}: {error}".splitlines()[0])
            say(f"warning: --tracker {name} failed and gets nothing more ({what}); the jobs go on", sys.stderr)

    def _handle(self, event: Event) -> None:
        job = event.job
        if isinstance(job, TrainJob):
            if event.kind == "started" or (event.kind == "skipped" and not self.has(job)):
                self._open[job.key] = self.begin(job), 0
            if event.kind != "started" and job.key in self._open:
                self._write(job.key)
                self._close(job.key, event.kind in ("ok", "skipped"))
        elif time.monotonic() - self.last > EVERY:
            self.last = time.monotonic()
            for key in self._open:
                self._write(key)

    def _write(self, key: str) -> None:
        run, done = self._open[key]
        log = training_log.read(self.store, key)
        for line in log[done:]:
            named = {_LOSS if name == training_log.TOTAL else name: v for name, v in line.items() if name != "epoch"}
            self.add(run, int(line["epoch"]), {name: v for name, v in named.items() if math.isfinite(v)})
        self._open[key] = run, max(len(log), done)

    def _close(self, key: str, good: bool) -> None:
        run, _ = self._open.pop(key)
        self.close(run, good)


class TensorBoard(Tracker):
    """Event files in `results/tensorboard/`, a folder for each training."""

    modules = ("tensorboard.summary.writer.event_file_writer",)

    def folder(self, job: TrainJob) -> Path:
        """The folder of a training: a readable name, then its key."""
        name = re.sub(r"[^a-z0-9.=]+", "-", job.label().lower()).strip("-.")[:60]
        return self.store.root / FOLDER / f"{name}-seed-{job.seed}-{job.key}"

    def has(self, job: TrainJob) -> bool:
        """Whether its folder is there."""
        return self.folder(job).exists()

    def begin(self, job: TrainJob) -> Any:
        """A writer to an empty folder."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = self.folder(job)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        return EventFileWriter(str(folder))

    def add(self, run: Any, epoch: int, scalars: dict[str, float]) -> None:
        """One event with all of them."""
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        run.add_event(Record(wall_time=time.time(), step=epoch, summary=Summary(value=values)))
        run.flush()

    def close(self, run: Any, good: bool) -> None:
        """Close the file."""
        run.close()


class WandB(Tracker):
    """Runs of Weights & Biases in `results/wandb/`, whose id is the key of the training.

    Offline, unless WANDB_MODE says otherwise: nothing leaves the machine unasked, and nothing asks for an account.
    Of the machine and the code around it nothing is stored.
    """

    modules = ("wandb",)

    def _runs(self, job: TrainJob) -> list[Path]:
        return list((self.store.root / "wandb").glob(f"*run-*-{job.key}"))

    def has(self, job: TrainJob) -> bool:
        """Whether its folder, offline or not, is there."""
        return bool(self._runs(job))

    def begin(self, job: TrainJob) -> Any:
        """A run with the settings of the training; online it replaces the one with its id."""
        import wandb

        for old in self._runs(job):
            shutil.rmtree(old)
        quiet = {"silent": True, "console": "off", "x_disable_stats": True, "x_disable_machine_info": True}
        return wandb.init(
            project=PROJECT,
            id=job.key,
            name=job.label(),
            config={"defense": job.defense.name, "seed": job.seed, **job.defense.settings},
            dir=str(self.store.root),
            mode=None if os.environ.get("WANDB_MODE") else "offline",
            reinit="create_new",  # trainings run beside each other
            settings=wandb.Settings(**quiet, disable_git=True, disable_code=True),
        )

    def add(self, run: Any, epoch: int, scalars: dict[str, float]) -> None:
        """One step."""
        run.log(scalars, step=epoch)

    def close(self, run: Any, good: bool) -> None:
        """Finish it."""
        run.finish(exit_code=0 if good else 1)


class MLflow(Tracker):
    """Runs of MLflow, tagged with the key, in `results/mlflow.db` or where MLFLOW_TRACKING_URI says.

    A database, since MLflow 3 no longer writes folders of files by default.
    """

    modules = ("mlflow", "sqlalchemy", "alembic")

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._client: Any = None
        self._experiment = ""

    def _runs(self, job: TrainJob) -> list[Any]:
        if self._client is None:
            from mlflow import MlflowClient

            for name in ("mlflow", "alembic"):  # which tell each table that they make
                logging.getLogger(name).setLevel(logging.WARNING)
            root = self.store.root.resolve()
            root.mkdir(parents=True, exist_ok=True)
            client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}")
            found = client.get_experiment_by_name(PROJECT)
            self._experiment = found.experiment_id if found else client.create_experiment(PROJECT)
            self._client = client
        return list(self._client.search_runs([self._experiment], f"tags.`bench.key` = '{job.key}'"))

    def has(self, job: TrainJob) -> bool:
        """Whether a run has its key."""
        return bool(self._runs(job))

    def begin(self, job: TrainJob) -> Any:
        """The id of a run with the settings of the training."""
        for old in self._runs(job):
            self._client.delete_run(old.info.run_id)
        run = self._client.create_run(self._experiment, run_name=job.label(), tags={"bench.key": job.key})
        for name, value in {"defense": job.defense.name, "seed": job.seed, **job.defense.settings}.items():
            self._client.log_param(run.info.run_id, name, value)
        return run.info.run_id

    def add(self, run: Any, epoch: int, scalars: dict[str, float]) -> None:
        """One metric for each."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(run, metrics=[Metric(name, value, now, epoch) for name, value in scalars.items()])

    def close(self, run: Any, good: bool) -> None:
        """Give it its state."""
        self._client.set_terminated(run, "FINISHED" if good else "FAILED")


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}
