"""Isolates a user's net: side effects of its forward pass on the process do not reach the attack."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.rng import restored, restored_torch


class IsolatedModel(Classifier):
    """A user's net as attacks see it. Each forward pass

    - gets its own copy of the images, contiguous `b c h w`, so that the net may write into it and may call `view`;
    - leaves Python's, NumPy's and torch's generators, the gradient mode and the default dtype as they were: a net that
      sets a seed would otherwise freeze the random starts of the attack. A stochastic net draws from a seed that the
      attack's generator gives, fresh in each pass;
    - leaves no `.grad` on weights that had none, as a net that calls `backward` would;
    - gives float32 logits where the net's are of another floating dtype: half precision hides small differences of the
      loss from an attack.
    """

    def __init__(self, net: nn.Module, stochastic: bool) -> None:
        super().__init__(net)
        self.stochastic = stochastic
        self._needs_weight_gradients = False
        self._uses_numpy_or_random: bool | None = None  # unknown before the first pass; to restore them takes long

    def forward(self, x: Tensor) -> Tensor:
        """Logits `b k`."""
        try:
            logits = self._isolated(x)
        except RuntimeError as error:
            # attacks switch the gradients of weights off; a net that adapts its own weights at test time needs them
            if self._needs_weight_gradients or "does not require grad" not in str(error):
                raise
            self._needs_weight_gradients = True
            logits = self._isolated(x)
        return logits.float() if isinstance(logits, Tensor) and logits.is_floating_point() else logits

    def decisive(self) -> nn.Module | None:
        """The net itself: isolation changes no logit."""
        return None if self.stochastic else self.net

    def writes_into(self, x: Tensor) -> bool:
        """Does a forward pass change the images that it is given?"""
        given = x.clone()
        with restored(), torch.no_grad():
            self.net(given)
        return not torch.equal(given, x)

    def _isolated(self, x: Tensor) -> Tensor:
        dtype, without = torch.get_default_dtype(), [p for p in self.net.parameters() if p.grad is None]
        fresh = int(torch.randint(2**32, ())) if self.stochastic else None
        try:
            with (
                self._restored_generators(fresh),
                torch.set_grad_enabled(torch.is_grad_enabled()),
                _requiring_gradients(self.net) if self._needs_weight_gradients else nullcontext(),
            ):
                logits: Tensor = self.net(x.clone(memory_format=torch.contiguous_format))
        finally:
            torch.set_default_dtype(dtype)
            for parameter in without:
                parameter.grad = None
        return logits

    @contextmanager
    def _restored_generators(self, fresh: int | None) -> Iterator[None]:
        """Generators restored afterwards; inside they are seeded with `fresh`, if given."""
        torch_alone = self._uses_numpy_or_random is False
        with restored_torch() if torch_alone else restored():
            if fresh is not None:
                torch.default_generator.manual_seed(fresh)
                if torch.cuda.is_initialized():
                    torch.cuda.manual_seed_all(fresh)
            if fresh is not None and not torch_alone:
                random.seed(fresh)
                np.random.seed(fresh)
            if self._uses_numpy_or_random is None:
                before = _numpy_and_random()
                yield
                self._uses_numpy_or_random = before != _numpy_and_random()
            else:
                yield


def _numpy_and_random() -> tuple[object, ...]:
    state = np.random.get_state(legacy=False)["state"]  # type: ignore[call-overload]
    return random.getstate(), state["key"].tobytes(), state["pos"]


@contextmanager
def _requiring_gradients(net: nn.Module) -> Iterator[None]:
    """Inside, all weights of the net have gradients; the flags are restored afterwards."""
    frozen = [p for p in net.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
