"""R = sigma * Phi^-1(p_lower), p_lower = Clopper-Pearson bound of P(f(x + sigma N(0, I)) = c) at level alpha

Certification by randomized smoothing (Cohen et al. 2019, arXiv 1902.02918): n0 draws choose the class c, n further
draws bound its probability; where the bound does not exceed 1/2 the classifier abstains.

With probability at least 1 - alpha for each image, no perturbation of L2 size below `radius` changes the prediction.
The certified accuracy at r is the share with `correct` and radius >= r; the radius is that of the *predicted* class,
correct or not. The draws of a block's images are one stream of batches, counted on the device, instead of a Python loop
over each image's; guarantees and sample numbers are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

from annotated_types import Gt, Lt
from torch import Tensor

from bench.core.attack import Context, Evaluation, Outcome
from bench.core.classifier import Classifier, frozen
from bench.core.rng import scope, seed
from bench.core.smoothing import Vote, check_certifiable


@dataclass
class Certify(Evaluation):
    """Certified L2 radius of a smoothed classifier. Costs n0 + n forward passes an image."""

    uses_threat: ClassVar[bool] = False
    needs_smoothed: ClassVar[bool] = True
    block: ClassVar[int] = 20
    cost: ClassVar[str] = "(n0 + n) F"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {"n0": 10, "n": 100, "batch_size": 50}

    n0: Annotated[int, Gt(0)] = 100
    """Draws that select the class."""
    n: Annotated[int, Gt(0)] = 100000
    """Further draws that bound its probability."""
    alpha: Annotated[float, Gt(0), Lt(1)] = 0.001
    """Probability, for each image, that its certificate is wrong."""
    batch_size: Annotated[int, Gt(0)] = 1000
    """Most draws in a forward pass; several images may share one."""

    def __post_init__(self) -> None:
        check_certifiable(self.n, self.alpha)

    def unsupported_reason(self, model: Classifier) -> str | None:
        """Also for a smoothed model whose noise is at a site without a certificate."""
        return super().unsupported_reason(model) or cast(Vote, model).uncertifiable()

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Columns `correct` (the label was predicted), `radius` and `prediction` (0 and -1 where abstaining)."""
        smoothed = cast(Vote, model)
        with frozen(model), scope(seed(ctx.seed, "certify")):
            found = smoothed.certify(
                x,
                n0=self.n0,
                n=self.n,
                alpha=self.alpha,
                batch_size=self.batch_size,
                report=lambda done: ctx.report(done, len(x), ""),
            )
        columns = {"correct": found.prediction == y, "radius": found.radius, "prediction": found.prediction}
        return Outcome(columns)
