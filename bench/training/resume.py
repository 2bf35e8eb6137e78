"""Checkpoints of a training: a kill costs about a minute of work, and the result is the same bit for bit.

The state of every part (network, optimizer, averages, checks, random generators, sums of the current epoch) goes into
one file (see `checkpoint`): tensors as they are, the rest as JSON.
"""

import functools
import hashlib
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.data.images import Data, content_hash
from bench.planning import catalog
from bench.planning.job import TrainJob
from bench.planning.job_fields import PluginChoice
from bench.training import checkpoint

PLACE = "blocks/training.safetensors"  # in the job's folder
# code, by file or folder, on which the numbers of a training depend
CODE = ("core", "noise", "models", "training", "data", "../defenses", "plugins.py", "planning/spec.py")
_TENSOR = "tensor"


class Clock:
    """Seconds of work, over all attempts, without the time to write checkpoints."""

    def __init__(self) -> None:
        self.set(0.0)

    def now(self) -> float:
        """Seconds of work so far."""
        return time.perf_counter() - self._zero

    def set(self, seconds: float) -> None:
        """Set the seconds of work so far."""
        self._zero = time.perf_counter() - seconds


class Checkpointer:
    """Writes and reads the checkpoint of one training, and decides how often.

    A checkpoint is due at the end of an epoch if the last one is `at_end` seconds old, between two steps if it is
    `every` seconds old, but never so often that checkpoints take more than the fraction `share` of the time. `origin`
    returns a digest of code, job and data, and is called at the first read or write; a checkpoint of another origin is
    ignored.
    """

    def __init__(
        self, path: Path, origin: Callable[[], str], *, every: float = 60.0, at_end: float = 5.0, share: float = 0.01
    ) -> None:
        self.path, self.every, self.at_end, self.share = path, every, at_end, share
        self.origin = functools.cache(origin)
        self._last, self._pause = time.perf_counter(), 0.0

    def due(self, epoch_over: bool) -> bool:
        """True if a checkpoint is due."""
        wanted = self.at_end if epoch_over else self.every
        return time.perf_counter() - self._last >= max(wanted, self._pause)

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """The state of the checkpoint; None if there is none, it is damaged, or its origin is another."""
        found = checkpoint.read(self.path) if self.path.exists() else None
        if found is None or found[1].get("origin") != self.origin():
            return None
        state: dict[str, Any] = unpack(*found, device)
        return state

    def write(self, state: dict[str, Any]) -> float:
        """Write a checkpoint; returns the seconds it took. If it cannot be written, the training continues with a
        message."""
        began = time.perf_counter()
        tensors, facts = pack(state)
        try:
            checkpoint.write(self.path, tensors, {**facts, "origin": self.origin()})
        except OSError as error:
            print(f"cannot write the checkpoint {self.path.name}: {error.strerror}; training continues", flush=True)
        self._last = time.perf_counter()
        self._pause = (self._last - began) / self.share
        return self._last - began


def origin_of(job: TrainJob, data: Data) -> str:
    """SHA-256 of the code of a training, the kind of device, the job and the training images."""
    own = [*plugin_hashes("defenses", job.defense), catalog.get("models", job.model.name).sha256]
    return digest_of(CODE, [own, data.train.x.device.type, job.content(), content_hash(data.train)])


def digest_of(code: tuple[str, ...], about: list[Any]) -> str:
    """SHA-256 of code (files and folders relative to bench/), torch's version, and `about`, which lists all else that
    the result depends on. The commit is not part of it, because other changes do not matter."""
    here = Path(__file__).parents[1]
    files = [path for name in code for path in ([here / name] if name.endswith(".py") else (here / name).glob("*.py"))]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    digest.update(json.dumps([torch.__version__, *about], sort_keys=True).encode())
    return digest.hexdigest()


def plugin_hashes(kind: catalog.Kind, chosen: PluginChoice) -> list[str]:
    """SHA-256 of a plug-in's file and of its base's file; either may lie outside the tree."""
    base = chosen.settings.get("base")
    inner = plugin_hashes(kind, PluginChoice.from_json(base)) if isinstance(base, dict) else []
    return [catalog.get(kind, chosen.name).sha256, *inner]


def pack(state: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Nested dicts (with string keys) and lists as their tensors, copied to the CPU, and one JSON text."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().to("cpu", copy=True)
            # the memory format (channels_last) determines the order of summation
            strides = torch.empty_like(value, device="meta").stride()
            return {_TENSOR: name, "strides": strides, "on_cpu": value.device.type == "cpu"}
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return tensors, {"state": json.dumps(plain(state))}


def unpack(tensors: dict[str, Tensor], facts: dict[str, str], device: torch.device) -> Any:
    """The inverse of `pack`; tensors that were not on the CPU are put on `device`."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict) and _TENSOR in value:
            stored = tensors[value[_TENSOR]]
            place = "cpu" if value["on_cpu"] else device
            return torch.empty_strided(stored.shape, value["strides"], dtype=stored.dtype, device=place).copy_(stored)
        if isinstance(value, dict):
            return {name: whole(item) for name, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    return whole(json.loads(facts["state"]))


def random_streams(device: torch.device) -> dict[str, Any]:
    """State of the generators of Python, NumPy and torch, of the GPUs only that of `device`, on which the training
    runs: other GPUs may be visible when it resumes."""
    kind, keys, *rest = np.random.get_state()
    gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    numpy_state = [kind, np.asarray(keys).tolist(), *rest]
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "gpu": gpu}


def restore_streams(state: dict[str, Any], device: torch.device) -> None:
    """Restore the generators from `random_streams`, that of the GPU on `device`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["gpu"] is not None:
        torch.cuda.set_rng_state(state["gpu"], device)
