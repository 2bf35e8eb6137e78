"""broken_at = min {eps: predict(x_eps) != y},  x_eps = PGD in the ball of eps, begun at x_e with e < eps too

Security curve (Biggio and Roli 2018, arXiv 1712.03141): accuracy as a function of the budget, all budgets in one job.
Each climb is PGD (Madry et al. 2018, arXiv 1706.06083).

Budgets are attacked in rising order, with step sizes in units of each. The strongest point of a budget lies in the
ball of the next one and is a start there, beside the random ones; an image that is broken stays broken. So accuracy,
the share with broken_at > eps, never rises with eps. Budget 0 is the clean image.

An image is broken if the deployed prediction is wrong. A stochastic model is evaluated with the *same* noise draws at
every budget, which the attack has not seen: with fresh noise at each budget, a model that guesses would lose accuracy
by chance at every budget. Its images are all attacked up to the largest budget, because one that was misclassified
once may be correct under other draws; for a deterministic model a broken image is not attacked again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from attacks.pgd import PGD
from bench.core.attack import Columns, Context, Evaluation, Outcome
from bench.core.classifier import Classifier, Counted, frozen
from bench.core.epsilon import Epsilon, parse_eps
from bench.core.pgd import AttackLoss, Best, Start
from bench.core.rng import scope, seed
from bench.core.stochastic import draw_columns
from bench.core.threat import Threat


@dataclass
class Curve(Evaluation):
    """PGD at a list of budgets, each begun where the one before ended. Costs, for an image that holds, at each budget
    restarts + 1 (at the first restarts) climbs of 2 steps + 1 passes, and one verdict."""

    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    uses_budgets: ClassVar[bool] = True
    cost: ClassVar[str] = "(2 steps + 1) (restarts + 1) budgets F"
    revision: ClassVar[int] = 1
    needed_classes: ClassVar[dict[str, int]] = {"dlr": 3}
    test_settings: ClassVar[dict[str, Any]] = {"steps": 3, "rel_step_size": 0.5, "restarts": 2}

    budgets: list[Epsilon] = field(default_factory=list)
    """Every eps at which accuracy is wanted, up to that of the threat, which is always among them."""
    steps: Annotated[int, Gt(0)] = 20
    """Gradient steps of each climb."""
    rel_step_size: Annotated[float, Gt(0)] = 0.1
    """Step size in units of the budget."""
    restarts: Annotated[int, Gt(0)] = 1
    """Random starts at each budget, beside the start from the budget before."""
    loss: AttackLoss = "cw"
    """Loss to maximize: cross-entropy, margin of the logits, difference-of-logits ratio, or KL from the clean one."""
    start: Start = "uniform"
    """First iterate of a restart: uniform in the ball, 0.001 N(0,1) around the image, or the image itself."""

    def __post_init__(self) -> None:
        requested = {parse_eps(eps, self.threat.norm) for eps in self.budgets}
        if requested and max(requested) > self.threat.eps:
            raise ValueError(
                f"curve: budget {max(requested)} is above the eps {self.threat.eps} of the threat; "
                "expected the largest budget to be that eps"
            )
        self._budgets = sorted({*requested, self.threat.eps})
        self._pgd(self.threat)  # raises for settings that are too weak

    def _pgd(self, threat: Threat) -> PGD:
        return PGD(
            threat,
            steps=self.steps,
            rel_step_size=self.rel_step_size,
            restarts=self.restarts,
            loss=self.loss,
            start=self.start,
        )

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Raise the budget from clean to the largest; every image is checked in float64 against its budget's ball.

        Columns: `broken_at` (float64, the smallest budget that breaks the image, 0 where the clean one is wrong, inf
        where none does), `correct` (none does), `clean`, `size`, `forwards` and `backwards` as of an Attack. For a
        stochastic model those of `draw_columns` at the largest budget, and two at all, `select_at` and `share_at`
        (b x budgets).
        """
        surrogate = Counted(model.surrogate())
        with frozen(model), scope(seed(ctx.seed, "attack")):
            clean = ctx.correct(model, x, y)
            broken_at = torch.zeros(len(x), dtype=torch.float64, device=x.device)
            broken_at[clean] = float("inf")
            x_adv, size, warm = x.clone(), torch.zeros_like(broken_at), False
            draws: list[Columns] = []
            for done, eps in enumerate(self._budgets, start=1):
                todo = torch.ones_like(clean) if model.stochastic else broken_at.isinf()
                if eps > 0 and bool(todo.any()):
                    threat = Threat(self.threat.norm, eps)
                    best, first = Best(x[todo]), x_adv[todo] if warm else None
                    self._pgd(threat).strengthen(surrogate, x[todo], y[todo], Context(ctx.seed), best, first)
                    x_adv[todo], warm = best.x_adv.detach(), True
                    size[todo] = threat.check(x[todo], x_adv[todo])
                    broken_at[~ctx.correct(model, x_adv, y) & broken_at.isinf()] = float(eps)
                draws += [draw_columns(model, x_adv, y, ctx.seed)] if model.stochastic else []
                ctx.report(
                    done, len(self._budgets), f"eps {eps}: {int(broken_at.isinf().sum())} of {len(x)} still robust"
                )
        cost = surrogate.columns(x)
        columns = {"correct": broken_at.isinf(), "clean": clean, "broken_at": broken_at, "size": size.float(), **cost}
        at = {f"{name}_at": torch.stack([d[name] for d in draws], 1) for name in ("select", "share") if draws}
        return Outcome({**columns, **at, **(draws[-1] if draws else {})}, x_adv)
