"""Smaller passes for an evaluation that ran out of memory: fewer images at a time through the net, the same verdicts.

Blocks, seeds and the attack see no difference: a pass over a block is cut into parts, and with gradients each part is
computed again on the way back instead of being kept. Where the model draws at test time, a smaller pass would draw
other noise; it is refused.
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
    """The passes of this model cannot be made smaller without another outcome."""


def rows(job: Job, halvings: int) -> int | None:
    """Images in one pass after so many halvings of the block; None where passes are not cut."""
    if not halvings or not isinstance(job, EvaluationJob):
        return None
    own = job.attack.settings.get("block_size")
    block = own or catalog.get("attacks", job.attack.name).constant("block", 500)
    first, last = job.range
    return max(min(int(block), last - first) >> halvings, 1)


def limit(model: Classifier, most: int) -> None:
    """Let no pass hold more than `most` images. Raises FixedBatch for a model that draws."""
    if model.stochastic:
        raise FixedBatch("out of memory; the model draws at test time, so smaller passes would change its draws")
    inner = model.surrogate

    def surrogate(self: Classifier) -> nn.Module:
        return _cut(inner(), most)

    vars(model)["surrogate"] = types.MethodType(surrogate, model)
    _cut(model, most)


def _cut(module: nn.Module, most: int) -> nn.Module:
    if "forward" not in vars(module):
        # bound to the module, so that a copy of it runs its own weights
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
