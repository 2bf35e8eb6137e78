"""What stops a job and marks it: loss, weights or answers that are no numbers, and a net that learned nothing or fell.

A marked run has state `diverged`: it is never ranked, and never shown as 0 % or 100 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier, frozen
from bench.core.rng import scope, seed
from bench.data.images import Data, to_channels_last, to_float

PROBE, MIN_STEPS, PATIENCE = 256, 100, 3


class Diverged(RuntimeError):
    """Loss or weights stopped being finite numbers: the run is stopped, marked and never ranked."""


class Collapsed(Diverged):
    """The net answers no better than always with one class: the run is stopped, marked and never ranked."""


def not_finite(terms: dict[str, float], net: nn.Module, epoch: int, epochs: int) -> Diverged | None:
    """The reason to stop after an epoch whose mean terms, or the weights it left, are not finite; else None."""
    if not all(math.isfinite(value) for value in terms.values()):
        return Diverged(f"loss is not finite in epoch {epoch} of {epochs}: {terms}")
    if not bool(torch.stack([p.detach().isfinite().all() for p in net.parameters()]).all()):
        return Diverged(f"weights are not finite after epoch {epoch} of {epochs}: {terms}")
    return None


@contextmanager
def watch_finite(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Inside, every pass through the model is looked at; the function given says whether each image had a largest logit
    that is a number, and every slope at an image was one. NaN would be read as class 0, and as no slope at all. Nothing
    waits for the device before it is asked.

    A net that rules classes out by -inf still answers. Copies of the net are looked at too.
    """
    sums: list[Tensor] = []

    def add(values: Tensor) -> None:
        sums[:] = [sums[0] + values.sum()] if sums else [values.sum()]

    def look(net: nn.Module, given: tuple[Any, ...], logits: Any) -> None:
        if isinstance(logits, Tensor) and logits.dim() > 1:
            add(logits.detach().amax(-1))
        for x in given:
            if isinstance(x, Tensor) and x.requires_grad and not hasattr(x, "looked_at"):
                x.looked_at = True  # type: ignore[attr-defined]
                x.register_hook(lambda slope: add(slope.detach()))

    # a vote may pass draws through its net alone
    parts = [model, model.net] if getattr(model, "smoothed", False) else [model]
    handles = [part.register_forward_hook(look) for part in parts]  # type: ignore[union-attr]
    try:
        yield lambda: not sums or bool(sums[0].isfinite())
    finally:
        for handle in handles:
            handle.remove()


class CollapseDetector:
    """Looks at a deployed net on up to 256 fixed training images without an attack: one pass an epoch.

    Two things count. A net that once beat the most frequent class clearly, and then gives one and the same answer at 3
    epoch ends in a row, has collapsed and training stops. A net that at the end of training is right no more often
    than always answering the most frequent class has collapsed too. Being at chance early proves nothing: adversarial
    training may stay there for epochs and then take off. Nothing is judged before 100 updates, or within a warm-up.
    """

    def __init__(self, data: Data, run_seed: int) -> None:
        self._seed = seed(run_seed, "watch")
        order = torch.randperm(len(data.train.x), generator=torch.Generator().manual_seed(self._seed))
        chosen = order[:PROBE].to(data.train.x.device)
        self._x, self._y = to_channels_last(to_float(data.train.x[chosen])), data.train.y[chosen]
        self.majority = int(self._y.bincount().max())
        self._learned, self._constant = False, 0

    def fallen(self, model: Classifier, epoch: int, epochs: int) -> Collapsed | None:
        """The reason to stop at this epoch's end, or None."""
        hits, one_answer = self._look(model)
        n = len(self._y)
        self._learned = self._learned or hits > self.majority + 0.2 * (n - self.majority)
        self._constant = self._constant + 1 if one_answer else 0
        if not (self._learned and self._constant >= PATIENCE and self.majority < n):
            return None
        return Collapsed(
            f"the net had learned, but gave one and the same answer to all of {n} training images at the end of "
            f"epochs {epoch - PATIENCE + 1} to {epoch} of {epochs}"
        )

    def failed(self, model: Classifier, steps: int) -> Collapsed | None:
        """The reason not to deploy what training ended with after so many updates, or None."""
        n = len(self._y)
        if steps < MIN_STEPS or self.majority == n:
            return None
        hits, one_answer = self._look(model)
        if hits > self.majority:
            return None
        return Collapsed(
            f"the trained net is right on {hits} of {n} training images"
            + (", all with one answer" if one_answer else "")
            + f"; always answering their most frequent class is right on {self.majority}"
        )

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far."""
        return {"learned": self._learned, "constant": self._constant}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._learned, self._constant = state["learned"], state["constant"]

    @torch.no_grad()
    def _look(self, model: Classifier) -> tuple[int, bool]:
        """Right answers in one pass, and whether all answers are the same. Leaves generators and buffers alone."""
        with frozen(model), scope(self._seed):
            watch_finite: Tensor = model(self._x).argmax(1)
        found = torch.stack([(watch_finite == self._y).sum(), (watch_finite == watch_finite[0]).all().long()]).tolist()
        return found[0], bool(found[1])
