"""correct = 1[predict(x) = y]

Clean accuracy, the natural accuracy of Madry et al. (2018, arXiv 1706.06083): the deployed prediction rule on the
unperturbed image. No budget is part of the question.

For a stochastic model `correct` follows its own rule (vote of all its draws, abstention counts as an error), and
`correct_single` says whether one further draw alone was right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench.core.attack import Context, Evaluation, Outcome
from bench.core.classifier import Classifier, frozen
from bench.core.rng import scope, seed


@dataclass
class Clean(Evaluation):
    """Accuracy without an attack."""

    uses_threat: ClassVar[bool] = False
    revision: ClassVar[int] = 1
    smoke: ClassVar[dict[str, Any]] = {}

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Columns `correct` and, for a stochastic model, `correct_single`, both bool of shape b."""
        with frozen(model), torch.no_grad(), scope(seed(ctx.seed, "clean")):
            columns = {"correct": model.predict(x) == y}
            if model.stochastic:
                columns["correct_single"] = model(x).argmax(1) == y
        return Outcome(columns)
