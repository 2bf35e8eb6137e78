"""Activation memory of a training step, counted on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Activations(NamedTuple):
    """Maxima in bytes: `saved` of what is stored for backward passes (each storage once; without weights and images of
    the batch), `peak` of all that the step allocates, including gradients and temporaries of operators."""

    saved: int
    peak: int


class _Live:
    """Storages that are alive: each counted once, however many hold it."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.bytes = self.most = 0

    def hold(self, key: int, size: int) -> None:
        if key not in self.holders:
            self.bytes += size
            self.most = max(self.most, self.bytes)
        self.holders[key] = self.holders.get(key, 0) + 1

    def release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.bytes -= size


class _Kept:
    """A tensor that a backward pass will want; its end is the end of the graph that keeps it."""

    def __init__(self, tensor: Tensor, live: _Live) -> None:
        self.tensor = tensor
        storage = tensor.untyped_storage()
        weakref.finalize(self, live.release, storage.data_ptr(), storage.nbytes())
        live.hold(storage.data_ptr(), storage.nbytes())


class _Made(TorchDispatchMode):
    """Follows every storage that operators make."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.live = set(known), _Live()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.follow(tensor.untyped_storage())
        return out

    def follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.live.holders:
            return
        self.live.hold(key, size)
        weakref.finalize(storage, self.live.release, key, size)


def activations(step: Callable[[], Any], net: nn.Module, x: Tensor) -> Activations:
    """Makes one step twice: once to follow what is saved, once to follow all storages."""
    own = [*net.parameters(), *net.buffers(), x]
    saved, given = _Live(), {tensor.untyped_storage().data_ptr() for tensor in own}

    def pack(tensor: Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in given else _Kept(tensor.detach(), saved)

    def unpack(kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        step()
    net.zero_grad(set_to_none=True)
    with _Made({tensor.untyped_storage()._cdata for tensor in own}) as made:
        step()
    return Activations(saved.most, made.live.most)
