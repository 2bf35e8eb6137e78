"""x' = the image, made against another model g of the matrix, that breaks f at x

Transfer attack (Papernot et al. 2016, arXiv 1605.07277) with images that are already on disk: those that the
evaluations of the attack `source` made against the undefended baseline and against every other row of the same model,
seed and budget. They use no gradient of f, so gradient masking does not affect them, and cost one forward pass each.

If they lower the worst case of a row, the gradient attacks on that row were weak (check C14). The planner adds the
undefended baseline if the matrix has none. For a stochastic model the image that is misclassified in most of `draws`
draws is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import Classifier
from bench.core.stochastic import wrong_draws


@dataclass
class Transfer(Attack):
    """Images of other rows. Column `source`: index of the evaluation in the record's `sources`, -1 if none
    succeeded."""

    needs_images: ClassVar[bool] = True
    cost: ClassVar[str] = "(draws + 2) F"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {"draws": 2}

    source: str = "pgd"
    """Attack whose images are evaluated on the other rows, with all its settings in the matrix."""
    draws: Annotated[int, Gt(0)] = 20
    """Fresh draws that score each image if the model is stochastic."""

    def unsupported_reason(self, model: Classifier) -> str | None:
        if self.source == "transfer":
            return "source=transfer would depend on itself; name another attack"
        return super().unsupported_reason(model)

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """For each image the one of `ctx.others` that is misclassified most often, or the image itself if none is."""
        draws = self.draws if bool(getattr(model, "stochastic", False)) else 1
        x_adv, most = x.clone(), torch.zeros(len(x), dtype=torch.int64, device=x.device)
        source = torch.full((len(x),), -1, dtype=torch.int16, device=x.device)
        for number, (_, images) in enumerate(ctx.others):
            wrong = wrong_draws(model, images, y, draws)
            better = wrong > most
            x_adv[better], most[better], source[better] = images[better].to(x), wrong[better], number
            ctx.report(number + 1, len(ctx.others), f"{int((most > 0).sum())} of {len(x)} broken")
        return x_adv, {"source": source}
