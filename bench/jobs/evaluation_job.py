"""Jobs about a trained model: evaluate it, combine the shards of an evaluation, audit it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from bench.atomic import write_hashed
from bench.core.classifier import Classifier
from bench.data.images import Data, test_block
from bench.jobs import microbatch, recheck
from bench.jobs.block_cache import BlockCache
from bench.jobs.columns import join, mean_of
from bench.jobs.evaluate import Report, evaluate
from bench.jobs.model_files import evaluation_images, load_model, stored_images
from bench.jobs.progress_file import ProgressFile
from bench.planning.job import AuditJob, EvaluationJob, ImportJob, TrainJob
from bench.plugins import threat_of
from bench.records.evaluated_weights import REPEATED, weights_of
from bench.records.record import (
    AuditMetrics,
    AuditRecord,
    EvaluationMetrics,
    EvaluationRecord,
    Record,
    evaluation_metrics,
    train_metrics,
)
from bench.records.store import IMAGES, SAMPLES, Store
from bench.terminal import counted
from bench.training import resume

# all code that determines an outcome, by file or folder: that of the weights, of attacks and of their scoring
CODE = (*resume.CODE, "../attacks", "jobs")
Measured = tuple[dict[str, Tensor], Tensor | None, EvaluationMetrics]  # columns, adversarial images, metrics


def run_evaluation(
    store: Store,
    job: EvaluationJob | AuditJob,
    root: Path,
    device: torch.device,
    report: ProgressFile,
    rows: int | None,
) -> Record:
    """The record of an evaluation or an audit, with its files written. `rows`: the most images in one pass."""
    if job.parts and not isinstance(job, AuditJob):
        return _stored(store.folder(job.key), *assemble(store, job))
    trained = store.model_job(job.model_key)
    data = evaluation_images(job, trained, root, device, report)
    model = load_model(store, trained, data, job.weights)
    report.count(model)
    if rows is not None:
        microbatch.limit(model, rows)
    if isinstance(job, AuditJob):
        columns, found = _audit(store, job, model, data, report)
        return AuditRecord("done", found, files=_save_columns(store.folder(job.key), columns))
    return _stored(store.folder(job.key), *_evaluate(store, job, model, data, report))


def _evaluate(store: Store, job: EvaluationJob, model: Classifier, data: Data, report: Report) -> Measured:
    sources = [key for key in job.needs[1:] if has_images(store, key)]
    if len(job.needs) > 1 and not sources:
        raise ValueError(f"none of the {counted(len(job.needs) - 1, 'evaluation')} this one takes images from has any")
    others = {key: stored_images(store, key) for key in sources}
    cache = BlockCache(store.folder(job.key) / "blocks", origin_of(store, job, data, sources))
    columns, images, metrics = evaluate(job, model, data, report, cache, others)
    if sources:
        without = tuple(key for key in job.needs[1:] if key not in others)
        metrics = replace(metrics, sources=tuple(sources), sources_without_images=without or None)
    return columns, images, metrics


def origin_of(store: Store, job: EvaluationJob, data: Data, sources: list[str]) -> str:
    """SHA-256 over all that a block of an evaluation depends on besides its job: code, the kind of device, the weights,
    the test images, and the images of the evaluations `sources`."""
    trained = store.job(job.model_key)
    own = resume.plugin_hashes("attacks", job.attack)
    if isinstance(trained, TrainJob):  # the name of an imported model is not the name of a defense
        own += resume.plugin_hashes("defenses", trained.defense)
    theirs = [record.files.get(IMAGES) if (record := store.record(key)) else None for key in sources]
    return resume.digest_of(CODE, [own, data.test.x.device.type, weights_of(store, job), data.test_hash, theirs])


def assemble(store: Store, job: EvaluationJob) -> Measured:
    """The result of an evaluation from those of its shards.

    Raises ValueError unless all shards are done, with the same weights and test images, and hold each image once.
    """
    columns: list[dict[str, Tensor]] = []
    images: list[Tensor] = []
    metrics: list[EvaluationMetrics] = []
    weights: set[str | None] = set()
    for key in job.parts:
        record = store.record(key)
        if record is None or record.state != "done":
            raise ValueError(f"shard {key} ended as {record.state if record else 'nothing'}")
        metrics.append(evaluation_metrics(record))
        weights.add(record.weights_sha256)
        columns.append({name: torch.from_numpy(values) for name, values in store.samples(key).items()})
        if has_images(store, key):
            images.append(stored_images(store, key))
    whole = join(columns)
    if whole["index"].tolist() != list(range(job.n)):
        raise ValueError(
            f"the {len(columns)} shards hold {counted(len(whole['index']), 'image')}, not the first {job.n} in order"
        )
    hashes = {part.test_hash for part in metrics}
    if len(hashes) > 1:
        raise ValueError(f"the shards used different test images: {', '.join(sorted(map(str, hashes)))}")
    if len(weights - {None}) > 1:
        raise ValueError(f"the shards used different weights; {REPEATED}")
    combined = EvaluationMetrics(
        n=job.n,
        test_hash=hashes.pop(),
        attack_seconds=sum(part.attack_seconds or 0.0 for part in metrics),
        metric=metrics[0].metric,
        shards=job.parts,
        forwards_per_image=mean_of(whole, "forwards"),
        backwards_per_image=mean_of(whole, "backwards"),
    )
    return whole, torch.cat(images) if len(images) == len(columns) else None, combined


def has_images(store: Store, key: str) -> bool:
    """Has a finished evaluation stored adversarial images that are undamaged?"""
    record = store.record(key)
    return record is not None and record.state == "done" and store.matches(key, IMAGES, record)


def _audit(
    store: Store, job: AuditJob, model: Classifier, data: Data, report: Report
) -> tuple[dict[str, Tensor], AuditMetrics]:
    def progress(done: int, total: int, note: str) -> None:
        report({"share": done / max(total, 1), "note": note})

    x, y = test_block(data, 0, job.n)
    metrics = AuditMetrics(n=job.n, test_hash=data.test_hash)
    if job.part == "images":
        return {}, replace(metrics, findings=tuple(recheck.check_images(store, job, model, data, progress)))
    from bench.soundness import audit_model
    from bench.soundness.memorization import unseen

    imported = isinstance(store.model_job(job.model_key), ImportJob)
    findings, columns = audit_model.audit(
        model,
        x,
        y,
        [threat_of(threat) for threat in job.threats],
        job.level,
        seed=job.seed,
        claimed=train_metrics(store.record(job.model_key)).clean_accuracy,
        report=progress,
        unseen=unseen(*data.train, job.level, job.key) if imported else None,
    )
    on_cpu = {name: values.detach().cpu() for name, values in columns.items()}
    return {"index": torch.arange(len(y)), "label": y.cpu(), **on_cpu}, replace(metrics, findings=tuple(findings))


def _stored(
    folder: Path, columns: dict[str, Tensor], images: Tensor | None, metrics: EvaluationMetrics
) -> EvaluationRecord:
    """The record of an evaluation whose columns and images are written."""
    files = _save_columns(folder, columns)
    if images is not None:
        files[IMAGES] = write_hashed(folder / IMAGES, safetensors_bytes({"x_adv": images.contiguous()}))
    return EvaluationRecord("done", metrics, files=files)


def _save_columns(folder: Path, columns: dict[str, Tensor]) -> dict[str, str]:
    """Write samples.npz unless there are no columns. Returns name and SHA-256 of the file."""
    if not columns:
        return {}
    packed = io.BytesIO()
    np.savez_compressed(packed, **{name: values.numpy() for name, values in columns.items()})  # type: ignore[arg-type]
    return {SAMPLES: write_hashed(folder / SAMPLES, packed.getvalue())}
