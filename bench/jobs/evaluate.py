"""The evaluation loop: fixed blocks of image indices through one evaluation of one deployed model.

Each block that is over is kept on disk, and a long attack keeps its state within a block, so that a kill costs no more
than the work since; the outcome is that of an uninterrupted run.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import plugins
from bench.core.attack import Context, Evaluation, Outcome
from bench.core.classifier import Classifier
from bench.core.rng import seed
from bench.data.images import Data, test_block
from bench.planning.job import EvaluationJob
from bench.records.record import EvaluationMetrics
from bench.training import checkpoint
from bench.training.divergence import Diverged, watch_finite

Report = Callable[[dict[str, Any]], None]
IMAGES = "x_adv"  # name of the images among the tensors kept of a block


class Unsupported(Exception):
    """This model cannot be judged so; the cell says why. No failure, and no result either."""


@dataclass(frozen=True)
class BlockCache:
    """Where the work of one evaluation is kept while it runs. `origin` names code, weights and images: what
    others kept is not used."""

    folder: Path
    origin: str

    def read(self, name: str, device: torch.device) -> tuple[dict[str, Tensor], float]:
        """Tensors kept under this name and the seconds they took; empty where there are none of this origin."""
        found = checkpoint.read(self.folder / f"{name}.safetensors", device)
        if found is None or found[1].get("origin") != self.origin:
            return {}, 0.0
        return found[0], float(found[1]["seconds"])

    def write(self, name: str, tensors: dict[str, Tensor], seconds: float) -> None:
        """Keep tensors and the seconds of work in them."""
        facts = {"origin": self.origin, "seconds": repr(seconds)}
        checkpoint.write(self.folder / f"{name}.safetensors", tensors, facts)

    def drop(self, name: str) -> None:
        """Forget what was kept under this name."""
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)


def evaluate(
    job: EvaluationJob,
    model: Classifier,
    data: Data,
    report: Report,
    kept: BlockCache | None = None,
    others: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], Tensor | None, EvaluationMetrics]:
    """Per-sample columns (on the CPU), adversarial images where there are any, and metrics.

    Each block has a seed of its own (run seed, attack, first index), so that sharding, a kill or another order of
    blocks changes no verdict. A shard evaluates its range of images only. `others`: images
    that other evaluations made from the first n, by name. Raises Unsupported with the reason, Diverged where the model
    gives no numbers.
    """
    judge: Evaluation = plugins.make("attacks", job.attack, job.threat)
    # a threat-free evaluation carries a stand-in threat, whose norm is unused
    reason = judge.unsupported_reason(model)
    if reason:
        raise Unsupported(reason)
    first, last = job.range
    parts: list[dict[str, Tensor]] = []
    images: list[Tensor] = []
    right, seconds, earlier = 0, 0.0, 0.0  # earlier: of these seconds, what another attempt had done
    block = getattr(judge, "block_size", judge.block)
    for start in range(first, last, block):
        stop = min(start + block, last)
        so_far = {"accuracy": right / (start - first)} if start > first and not judge.metric else {}
        base, width = (start - first) / (last - first), (stop - start) / (last - first)
        tell = functools.partial(_tell, report, base, width, {**so_far, "earlier": earlier})
        tell(0, 1, "")
        began = time.perf_counter()
        part, spent = _block(judge, job, model, test_block(data, start, stop), start, tell, kept, others or {})
        seconds += spent
        earlier += max(spent - (time.perf_counter() - began), 0.0)
        if IMAGES in part:
            images.append(part.pop(IMAGES))
        parts.append({"index": torch.arange(start, stop), **part})
        right += 0 if judge.metric else int(part["correct"].sum())
    columns = joined(parts)
    metrics = EvaluationMetrics(
        n=last - first,
        test_hash=data.test_hash,
        attack_seconds=seconds,
        metric=judge.metric or None,  # a record says so itself, as it may outlive the plug-in
        forwards_per_image=mean_of(columns, "forwards"),
        backwards_per_image=mean_of(columns, "backwards"),
    )
    return columns, torch.cat(images) if images else None, metrics


def mean_of(columns: dict[str, Tensor], name: str) -> float | None:
    """Mean of a column, None where the attack has no such column."""
    return float(columns[name].mean()) if name in columns else None


def _block(
    judge: Evaluation,
    job: EvaluationJob,
    model: Classifier,
    batch: tuple[Tensor, Tensor],
    start: int,
    tell: Callable[..., None],
    kept: BlockCache | None,
    others: dict[str, Tensor],
) -> tuple[dict[str, Tensor], float]:
    """Columns, `label` and images of one block (on the CPU), and the seconds it took, over all its attempts."""
    (x, y), name = batch, f"block-{start:06d}"
    finished, seconds = kept.read(name, torch.device("cpu")) if kept else ({}, 0.0)
    if finished:
        return finished, seconds
    saved, before = kept.read(f"{name}-state", x.device) if kept else ({}, 0.0)
    began, tell = time.perf_counter(), functools.partial(tell, before=before)

    def save(tensors: dict[str, Tensor]) -> None:
        if kept:
            kept.write(f"{name}-state", tensors, before + time.perf_counter() - began)

    theirs = tuple((source, found[start : start + len(x)].to(x.device)) for source, found in others.items())
    own, clean = (seed(job.seed, name, start) for name in (job.attack.name, "clean"))
    context = Context(own, tell, saved, save, theirs, clean)
    with watch_finite(model) as finite:
        part = _checked(judge.evaluate(model, x, y, context), y)
        if not finite():
            those = f"images {start} to {start + len(x) - 1}, or to those made of them,"
            raise Diverged(f"some answers of the model to {those} or their slopes are not finite")
    seconds = before + time.perf_counter() - began
    if kept:
        kept.write(name, part, seconds)
        kept.drop(f"{name}-state")
    return part, seconds


def _checked(outcome: Outcome, y: Tensor) -> dict[str, Tensor]:
    """The outcome of a block as plain tensors on the CPU. Raises ValueError for a column of another length."""
    columns = {name: values.detach().cpu() for name, values in outcome.columns.items()}
    wrong = [name for name, values in columns.items() if len(values) != len(y)]
    if wrong:
        raise ValueError(f"column '{wrong[0]}' has {len(columns[wrong[0]])} values for {len(y)} images")
    images = {} if outcome.x_adv is None else {IMAGES: outcome.x_adv.detach().cpu()}
    return {"label": y.cpu(), **columns, **images}


def _tell(
    report: Report,
    base: float,
    width: float,
    so_far: dict[str, float],
    done: int,
    total: int,
    note: str,
    before: float = 0.0,
) -> None:
    """What the live view shows. `before`: seconds that an earlier attempt spent within this block."""
    share = base + width * done / max(total, 1)
    report({"share": share, "note": note, **so_far, "earlier": so_far["earlier"] + before})


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of blocks or shards, in their order. Each part holds at least its `index`."""
    kinds = {name: values for part in parts for name, values in part.items()}
    return {name: torch.cat([_fill(part, name, like) for part in parts]) for name, like in kinds.items()}


def _fill(part: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A part in which no image was attacked lacks the attack's own columns: NaN there, or 0 for whole numbers."""
    missing = float("nan") if like.is_floating_point() else 0
    return part.get(name, torch.full((len(part["index"]), *like.shape[1:]), missing, dtype=like.dtype))
