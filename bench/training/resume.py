"""What a training keeps of itself while it runs, so that a kill costs about a minute and changes no bit of the outcome.

The state of every part (net, optimiser, averages, guards, random streams, sums of the epoch that is under way) goes
into one file (`checkpoint`): its tensors as they are, the rest as JSON.
"""

from __future__ import annotations

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

from bench.data.images import Data
from bench.planning import catalog
from bench.planning.job import TrainJob
from bench.planning.job_fields import PluginChoice
from bench.training import checkpoint
from bench.training.best_epoch import content_hash

PLACE = "blocks/training.safetensors"  # in the job's folder
# all code, by file or folder, that has a say in the numbers of a training
CODE = ("core", "noise", "models", "training", "data", "../defenses", "plugins.py", "planning/spec.py")
_TENSOR = "tensor"


class Clock:
    """Seconds of work: those of earlier attempts count, those spent on keeping it do not."""

    def __init__(self) -> None:
        self.set(0.0)

    def now(self) -> float:
        """Seconds of work so far."""
        return time.perf_counter() - self._zero

    def set(self, seconds: float) -> None:
        """Say how much work was done up to now."""
        self._zero = time.perf_counter() - seconds


class Checkpointer:
    """Where one training is kept while it runs, and how often.

    At the end of an epoch after `at_end` seconds since the last time, between two steps after `every` seconds, but
    never so often that keeping takes more than `share` of the time. `origin` names code, job and data: what another
    one kept is not used. It is asked for only once there is something to keep or to read.
    """

    def __init__(
        self, path: Path, origin: Callable[[], str], *, every: float = 60.0, at_end: float = 5.0, share: float = 0.01
    ) -> None:
        self.path, self.every, self.at_end, self.share = path, every, at_end, share
        self._make, self._origin = origin, ""
        self._last, self._pause = time.perf_counter(), 0.0

    def due(self, epoch_over: bool) -> bool:
        """Is it time to keep the work?"""
        wanted = self.at_end if epoch_over else self.every
        return time.perf_counter() - self._last >= max(wanted, self._pause)

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """The state that was kept; None where there is none, it is damaged, or other code, job or data made it."""
        found = checkpoint.read(self.path) if self.path.exists() else None
        if found is None or found[1].get("origin") != self.origin():
            return None
        state: dict[str, Any] = unpack(*found, device)
        return state

    def write(self, state: dict[str, Any]) -> float:
        """Keep a state; the seconds that took. Where it cannot be written the training goes on, and says so."""
        began = time.perf_counter()
        tensors, facts = pack(state)
        try:
            checkpoint.write(self.path, tensors, {**facts, "origin": self.origin()})
        except OSError as error:
            print(f"cannot keep the training in {self.path.name}: {error.strerror}; it goes on", flush=True)
        self._last = time.perf_counter()
        self._pause = (self._last - began) / self.share
        return self._last - began

    def origin(self) -> str:
        """Of what is kept now."""
        self._origin = self._origin or self._make()
        return self._origin


def origin_of(job: TrainJob, data: Data) -> str:
    """SHA-256 over the code of a training, the kind of device, the job and the training images."""
    own = [*plugin_hashes("defenses", job.defense), catalog.get("models", job.model.name).sha256]
    return digest_of(CODE, [own, data.train.x.device.type, job.content(), content_hash(data.train)])


def digest_of(code: tuple[str, ...], about: list[Any]) -> str:
    """SHA-256 over code (files and folders, seen from bench/), torch's version, and whatever else the work depends on.
    Not over commits: other changes do not count."""
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
    """Nested dicts (of text keys) and lists as the tensors in them, copied to the CPU, and one JSON text."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().to("cpu", copy=True)
            # the order in memory (channels_last) decides in which order sums are taken
            strides = torch.empty_like(value, device="meta").stride()
            return {_TENSOR: name, "strides": strides, "on_cpu": value.device.type == "cpu"}
        if isinstance(value, dict):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return tensors, {"state": json.dumps(plain(state))}


def unpack(tensors: dict[str, Tensor], facts: dict[str, str], device: torch.device) -> Any:
    """What `pack` was given; tensors that were not on the CPU come to `device`."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict) and _TENSOR in value:
            kept = tensors[value[_TENSOR]]
            there = "cpu" if value["on_cpu"] else device
            return torch.empty_strided(kept.shape, value["strides"], dtype=kept.dtype, device=there).copy_(kept)
        if isinstance(value, dict):
            return {name: whole(item) for name, item in value.items()}
        return [whole(item) for item in value] if isinstance(value, list) else value

    return whole(json.loads(facts["state"]))


def random_streams(device: torch.device) -> dict[str, Any]:
    """Where the generators of Python, NumPy and torch stand: of the GPUs only `device`, on which the training runs,
    since fewer or others may be visible when it goes on."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    gpus = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return {
        "python": [version, torch.tensor(numbers), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "gpus": gpus,
    }


def restore_streams(state: dict[str, Any], device: torch.device) -> None:
    """Put the generators where `random_streams` found them, that of the GPU on `device`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["gpus"]:
        torch.cuda.set_rng_state(state["gpus"][0], device)
