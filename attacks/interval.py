"""correct = [ min_{j != y} min_{x' in B(x, eps)} z_y(x') - z_j(x') >= bound > 0 ]

Certified accuracy by interval bound propagation (Gowal et al. 2018, arXiv 1810.12715), or by the linear relaxation of
CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316), on a deterministic net: an image counts if a lower bound of each margin
over the whole ball is above 0. No attack of this budget changes its prediction, so the accuracy is a lower bound of
robust accuracy, where an attack gives an upper one. A net that was not trained for it has bounds far too loose.

Bounds are in float64 and hold for the model as it computes in float32: each layer's box is widened by the largest error
of its rounding, and ball and pixel box by the tolerance with which images of attacks are checked (`bench.noise`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from bench.core.attack import Context, Evaluation, Outcome, Unsupported
from bench.core.classifier import Classifier, frozen
from bench.noise.interval import obstacle, proved


@dataclass
class Interval(Evaluation):
    """A proof for each image. Costs 4 forward passes F in float64, and with `crown` about 4 for each further class."""

    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    needs_determinism: ClassVar[bool] = True
    proves: ClassVar[bool] = True
    cost: ClassVar[str] = "5F"
    revision: ClassVar[int] = 1
    unnamed_settings: ClassVar[tuple[str, ...]] = ("batch_size",)

    method: Literal["interval", "crown"] = "interval"
    """Boxes through all layers, or linear bounds of the margins back to the image."""
    batch_size: Annotated[int, Gt(0)] = 100
    """Images in one pass."""

    def unsupported_reason(self, model: Classifier) -> str | None:
        """Also for a model that predicts by another rule than the largest logit."""
        changed = "needs the largest logit of a net as the prediction" if model.decisive() is None else None
        return super().unsupported_reason(model) or changed

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Columns `correct` (right, and proved to stay so), `clean` (right without a perturbation) and `bound` (of
        the smallest margin, float32).

        Raises Unsupported, naming the layer, for a net without bounds.
        """
        with frozen(model):
            if reason := obstacle(model, x[:16]):
                raise Unsupported(reason)
            clean, bounds = ctx.correct(model, x, y), list[Tensor]()
            for part in torch.arange(len(x), device=x.device).split(self.batch_size):
                bounds.append(proved(model, x[part], y[part], self.threat, self.method))
                ctx.report(int(part[-1]) + 1, len(x), f"{sum(int((b > 0).sum()) for b in bounds)} proved")
        bound = torch.cat(bounds)
        return Outcome({"correct": clean & (bound > 0), "clean": clean, "bound": bound.float()})
