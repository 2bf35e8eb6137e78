"""Named random streams: each is seeded by a hash of its purpose, and the caller's generators are restored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def seed(*parts: object) -> int:
    """A 63-bit seed from named parts, e.g. ``seed(run_seed, "attack", "pgd", block)``: stable over versions."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def normal_like(t: Tensor) -> Tensor:
    """N(0, 1) in the shape and layout of `t`, drawn in the order of a contiguous tensor: a draw straight into
    channels_last takes nine times as long on the CPU, and would give other numbers for another layout."""
    drawn = torch.randn(t.shape, dtype=t.dtype, device=t.device)
    return drawn if t.is_contiguous() else torch.empty_like(t).copy_(drawn)


@contextmanager
def restored() -> Iterator[None]:
    """Give Python's, NumPy's and torch's generators (of every device) back as they are now."""
    state, np_state = random.getstate(), np.random.get_state()
    with restored_torch():
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(np_state)


@contextmanager
def restored_torch() -> Iterator[None]:
    """As `restored`, for torch's generators alone, which takes microseconds."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def scope(value: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (every device) inside, and restore the caller's generators afterwards."""
    with restored():
        random.seed(value)
        np.random.seed(value % 2**32)
        torch.manual_seed(value)
        yield
