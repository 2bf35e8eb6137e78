"""One job folder in, one record out. The same command under every executor; the only place that catches everything."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes

from bench.atomic import appending, file_hash, write_atomic
from bench.core.classifier import Classifier
from bench.core.threat import NotFiniteError
from bench.data.images import Data, with_validation_as_test
from bench.data.images import load as load_data
from bench.jobs import microbatch as passes
from bench.jobs import retries
from bench.jobs.evaluate import Unsupported
from bench.jobs.evaluation_job import assemble, judge
from bench.jobs.provenance import peak_memory, provenance
from bench.planning.job import ImportJob, Job, ModelJob, TrainJob
from bench.records import evaluated_weights as judged
from bench.records.record import (
    AuditMetrics,
    EvaluationMetrics,
    JobError,
    Record,
    Retry,
    State,
    Time,
    TrainRecord,
    weights_file,
)
from bench.records.redact import Portable, portable
from bench.records.store import IMAGES, SAMPLES, SHARED, Store
from bench.training import sigterm as stopping
from bench.training.divergence import Diverged
from bench.training.resume import PLACE, Checkpointer, origin_of
from bench.training.train import build, train


@stopping.job()
def work(
    results: Path,
    key: str,
    root: Path,
    device: str = "cpu",
    workers: int = 1,
    before: Sequence[Retry] = (),
) -> str:
    """Do one job and store its record; gives the record's state. Raises nothing: an exception is state "error", or
    "oom". `workers`: jobs that share the device; `before`: the retries so far (bench.jobs.retries), which are recorded.
    """
    store = Store(results)
    job = store.job(key)
    folder = store.folder(key)
    weights: str | None = None
    started, began = datetime.now(UTC), time.monotonic()  # wall clocks jump
    rows = passes.rows(job, retries.halvings(before))
    with appending(folder / "log.txt") as file:
        log = Portable(file)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            print(f"{job.kind} {key} on {device}, pid {os.getpid()}, {started.isoformat()}")
            try:
                weights = judged.says(store, job)  # before they are read: where they change meanwhile it is done again
                record = _run(store, job, root, torch.device(device), rows)
            except Unsupported as reason:
                record = Record("unsupported", reason=str(reason))
            except Exception as error:
                traceback.print_exc()
                out_of_memory = retries.classify(type(error).__name__, str(error)) == "oom"
                no_numbers = isinstance(error, (Diverged, NotFiniteError))
                state: State = "diverged" if no_numbers else "oom" if out_of_memory else "error"
                message, trace = portable(str(error)), portable(traceback.format_exc())
                record = Record(state, error=JobError(type(error).__name__, message, trace))
            print(f"{record.state} after {time.monotonic() - began:.1f} s")
    record = dataclasses.replace(
        record,
        time=Time(started.isoformat(timespec="seconds"), round(time.monotonic() - began, 3)),
        provenance=provenance(job, device, max(workers, _neighbors(folder)), rows),
        peak_memory_mb=peak_memory(device),
        weights_sha256=weights,
        retries=tuple(before),
    )
    store.put(job, record)
    (folder / "progress.json").unlink(missing_ok=True)
    if record.state not in ("error", "oom"):  # what was done before an error is not done again
        shutil.rmtree(folder / "blocks", ignore_errors=True)
    return record.state


def _run(store: Store, job: Job, root: Path, device: torch.device, rows: int | None) -> Record:
    if device.type == "cpu":
        torch.set_num_threads(1)
    # verdicts are fp32; training may use the card's faster convolutions
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = isinstance(job, TrainJob)
    folder = store.folder(job.key)
    report = Progress(folder / "progress.json", device.type)
    report({"share": 0.0})
    if isinstance(job, TrainJob):
        data = load_images(job, None, root, device, report)
        kept = Checkpointer(folder / PLACE, functools.partial(origin_of, job, data))
        trained_model, best, metrics = train(job, data, folder / "train.jsonl", report, kept)
        states = {"last": trained_model.net.state_dict(), **({"best": best} if best is not None else {})}
        return TrainRecord("done", metrics, files={weights_file(w): _save(folder, w, s) for w, s in states.items()})
    if isinstance(job, ImportJob):
        return _import(folder, job, root, device, report)
    if job.parts:
        return _stored(folder, *assemble(store, job))
    trained = store.model_job(job.model_key)
    if job.split == "validation":
        data = with_validation_as_test(load_images(trained, None, root, device, report), job.n)
    else:
        data = load_images(trained, job.n, root, device, report)
    model = load_model(store, trained, data, job.weights)
    if rows is not None:
        passes.limit(model, rows)
    return _stored(folder, *judge(store, job, model, data, report))


def _import(folder: Path, job: ImportJob, root: Path, device: torch.device, report: Progress) -> Record:
    """A model of the user's, loaded strictly; from here on its weights are those of any training."""
    from bench.data import datasets
    from bench.jobs import user_model as loading
    from bench.planning import user_models as imports

    there = datasets.facts(job.data.name, root, job.data.size).test
    data = load_images(job, min(imports.CLEAN_N, there), root, device, report)
    source = folder / imports.SOURCE if job.checkpoint else None
    net, metrics = loading.measure(job, data, source)
    # tied weights share memory, which the format refuses
    state = {name: value.clone() for name, value in net.state_dict().items()}
    return TrainRecord("done", metrics, files={weights_file("last"): _save(folder, "last", state)})


