"""The evaluation loop: fixed blocks of image indices through one evaluation of one deployed model."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import plugins
from bench.core.attack import Context, Evaluation
from bench.core.classifier import Classifier
from bench.core.rng import seed
from bench.data import Data, test_block

Report = Callable[[dict[str, Any]], None]


class Unsupported(Exception):
    """This model cannot be judged so; the cell says why. No failure, and no result either."""


def evaluate(
    what: dict[str, Any], model: Classifier, data: Data, report: Report
) -> tuple[dict[str, Tensor], Tensor | None, dict[str, Any]]:
    """Per-sample columns (on the CPU), adversarial images where there are any, and metrics.

    Each block has a seed of its own (run seed, attack, first index), so that sharding, a kill or another order of
    blocks changes no verdict. Raises Unsupported with the reason.
    """
    judge: Evaluation = plugins.make("attacks", what["attack"]["name"], what["attack"]["set"], what["threat"])
    # a threat-free evaluation carries a stand-in threat, whose norm is nobody's business
    reason = judge.supports(model)
    if reason:
        raise Unsupported(reason)
    n, block = what["n"], judge.block
    parts: list[dict[str, Tensor]] = []
    images: list[Tensor] = []
    right, began = 0, time.perf_counter()
    for start in range(0, n, block):
        stop = min(start + block, n)
        x, y = test_block(data, start, stop)

        so_far = {"accuracy": right / start} if start else {}
        tell = functools.partial(_tell, report, start / n, (stop - start) / n, so_far)
        tell(0, 1, "")
        outcome = judge.evaluate(model, x, y, Context(seed(what["seed"], what["attack"]["name"], start), tell))
        columns = {name: values.detach().cpu() for name, values in outcome.columns.items()}
        wrong = [name for name, values in columns.items() if len(values) != len(x)]
        if wrong:
            raise ValueError(f"column '{wrong[0]}' has {len(columns[wrong[0]])} values for {len(x)} images")
        parts.append({"index": torch.arange(start, stop), "label": y.cpu(), **columns})
        if outcome.x_adv is not None:
            images.append(outcome.x_adv.detach().cpu())
        right += int(columns["correct"].sum())
    seconds = time.perf_counter() - began
    kinds = {name: values for part in parts for name, values in part.items()}
    columns = {name: torch.cat([_fill(part, name, like) for part in parts]) for name, like in kinds.items()}
    metrics: dict[str, Any] = {"attack_seconds": seconds, "n": n, "test_hash": data.test_hash}
    for name in ("forwards", "backwards"):
        if name in columns:
            metrics[f"{name}_per_image"] = float(columns[name].mean())
    return columns, torch.cat(images) if images else None, metrics


def _tell(
    report: Report, base: float, width: float, so_far: dict[str, float], done: int, total: int, note: str
) -> None:
    report({"share": base + width * done / max(total, 1), "note": note, **so_far})


def _fill(part: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A block in which no image was attacked lacks the attack's own columns: NaN there, or 0 for whole numbers."""
    missing = float("nan") if like.is_floating_point() else 0
    return part.get(name, torch.full((len(part["index"]), *like.shape[1:]), missing, dtype=like.dtype))
