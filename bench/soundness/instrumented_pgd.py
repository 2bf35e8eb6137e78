"""PGD that records its path: whether any point was misclassified, and whether the loss still rose at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.pgd import PGD
from bench.core.attack import Columns, Context
from bench.core.classifier import Counted, predicted
from bench.soundness.catalog import LAST_STEPS


class _Recorder(Counted):
    """Forwards each pass to the model and records the loss and the prediction of each image."""

    def __init__(self, model: nn.Module, y: Tensor) -> None:
        super().__init__(model)
        self.y = y
        self.losses: list[Tensor] = []
        self.met = torch.zeros_like(y, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        seen = logits.detach()
        self.losses.append(F.cross_entropy(seen, self.y, reduction="none"))
        self.met |= predicted(seen) != self.y
        return logits


@dataclass
class InstrumentedPGD(PGD):
    """PGD of one restart with the columns `met` (some point on the path was misclassified) and `moved` (share of the
    loss's range on the path that its best value gained in the last steps; Pintor et al. 2022, arXiv 2106.09947)."""

    watched: ClassVar[bool] = True

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """The images and columns of PGD, with both columns added."""
        if self.restarts != 1:
            raise ValueError(f"an instrumented PGD has one restart, got {self.restarts}")  # later ones see fewer images
        watch = _Recorder(model, y)
        found, columns = super().perturb(watch, x, y, ctx)
        losses = torch.stack(watch.losses)  # steps + 1, b
        best = losses.cummax(0).values
        gained = best[-1] - best[max(len(best) - 1 - LAST_STEPS, 0)]
        span = (losses.amax(0) - losses.amin(0)).clamp_min(1e-12)
        return found, {**columns, "met": watch.met, "moved": gained / span}
