"""correct = 1[predict(x) = y]

Clean accuracy, the natural accuracy of Madry et al. (2018, arXiv 1706.06083): the deployed prediction rule on the
unperturbed image, independent of any budget.

For a stochastic model `correct` follows its own rule (vote of all its draws, abstention counts as an error), and
the columns of `bench.core.stochastic.draw_columns` give the accuracy of single further draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bench.core.attack import Context, Evaluation, Outcome
from bench.core.classifier import Classifier, frozen
from bench.core.stochastic import draw_columns


@dataclass
class Clean(Evaluation):
    """Accuracy without an attack."""

    uses_threat: ClassVar[bool] = False
    cost: ClassVar[str] = "F"
    revision: ClassVar[int] = 1

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Column `correct`, bool of shape b, and for a stochastic model those of `draw_columns`."""
        with frozen(model):
            columns = {"correct": ctx.correct(model, x, y)}
            if model.stochastic:
                columns |= draw_columns(model, x, y, ctx.seed)
        return Outcome(columns)
