"""What a worker does with a trained model: evaluate it, put shards together, audit it, re-check its images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.atomic import file_hash
from bench.data.images import test_block
from bench.jobs import recheck
from bench.jobs.evaluate import BlockCache, evaluate, joined, mean_of
from bench.planning.job import AuditJob, EvaluationJob, TrainJob
from bench.plugins import threat_of
from bench.records.evaluated_weights import AGAIN, named, weights_of
from bench.records.record import AuditMetrics, EvaluationMetrics, evaluation_metrics, train_metrics
from bench.records.store import IMAGES, Store
from bench.training import resume

if TYPE_CHECKING:
    from bench.core.classifier import Classifier
    from bench.data.images import Data
    from bench.jobs.evaluate import Report

# all code, by file or folder, that has a say in a verdict: the weights' own, and what attacks and judges them
CODE = (*resume.CODE, "../attacks", "jobs")
# columns, adversarial images, metrics
Judged = tuple[dict[str, Tensor], Tensor | None, EvaluationMetrics | AuditMetrics]


def judge(store: Store, job: EvaluationJob | AuditJob, model: Classifier, data: Data, report: Report) -> Judged:
    """Per-sample columns (on the CPU), adversarial images where there are any, and metrics of one job."""
    if isinstance(job, AuditJob):
        return _audit(store, job, model, data, report)
    sources = [key for key in job.needs[1:] if images_of(store, key) is not None]
    if len(job.needs) > 1 and not sources:
        raise ValueError(f"none of the {len(job.needs) - 1} evaluations this one takes images from has any")
    others = {key: load_file(store.folder(key) / IMAGES)["x_adv"] for key in sources}
    kept = BlockCache(store.folder(job.key) / "blocks", origin_of(store, job, data, sources))
    columns, images, metrics = evaluate(job, model, data, report, kept, others)
    lost = [key for key in job.needs[1:] if key not in others]
    if sources:
        metrics = replace(metrics, sources=tuple(sources), sources_without_images=tuple(lost) or None)
    return columns, images, metrics


def origin_of(store: Store, job: EvaluationJob, data: Data, sources: list[str]) -> str:
    """SHA-256 over all that a block of an evaluation depends on beside its job: code, the kind of device, the weights,
    the test images, and the images that it takes from `sources`."""
    trained = store.job(job.model_key)
    own = resume.plugin_hashes("attacks", job.attack)
    if isinstance(trained, TrainJob):  # an imported model has a name of the user's where a training has its defense
        own += resume.plugin_hashes("defenses", trained.defense)
    theirs = [record.files.get(IMAGES) if (record := store.record(key)) else None for key in sources]
    return resume.digest_of(CODE, [own, data.test.x.device.type, weights_of(store, job), data.test_hash, theirs])


def assemble(store: Store, job: EvaluationJob | AuditJob) -> Judged:
    """The evaluation whose shards are done. Raises ValueError where they are not all of its images, each once."""
    columns: list[dict[str, Tensor]] = []
    images: list[Tensor] = []
    records = []
    for key in job.parts:
        record = store.record(key)
        if record is None or record.state != "done":
            raise ValueError(f"shard {key} ended as {record.state if record else 'nothing'}")
        records.append(record)
        columns.append({name: torch.from_numpy(values) for name, values in store.samples(key).items()})
        if images_of(store, key) is not None:
            images.append(load_file(store.folder(key) / IMAGES)["x_adv"])
    whole = joined(columns)
    n = job.n
    if whole["index"].tolist() != list(range(n)):
        raise ValueError(f"the {len(columns)} shards hold {len(whole['index'])} images, not the first {n} in order")
    hashes = {record.metrics.test_hash for record in records}
    if len(hashes) > 1:
        raise ValueError(f"the shards saw different test images: {', '.join(sorted(map(str, hashes)))}")
    weights = {sha for record in records if (sha := named(record))}
    if len(weights) > 1:
        raise ValueError(f"the shards judged different weights; {AGAIN}")
    parts = [evaluation_metrics(record) for record in records]
    metrics = EvaluationMetrics(
        n=n,
        test_hash=hashes.pop(),
        attack_seconds=sum(part.attack_seconds or 0.0 for part in parts),
        metric=parts[0].metric,
        shards=job.parts,
        forwards_per_image=mean_of(whole, "forwards"),
        backwards_per_image=mean_of(whole, "backwards"),
    )
    return whole, torch.cat(images) if len(images) == len(columns) else None, metrics


def images_of(store: Store, key: str) -> Path | None:
    """The adversarial images of a finished evaluation, where they lie here undamaged."""
    record = store.record(key)
    path = store.folder(key) / IMAGES
    expected = record.files.get(IMAGES) if record is not None and record.state == "done" else None
    return path if expected is not None and expected == file_hash(path) else None


def _audit(store: Store, job: AuditJob, model: Classifier, data: Data, report: Report) -> Judged:
    def tell(done: int, total: int, note: str) -> None:
        report({"share": done / max(total, 1), "note": note})

    x, y = test_block(data, 0, job.n)
    metrics = AuditMetrics(n=job.n, test_hash=data.test_hash)
    if job.part == "images":
        return {}, None, replace(metrics, findings=tuple(recheck.images(store, job, model, data, tell)))
    from bench.soundness import audit_model as soundness

    threats = [threat_of(threat) for threat in job.threats]
    findings, columns = soundness.audit(
        model,
        x,
        y,
        threats,
        job.level,
        seed=job.seed,
        claimed=train_metrics(store.record(job.model_key)).clean_accuracy,
        report=tell,
    )
    plain = {name: values.detach().cpu() for name, values in columns.items()}
    about = {"index": torch.arange(len(y)), "label": y.cpu()}
    return {**about, **plain}, None, replace(metrics, findings=tuple(findings))