def _stored(
    folder: Path,
    columns: dict[str, torch.Tensor],
    images: torch.Tensor | None,
    metrics: EvaluationMetrics | AuditMetrics,
) -> Record:
    """The record, once columns and images are on disk."""
    files = {}
    if columns:
        import numpy as np

        arrays: dict[str, Any] = {name: values.numpy() for name, values in columns.items()}
        write_atomic(folder / SAMPLES, lambda file: np.savez_compressed(file, **arrays))
        files[SAMPLES] = _hash(folder / SAMPLES)
    if images is not None:
        write_atomic(folder / IMAGES, lambda file: file.write(safetensors_bytes({"x_adv": images.contiguous()})))
        files[IMAGES] = _hash(folder / IMAGES)
    return Record("done", metrics, files=files)


def _save(folder: Path, which: str, state: dict[str, torch.Tensor]) -> str:
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    path = folder / weights_file(which)
    write_atomic(path, lambda file: file.write(safetensors_bytes(tensors)))
    return _hash(path)


def _hash(path: Path) -> str:
    """SHA-256 of a file that was just written. Raises FileNotFoundError where another process removed it."""
    found = file_hash(path)
    if found is None:
        raise FileNotFoundError(f"{path} was removed after it was written")
    return found


def load_model(store: Store, trained: ModelJob, data: Data, which: str = "last") -> Classifier:
    """The deployed model of a finished training with its `last` or `best` weights, checked against its record.

    Raises ValueError where the weights are absent (records may come from git without them) or damaged.
    """
    path = store.folder(trained.key) / weights_file(which)
    record = store.record(trained.key)
    if record is None or record.state != "done":
        raise ValueError(f"training {trained.key} has no finished record")
    if file_hash(path) != record.files.get(path.name, ""):
        raise ValueError(f"weights of {trained.key} are absent or damaged; `bench run` trains them again")
    if isinstance(trained, ImportJob):
        from bench.jobs import user_model as loading

        return loading.reloaded(trained, load_file(path), data)
    defense, net = build(trained, data)
    net.load_state_dict(load_file(path), strict=True)
    return defense.deploy(net.eval())


def load_images(
    job: ModelJob, test: int | None, root: Path, device: torch.device, report: Callable[[dict[str, Any]], None]
) -> Data:
    """The data set of a training on a device, with `test` test images. Raises ValueError where a folder has changed."""
    data = job.data
    loaded = load_data(
        data.name,
        root=root,
        device=device,
        size=data.size,
        train=data.train,
        test=test,
        validation=data.validation,
        seed=job.seed,
        report=lambda note: report({"share": 0.0, "note": note}),
    )
    if data.content not in (None, loaded.facts.content):
        raise ValueError(
            f"the images of {data.name} have content {loaded.facts.content}, this job was planned for "
            f"{data.content}; put those back, or give the command again, which makes new jobs"
        )
    return loaded


def _neighbors(folder: Path) -> int:
    """The most jobs that were on this job's device at a time, as far as the driver tells."""
    try:
        return int((folder / SHARED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 1


class Progress:
    """Writes what the live view shows, at most twice a second, by rename.

    `device`: cpu or cuda, where it runs. `earlier`: seconds of work in the share that this process found done, said
    once or again; kept from then on.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.last, self.began, self.earlier = path, -math.inf, time.monotonic(), 0.0
        self.device = device

    def __call__(self, values: dict[str, Any]) -> None:
        self.earlier = values.get("earlier", self.earlier)
        spent, now = time.monotonic() - self.began, time.time()  # a clock that was put back stops nothing
        if spent - self.last > 0.5:
            self.last = spent
            about = {"earlier": self.earlier, "began": now - spent, "now": now, "pid": os.getpid()}
            text = json.dumps({**values, **about, "device": self.device})
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")  # no fsync: losing it costs nothing
            temporary.replace(self.path)
