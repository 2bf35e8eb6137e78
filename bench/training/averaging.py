"""Averages of the weights during training (EMA, SWA) and their BatchNorm statistics. Training itself is unaffected."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bench.core.classifier import frozen, keep_buffers
from bench.training import stop_signals

Kind = Literal["none", "ema", "swa"]
EMA_COPY = 0.025  # initial fraction of training in which the moving average is a copy of the weights


class Average:
    """A running average of the parameters of `net`.

    `ema` (as Gowal et al. 2020, arXiv 2010.03593): after every update w_a = t w_a + (1 - t) w with t = min(decay,
    (1 + n) / (10 + n)) at the n-th update, counted from 0 after the first 2.5 % of `total` updates, in which w_a = w.
    `swa` (Izmailov et al. 2018, arXiv 1803.05407; in adversarial training Chen et al. 2021, ICLR): the equal average of
    the weights at the end of each epoch that ends after the fraction `start` of training; a copy until then. `none`:
    the current weights.
    """

    def __init__(self, net: nn.Module, kind: Kind, *, total: int, decay: float = 0.995, start: float = 0.5) -> None:
        self.kind, self.decay, self.start = kind, decay, start
        self._copied = int(EMA_COPY * total)
        self._live = list(net.parameters()) if kind != "none" else []
        self._mean = [p.detach().clone() for p in self._live]
        self._updates = 0
        self.active = 0
        """Updates (ema) or epochs (swa) in the average, without those that were copied."""

    def update(self) -> None:
        """Add the weights after an update of training (ema only)."""
        if self.kind == "ema":
            n = self._updates - self._copied
            self._blend(1.0 if n < 0 else 1 - min(self.decay, (1 + n) / (10 + n)))
            self._updates += 1
            self.active += n >= 0

    def end_epoch(self, progress: float) -> None:
        """Add the weights at the end of an epoch (swa only); `progress` is the fraction of training, in (0,1]."""
        if self.kind == "swa":
            self.active += progress > self.start
            self._blend(1 / max(self.active, 1))

    def restart(self) -> None:
        """Restart the average from the current weights, which were restored from an earlier state."""
        self._blend(1.0)
        self.active = 0

    def state_dict(self) -> dict[str, Any]:
        """The average and its counters."""
        return {"mean": self._mean, "updates": self._updates, "active": self.active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self._mean, self._updates, self.active = state["mean"], state["updates"], state["active"]

    def _blend(self, share: float) -> None:
        if self._live:
            torch._foreach_lerp_(self._mean, [p.detach() for p in self._live], share)

    def install(self) -> None:
        """Replace the network's parameters by the average, permanently."""
        self._set(self._mean)

    @contextmanager
    def installed(self, net: nn.Module) -> Iterator[None]:
        """Context in which the parameters of `net` are the average; parameters and buffers are restored afterwards."""
        saved = [p.detach().clone() for p in self._live]
        with keep_buffers(net):
            try:
                self.install()
                yield
            finally:
                self._set(saved)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._live, values, strict=True):
            parameter.copy_(value)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the statistics of every BatchNorm layer of `model` to those of one pass over `batches` of images (b c h w).

    Mean and (unbiased) variance are averages over batches, weighted by their size b: momentum b / (n + b) after n
    images. A last batch of a single image is skipped, because it has no variance at a single position. All other
    modules are in eval mode during the pass; each module's mode is restored. Without BatchNorm no pass is made.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    seen = 0
    with frozen(model):
        for layer in layers:
            layer.reset_running_stats()
            layer.train()
        for x in batches:
            stop_signals.point()
            if seen and len(x) == 1:
                continue
            for layer in layers:
                layer.momentum = len(x) / (seen + len(x))
            model(x)
            seen += len(x)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
