"""The evaluation loop: fixed blocks of images through one attack on one deployed model.

Each finished block is stored, and a long attack stores its state within a block, so that a kill costs only the work
since then; the outcome is that of an uninterrupted run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import plugins
from bench.core.attack import Context, Evaluation, Outcome, Unsupported
from bench.core.classifier import Classifier
from bench.core.rng import seed
from bench.data.images import Data, test_block
from bench.jobs.block_cache import BlockCache
from bench.jobs.columns import join, mean_of
from bench.planning.job import EvaluationJob
from bench.records.record import EvaluationMetrics
from bench.terminal import counted
from bench.training.divergence import Diverged, watch_finite

Report = Callable[[dict[str, Any]], None]
X_ADV = "x_adv"  # name of the images among the tensors stored for a block


def evaluate(
    job: EvaluationJob,
    model: Classifier,
    data: Data,
    report: Report,
    cache: BlockCache | None = None,
    others: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor | None, EvaluationMetrics]:
    """Evaluate a model on the images of a job, block by block.

    Each block has its own seed (from run seed, attack and first index), so that shards, a kill or another order of the
    blocks change no outcome.

    Args:
        job: An evaluation of the first images, or a shard of one.
        cache: Stores finished blocks; None to store nothing.
        others: Adversarial images of other evaluations of the first images, by key.

    Returns:
        Per-image columns on the CPU, adversarial images `n c h w` (None if the attack makes none), and metrics.

    Raises:
        Unsupported: The attack does not apply to the model.
        Diverged: Logits or gradients of the model are NaN or Inf.
    """
    attack: Evaluation = plugins.make("attacks", job.attack, job.threat)
    reason = attack.unsupported_reason(model)
    if reason:
        raise Unsupported(reason)
    first, last = job.range
    parts: list[dict[str, Tensor]] = []
    images: list[Tensor] = []
    correct, seconds, earlier = 0, 0.0, 0.0  # `earlier`: the part of `seconds` that a previous attempt spent
    size = getattr(attack, "block_size", attack.block)
    for start in range(first, last, size):
        stop = min(start + size, last)
        known = {"accuracy": correct / (start - first)} if start > first and not attack.metric else {}
        place = _Place(report, (start - first) / (last - first), (stop - start) / (last - first), known, earlier)
        place(0, 1, "")
        began = time.perf_counter()
        part, spent = _block(attack, job, model, test_block(data, start, stop), start, place, cache, others or {})
        seconds += spent
        earlier += max(spent - (time.perf_counter() - began), 0.0)
        if X_ADV in part:
            images.append(part.pop(X_ADV))
        parts.append({"index": torch.arange(start, stop), **part})
        correct += 0 if attack.metric else int(part["correct"].sum())
    columns = join(parts)
    metrics = EvaluationMetrics(
        n=last - first,
        test_hash=data.test_hash,
        attack_seconds=seconds,
        metric=attack.metric or None,  # stored, as records may outlive the plug-in
        forwards_per_image=mean_of(columns, "forwards"),
        backwards_per_image=mean_of(columns, "backwards"),
    )
    return columns, torch.cat(images) if images else None, metrics


@dataclass
class _Place:
    """Reports progress within one block as progress of the whole evaluation.

    `done`, `width`: share of the images before the block, and in it. `earlier`: seconds that a previous attempt spent.
    """

    report: Report
    done: float
    width: float
    known: dict[str, float]
    earlier: float

    def __call__(self, done: int, total: int, note: str) -> None:
        share = self.done + self.width * done / max(total, 1)
        self.report({"share": share, "note": note, **self.known, "earlier": self.earlier})


def _block(
    attack: Evaluation,
    job: EvaluationJob,
    model: Classifier,
    batch: tuple[Tensor, Tensor],
    start: int,
    place: _Place,
    cache: BlockCache | None,
    others: dict[str, Tensor],
) -> tuple[dict[str, Tensor], float]:
    """Columns, `label` and images of one block (on the CPU), and the seconds of all its attempts."""
    (x, y), name = batch, f"block-{start:06d}"
    finished, seconds = cache.read(name, torch.device("cpu")) if cache else ({}, 0.0)
    if finished:
        return finished, seconds
    saved, before = cache.read(f"{name}-state", x.device) if cache else ({}, 0.0)
    place.earlier += before
    began = time.perf_counter()

    def save(tensors: dict[str, Tensor]) -> None:
        if cache:
            cache.write(f"{name}-state", tensors, before + time.perf_counter() - began)

    sources = tuple((key, x_adv[start : start + len(x)].to(x.device)) for key, x_adv in others.items())
    own, clean = (seed(job.seed, name, start) for name in (job.attack.name, "clean"))
    context = Context(own, place, saved, save, sources, clean, start)
    with watch_finite(model) as finite:
        part = _on_cpu(attack.evaluate(model, x, y, context), y)
        if not finite():
            images = f"images {start} to {start + len(x) - 1}, or to those made of them,"
            raise Diverged(f"some answers of the model to {images} or their slopes are not finite")
    seconds = before + time.perf_counter() - began
    if cache:
        cache.write(name, part, seconds)
        cache.drop(f"{name}-state")
    return part, seconds


def _on_cpu(outcome: Outcome, y: Tensor) -> dict[str, Tensor]:
    """The tensors of a block, on the CPU. Raises ValueError for a column of another length than the labels."""
    columns = {name: values.detach().cpu() for name, values in outcome.columns.items()}
    for name, values in columns.items():
        if len(values) != len(y):
            raise ValueError(f"column '{name}' has {counted(len(values), 'value')} for {counted(len(y), 'image')}")
    images = {} if outcome.x_adv is None else {X_ADV: outcome.x_adv.detach().cpu()}
    return {"label": y.cpu(), **columns, **images}
