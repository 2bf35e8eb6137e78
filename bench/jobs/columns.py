"""Per-image columns of blocks and shards of an evaluation."""

from __future__ import annotations

import torch
from torch import Tensor


def join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of blocks or shards, concatenated in order. Each part holds at least its `index`.

    A part in which no image was attacked lacks the columns of the attack; they are filled with NaN, or with 0 for
    integers.
    """
    like = {name: values for part in parts for name, values in part.items()}
    return {name: torch.cat([_column(part, name, values) for part in parts]) for name, values in like.items()}


def _column(part: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    missing = float("nan") if like.is_floating_point() else 0
    return part.get(name, torch.full((len(part["index"]), *like.shape[1:]), missing, dtype=like.dtype))


def mean_of(columns: dict[str, Tensor], name: str) -> float | None:
    """Mean of a column; None if the attack has no such column."""
    return float(columns[name].mean()) if name in columns else None
