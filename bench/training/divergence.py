"""Divergence of a training: NaN or Inf in loss, weights or logits, and collapse to chance or to one class.

A diverged run has the state `diverged`: it is never ranked, and never shown as 0 % or 100 %.
"""

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
    """Loss or weights are NaN or Inf: the training is stopped and its record marked as diverged."""


class Collapsed(Diverged):
    """The network is no better than a constant prediction: the training is stopped and marked as diverged."""


def not_finite(terms: dict[str, float], net: nn.Module, epoch: int, epochs: int) -> Diverged | None:
    """The reason to stop after an epoch whose mean terms or final weights are not finite, else None."""
    if not all(math.isfinite(value) for value in terms.values()):
        return Diverged(f"loss is not finite in epoch {epoch} of {epochs}: {terms}")
    if not bool(torch.stack([p.detach().isfinite().all() for p in net.parameters()]).all()):
        return Diverged(f"weights are not finite after epoch {epoch} of {epochs}: {terms}")
    return None


@contextmanager
def watch_finite(model: nn.Module) -> Iterator[Callable[[], bool]]:
    """Context in which every pass through the model is checked. It yields a function that returns True if the largest
    logit of each image and every gradient at an image were finite; the device is synchronized only when it is called.

    NaN would count as class 0, or as a zero gradient. Logits of -inf for excluded classes are allowed. Copies of the
    network are checked too.
    """
    sums: list[Tensor] = []

    def add(values: Tensor) -> None:
        sums[:] = [sums[0] + values.sum()] if sums else [values.sum()]

    def check(net: nn.Module, given: tuple[Any, ...], logits: Any) -> None:
        if isinstance(logits, Tensor) and logits.dim() > 1:
            add(logits.detach().amax(-1))
        for x in given:
            if isinstance(x, Tensor) and x.requires_grad and not hasattr(x, "gradient_is_watched"):
                x.gradient_is_watched = True  # type: ignore[attr-defined]
                x.register_hook(lambda grad: add(grad.detach()))

    # a smoothed model may pass its noise draws to its network directly
    parts = [model, model.net] if getattr(model, "smoothed", False) else [model]
    handles = [part.register_forward_hook(check) for part in parts]  # type: ignore[union-attr]
    try:
        yield lambda: not sums or bool(sums[0].isfinite())
    finally:
        for handle in handles:
            handle.remove()


class CollapseDetector:
    """Detects collapse by one pass per epoch over up to 256 fixed training images, without an attack.

    A network has collapsed if it was clearly better than the most frequent class and then predicts a single class at
    the end of 3 epochs in a row, or if it is no better than the most frequent class at the end of the training. Chance
    level early in training is not a collapse: adversarial training may need epochs to leave it. There is no check
    before 100 updates, or within a warm-up.
    """

    def __init__(self, data: Data, run_seed: int) -> None:
        self._seed = seed(run_seed, "watch")
        order = torch.randperm(len(data.train.x), generator=torch.Generator().manual_seed(self._seed))
        chosen = order[:PROBE].to(data.train.x.device)
        self._x, self._y = to_channels_last(to_float(data.train.x[chosen])), data.train.y[chosen]
        self.majority = int(self._y.bincount().max())
        self._learned, self._constant = False, 0

    def collapse(self, model: Classifier, epoch: int, epochs: int) -> Collapsed | None:
        """The reason to stop at the end of this epoch, or None."""
        correct, one_class = self._predict(model)
        n = len(self._y)
        self._learned = self._learned or correct > self.majority + 0.2 * (n - self.majority)
        self._constant = self._constant + 1 if one_class else 0
        if not (self._learned and self._constant >= PATIENCE and self.majority < n):
            return None
        return Collapsed(
            f"the net had learned, but predicted one class for all of {n} training images at the end of "
            f"epochs {epoch - PATIENCE + 1} to {epoch} of {epochs}"
        )

    def chance_level(self, model: Classifier, steps: int) -> Collapsed | None:
        """The reason not to deploy the network after a training of `steps` updates, or None."""
        n = len(self._y)
        if steps < MIN_STEPS or self.majority == n:
            return None
        correct, one_class = self._predict(model)
        if correct > self.majority:
            return None
        return Collapsed(
            f"the trained net is correct on {correct} of {n} training images"
            + (", with one class for all" if one_class else "")
            + f"; their most frequent class is correct on {self.majority}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The result of earlier epochs, for checkpoints."""
        return {"learned": self._learned, "constant": self._constant}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self._learned, self._constant = state["learned"], state["constant"]

    @torch.no_grad()
    def _predict(self, model: Classifier) -> tuple[int, bool]:
        """Correct predictions in one pass, and whether all are one class. Generators and buffers are unchanged."""
        with frozen(model), scope(self._seed):
            predicted: Tensor = model(self._x).argmax(1)
        found = torch.stack([(predicted == self._y).sum(), (predicted == predicted[0]).all().long()]).tolist()
        return found[0], bool(found[1])
