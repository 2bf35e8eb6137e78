"""Weights of a foreign checkpoint, strictly: what does not fit is named, never skipped, and nothing in it is run."""

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

State = dict[str, Tensor]
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # where training code keeps the weights in a .pt
PREFIXES = ("module.", "model.", "net.", "_orig_mod.")  # what DataParallel, wrappers and torch.compile put before names
OWN = ("normalise.mean", "normalise.std")  # buffers of our architectures that a foreign checkpoint lacks
MOST_KEYS = 5


def read(path: Path) -> State:
    """The tensors of a checkpoint, on the CPU; safetensors or a weights-only pickle, told apart by content.

    Nothing in the file is executed. Raises ValueError in one line.
    """
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:9] == b"{":
        try:
            return load_safetensors(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path.name} is a damaged safetensors file: {error}") from None
    _refuse_bomb(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise anything: EOFError, UnpicklingError, RuntimeError, KeyError ...
        found = re.search(r"GLOBAL (\S+)", str(error))
        why = f"holds {found[1]}" if found else f"{type(error).__name__}"
        raise ValueError(
            f"{path.name} is no weights-only checkpoint ({why}); nothing in it was run. Save the weights alone: "
            "torch.save(net.state_dict(), FILE), or as safetensors"
        ) from None
    return _tensors(content, path.name)


def _refuse_bomb(path: Path) -> None:
    """torch.save packs without compression, so that a file unfolds to its own size; a small one that would fill the
    memory was not made by it. Raises ValueError."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            held = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return  # damaged: torch.load says so
    if held > path.stat().st_size:
        raise ValueError(
            f"{path.name} is no weights-only checkpoint ({path.stat().st_size} bytes that would unfold to {held}); "
            "nothing in it was run. Save the weights alone: torch.save(net.state_dict(), FILE), or as safetensors"
        )


def _tensors(content: Any, name: str) -> State:
    """The mapping of names to tensors in what a .pt held, at the top or in one of the usual wrappers."""
    places = [content] if isinstance(content, Mapping) else []
    places += [content[key] for key in WRAPPERS if places and isinstance(content.get(key), Mapping)]
    for place in places:
        if place and all(isinstance(value, Tensor) for value in place.values()):
            odd = [key for key, value in place.items() if not _ordinary(value)]
            if odd:
                raise ValueError(f"{name} holds a tensor at {odd[0]} that is not an ordinary one; expected dense ones")
            return {str(key): value for key, value in place.items()}
    found = (
        f"a dict with {', '.join(map(str, list(content)[:MOST_KEYS])) or 'nothing'}"
        if places
        else type(content).__name__
    )
    raise ValueError(f"{name} holds {found}; expected tensors by name, at the top or in {', '.join(WRAPPERS)}")


def _ordinary(value: Tensor) -> bool:
    """Dense, with values of its own, and no codes that stand for others."""
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta and not value.is_nested


def fill(net: nn.Module, state: State, facts: Facts, name: str) -> None:
    """Load the weights strictly, under the common prefixes. Raises ValueError that names what does not fit."""
    wanted = net.state_dict()
    fitting = unprefixed(state, set(wanted))
    missing = [key for key in wanted if key not in fitting and key not in OWN]
    unexpected = [key for key in fitting if key not in wanted]
    if missing or unexpected:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ValueError(f"{name} does not fit this architecture: {', '.join(parts)} of {len(wanted)} keys")
    for key, value in fitting.items():
        _same_shape(key, tuple(value.shape), tuple(wanted[key].shape), facts, name)
        if wanted[key].is_floating_point() and not value.is_floating_point():
            raise ValueError(f"{name} has {value.dtype} at {key}; this architecture has {wanted[key].dtype} there")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} holds values at {key} that are not finite numbers")
    net.load_state_dict(fitting, strict=False)


def unprefixed(state: State, wanted: set[str]) -> State:
    """The state with prefixes that all its names share taken away, as far as that makes more names fit."""
    best = state
    while True:
        shared = [prefix for prefix in PREFIXES if state and all(key.startswith(prefix) for key in state)]
        if not shared:
            return best
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
        if len(wanted & set(state)) > len(wanted & set(best)):
            best = state


def _same_shape(key: str, found: tuple[int, ...], wanted: tuple[int, ...], facts: Facts, name: str) -> None:
    if found == wanted:
        return
    if found and wanted and wanted[0] == facts.classes != found[0] and found[1:] == wanted[1:]:
        raise ValueError(f"{name} has {found[0]} classes at {key}, {facts.name} has {facts.classes}")
    raise ValueError(f"{name} has shape {found} at {key}; this architecture has {wanted} there")
