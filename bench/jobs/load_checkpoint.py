"""Loads a checkpoint of the user's strictly: what does not fit is an error, and no code in the file is executed."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from bench.data.datasets import Facts
from bench.models.common import MAY_LACK
from bench.terminal import counted

State = dict[str, Tensor]
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "last")  # where training code keeps the weights in a .pt
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")  # what DataParallel, wrappers and torch.compile put before names
OWN = ("normalise.mean", "normalise.std")  # buffers of our architectures that a foreign checkpoint lacks
MOST_KEYS = 5


def read(path: Path) -> tuple[State, str]:
    """The tensors of a checkpoint, on the CPU, and which of several sets of weights in it they are ("" where there is
    one). The content decides whether it is read as safetensors or as a weights-only pickle.

    Nothing in the file is executed. Raises ValueError in one line.
    """
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        try:
            return load_safetensors(path.read_bytes()), ""
        except SafetensorError as error:
            raise ValueError(f"{path.name} is a damaged safetensors file: {error}") from None
    _refuse_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise anything: EOFError, UnpicklingError, RuntimeError, KeyError ...
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise _not_weights_only(path, f"holds {found[1]}" if found else type(error).__name__) from None
    return _tensors(content, path.name)


def _not_weights_only(path: Path, why: str) -> ValueError:
    return ValueError(
        f"{path.name} is not a weights-only checkpoint ({why}); nothing in it was run. Save the weights alone, "
        "torch.save(net.state_dict(), FILE) or as safetensors; or let a function of yours load it: FILE.py:FUNCTION"
    )


def _refuse_archive(path: Path) -> None:
    """Raises ValueError for a zip file that is a TorchScript program, or that would fill the memory: torch.save packs
    without compression, so that its file unfolds to its own size."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # damaged, which torch.load reports
    held = sum(entry.file_size for entry in entries)
    if held > path.stat().st_size:
        raise _not_weights_only(path, f"{path.stat().st_size} bytes that would unfold to {held}")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise _not_weights_only(path, "a TorchScript program")


def _tensors(content: Any, name: str) -> tuple[State, str]:
    """The mapping of names to tensors in what a .pt held, at the top or in one of the usual wrappers."""
    places = [key for key in content if _by_name(content[key])] if isinstance(content, Mapping) else []
    taken = next((key for key in WRAPPERS if key in places), None)
    if taken is None and not _by_name(content):
        several = isinstance(content, Mapping)
        found = f"a dict with {', '.join(map(str, list(content)[:MOST_KEYS])) or 'nothing'}" if several else ""
        raise ValueError(
            f"{name} holds {found or type(content).__name__}; expected tensors by name, at the top or in "
            f"{', '.join(WRAPPERS)}"
        )
    held = content if taken is None else content[taken]
    odd = [key for key, value in held.items() if not _ordinary(value)]
    if odd:
        raise ValueError(f"{name} holds a tensor at {odd[0]} that is not an ordinary one; expected dense ones")
    others = [str(key) for key in places if key != taken]
    note = f"weights those of '{taken}'; the checkpoint also holds {', '.join(others)}" if others else ""
    return {str(key): value for key, value in held.items()}, note


def _by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _ordinary(value: Tensor) -> bool:
    """Dense, with values, and not quantized."""
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta and not value.is_nested


def fill(net: nn.Module, state: State, facts: Facts, name: str) -> None:
    """Load the weights strictly, under the common prefixes. Raises ValueError that names what does not fit."""
    wanted = net.state_dict()
    fitting = unprefixed(state, set(wanted))
    # a count of batches that BatchNorm keeps for training; checkpoints of old versions of torch lack it
    optional = {key for key in wanted if key in OWN or key.endswith(".num_batches_tracked")}
    optional |= vars(net).get(MAY_LACK, set())
    missing = [key for key in wanted if key not in fitting and key not in optional]
    unexpected = [key for key in fitting if key not in wanted]
    if missing or unexpected:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ValueError(f"{name} does not fit this architecture: {', '.join(parts)} of {counted(len(wanted), 'key')}")
    for key, value in fitting.items():
        _same_shape(key, tuple(value.shape), tuple(wanted[key].shape), facts, name)
        if wanted[key].is_floating_point() and not value.is_floating_point():
            raise ValueError(f"{name} has {value.dtype} at {key}; this architecture has {wanted[key].dtype} there")
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):  # float8 has no isfinite
            raise ValueError(f"{name} holds values at {key} that are not finite numbers")
    net.load_state_dict(fitting, strict=False)


def unprefixed(state: State, wanted: set[str]) -> State:
    """The state without prefixes that all its names share, as far as more names fit without them; or with `model.`
    before them, where the net is one around the one that was saved."""
    best = state
    while True:
        shared = [prefix for prefix in PREFIXES if state and all(key.startswith(prefix) for key in state)]
        if not shared:
            around = {f"model.{key}": value for key, value in state.items()}
            return around if len(wanted & set(around)) > len(wanted & set(best)) else best
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
        if len(wanted & set(state)) > len(wanted & set(best)):
            best = state


def _same_shape(key: str, found: tuple[int, ...], wanted: tuple[int, ...], facts: Facts, name: str) -> None:
    if found == wanted:
        return
    if found and wanted and wanted[0] == facts.classes != found[0] and found[1:] == wanted[1:]:
        raise ValueError(f"{name} has {counted(found[0], 'class')} at {key}, {facts.name} has {facts.classes}")
    raise ValueError(f"{name} has shape {found} at {key}; this architecture has {wanted} there")
