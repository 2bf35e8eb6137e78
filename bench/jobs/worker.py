"""One job in, one record out. Every executor calls `work`, the only place that catches every exception."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from bench.atomic import appending
from bench.core.attack import Unsupported
from bench.core.threat import NotFiniteError
from bench.jobs import microbatch
from bench.jobs.evaluation_job import run_evaluation
from bench.jobs.model_files import import_model, load_images, save_weights
from bench.jobs.progress_file import ProgressFile, jobs_on_device
from bench.jobs.provenance import energy, joules, peak_memory, provenance
from bench.jobs.retries import classify, halvings
from bench.planning.job import ImportJob, Job, TrainJob
from bench.plugins import line_of
from bench.records.evaluated_weights import weights_for_record
from bench.records.record import JobError, Record, Retry, State, Time, TrainRecord
from bench.records.redact import RedactedLog, redacted
from bench.records.store import Store
from bench.training import stop_signals
from bench.training.divergence import Diverged
from bench.training.resume import PLACE, Checkpointer, origin_of
from bench.training.train import train


@stop_signals.job()
def work(
    results: Path,
    key: str,
    root: Path,
    device: str = "cpu",
    workers: int = 1,
    before: Sequence[Retry] = (),
) -> str:
    """Run a job and store its record. An exception is not raised: it is stored in the record.

    Args:
        results: Results folder, which holds the job.
        key: Key of the job.
        root: Data folder.
        device: A torch device, such as `cuda`.
        workers: Jobs that share the device.
        before: Retries so far, which are recorded (bench.jobs.retries).

    Returns:
        The state of the record.
    """
    store = Store(results)
    job, folder = store.job(key), store.folder(key)
    started, began = datetime.now(UTC), time.monotonic()  # the wall clock may be set while the job runs
    before_it = joules(device)
    rows = microbatch.rows(job, halvings(before))
    weights = None
    with appending(folder / "log.txt") as file:
        log = RedactedLog(file)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            print(f"{job.kind} {key} on {device}, pid {os.getpid()}, {started.isoformat()}")
            try:
                # named before they are read: if they change meanwhile, the record is outdated and the job runs again
                weights = weights_for_record(store, job)
                record = _run(store, job, root, torch.device(device), rows)
            except Unsupported as reason:
                record = Record("unsupported", reason=str(reason))
            except Exception as error:
                traceback.print_exc()
                record = _failed(error)
            print(f"{record.state} after {time.monotonic() - began:.1f} s")
    sharing = max(workers, jobs_on_device(folder))
    record = replace(
        record,
        time=Time(started.isoformat(timespec="seconds"), round(time.monotonic() - began, 3)),
        provenance=provenance(job, device, sharing, rows),
        peak_memory_mb=peak_memory(device),
        energy_joules=energy(before_it, joules(device), sharing),
        weights_sha256=weights,
        retries=tuple(before),
    )
    store.put(job, record)
    (folder / "progress.json").unlink(missing_ok=True)
    if record.state not in ("error", "oom"):  # a retry uses the finished blocks of the failed attempt
        shutil.rmtree(folder / "blocks", ignore_errors=True)
    return record.state


def _run(store: Store, job: Job, root: Path, device: torch.device, rows: int | None) -> Record:
    """The result of a job. `rows`: the most images in one pass of an evaluation, None for no limit."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    # evaluations are in fp32; trainings may use the faster convolutions of the GPU
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = isinstance(job, TrainJob)
    report = ProgressFile(store.folder(job.key) / "progress.json", device.type)
    report({"share": 0.0})
    if isinstance(job, TrainJob):
        return _train(store.folder(job.key), job, root, device, report)
    if isinstance(job, ImportJob):
        return import_model(store.folder(job.key), job, root, device, report)
    return run_evaluation(store, job, root, device, report, rows)


def _train(folder: Path, job: TrainJob, root: Path, device: torch.device, report: ProgressFile) -> Record:
    data = load_images(job, None, root, device, report)
    checkpointer = Checkpointer(folder / PLACE, functools.partial(origin_of, job, data))
    trained = train(job, data, folder / "train.jsonl", report, checkpointer)
    files = save_weights(folder, "last", trained.model.net.state_dict())
    if trained.best is not None:
        files |= save_weights(folder, "best", trained.best)
    return TrainRecord("done", trained.metrics, files=files)


def _failed(error: Exception) -> Record:
    """The record of a job that raised: diverged for NaN and Inf, oom if memory ran out, else error."""
    state: State = "error"
    if isinstance(error, (Diverged, NotFiniteError)):
        state = "diverged"
    elif classify(type(error).__name__, str(error)) == "oom":
        state = "oom"
    place = line_of(error) if state == "error" else ""
    message, trace = redacted(f"{error}{place and f' ({place})'}"), redacted(traceback.format_exc())
    return Record(state, error=JobError(type(error).__name__, message, trace))
