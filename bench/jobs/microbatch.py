"""Smaller passes for an evaluation that ran out of memory: fewer images at a time, the same outcomes.

Blocks, seeds and attack do not change: a pass over a block is split into parts, whose activations are recomputed in the
backward pass. A stochastic model would draw other noise in smaller passes, so it is rejected.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.core.classifier import Classifier
from bench.planning import catalog
from bench.planning.job import EvaluationJob, Job


class FixedBatch(MemoryError):
    """Smaller passes of this model would change the outcome."""


def rows(job: Job, halvings: int) -> int | None:
    """Images in one pass after so many halvings of the block; None if passes are not split."""
    if not halvings or not isinstance(job, EvaluationJob):
        return None
    own = job.attack.settings.get("block_size")
    block = own or catalog.get("attacks", job.attack.name).constant("block", 500)
    first, last = job.range
    return max(min(int(block), last - first) >> halvings, 1)


def limit(model: Classifier, most: int) -> None:
    """Limit every pass to `most` images. Raises FixedBatch for a stochastic model."""
    if model.stochastic:
        raise FixedBatch("out of memory; the model is stochastic, and smaller passes would change its noise draws")
    inner = model.surrogate

    def surrogate(self: Classifier) -> nn.Module:
        return _cut(inner(), most)

    vars(model)["surrogate"] = types.MethodType(surrogate, model)
    _cut(model, most)


def _cut(module: nn.Module, most: int) -> nn.Module:
    if "forward" not in vars(module):
        # bound to the module, so that a copy uses its own weights
        vars(module)["forward"] = types.MethodType(functools.partial(_forward, most), module)
    return module


def _forward(most: int, module: Any, x: Tensor) -> Tensor:
    whole = functools.partial(type(module).forward, module)
    if len(x) <= most:
        given: Tensor = whole(x)
        return given
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(whole, part, use_reentrant=False) for part in x.split(most)])
    return torch.cat([whole(part) for part in x.split(most)])
