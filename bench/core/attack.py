"""Evaluations and attacks. The base class owns feasibility check and scoring: no attack marks its own homework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier, Counted, frozen
from bench.core.rng import scope, seed
from bench.core.threat import Threat

Columns = dict[str, Tensor]


class Outcome(NamedTuple):
    """Per-sample results: named columns of length b, and the adversarial images where the evaluation makes any."""

    columns: Columns
    x_adv: Tensor | None = None


@dataclass
class Context:
    """What an evaluation may use beside model and images. `seed` belongs to one block of image indices, so that batch
    size, sharding and a kill change nothing; `report(done, total, note)` feeds the live view."""

    seed: int
    report: Callable[[int, int, str], None] = field(default=lambda done, total, note: None)


@dataclass
class Evaluation:
    """Base of all that judges a deployed model. A subclass is one file in `attacks/`; its fields are its settings.

    Class constants, literals so that the planner can read them without importing torch:
    `uses_threat` (is the budget part of the question), `norms` it supports, `kind` ("bounded" by eps or
    "minimal" norm), `needs_smoothed` (only for models that certify), `block` (images evaluated together: the unit of
    seed and resume), `revision` (raise it when results may change), `added` (settings younger than the
    first records, as of a Defense), `smoke` (cheap settings for the contract tests).
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "arbitrary_types_allowed": True}
    uses_threat: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    kind: ClassVar[Literal["bounded", "minimal"]] = "bounded"
    needs_smoothed: ClassVar[bool] = False
    block: ClassVar[int] = 500
    revision: ClassVar[int] = 1
    added: ClassVar[tuple[str, ...]] = ()
    smoke: ClassVar[dict[str, Any]] = {}

    threat: Threat

    def supports(self, model: Classifier) -> str | None:
        """Why this model cannot be evaluated so, or None. A cell that is not supported says so; it is no failure."""
        if self.threat.norm not in self.norms:
            return f"no {self.threat.norm} version; norms: {', '.join(self.norms)}"
        if self.needs_smoothed and not model.smoothed:
            return "needs a smoothed classifier"
        return None

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Judge the model on images `x` (b c h w, in [0,1]) with labels `y`; at least the column `correct`."""
        raise NotImplementedError(f"{type(self).__name__} must define evaluate")


@dataclass
class Attack(Evaluation):
    """An evaluation that perturbs images. A subclass defines `perturb` only."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """Adversarial images for `x` against the frozen surrogate `model`, and further columns (may be empty)."""
        raise NotImplementedError(f"{type(self).__name__} must define perturb")

    @final
    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Perturb on the surrogate, check ball and box in float64, score with the model's own prediction rule.

        Columns: `correct` (right on the clean image and on the adversarial one), `clean`, `size` (norm of the
        perturbation), `forwards` and `backwards` (passes per image of the block), for a stochastic model
        `correct_single` (one fresh draw instead of the deployed rule), and what `perturb` adds.
        """
        with frozen(model), scope(seed(ctx.seed, "attack")):
            with torch.no_grad(), scope(seed(ctx.seed, "clean")):
                clean = model.predict(x) == y
            # A wrong clean image is lost already; where prediction is random, "wrong" is not a fact, so attack all.
            todo = torch.ones_like(clean) if model.stochastic else clean
            x_adv, extra = x.clone(), {}
            surrogate = Counted(model.surrogate())
            attacked = self.threat.radius > 0 and bool(todo.any())
            if attacked:
                found, columns = self.perturb(surrogate, x[todo], y[todo], ctx)
                x_adv[todo] = found.detach()
                extra = {name: _spread(values, todo) for name, values in columns.items()}
            size = self._size(x, x_adv)
            correct = clean.clone()  # without a budget it is clean accuracy, for a stochastic model too
            if attacked:
                with torch.no_grad(), scope(seed(ctx.seed, "score")):
                    correct &= model.predict(x_adv) == y
            if model.stochastic:
                with torch.no_grad(), scope(seed(ctx.seed, "single")):
                    extra["correct_single"] = model(x_adv).argmax(1) == y
        passes = {
            name: torch.full_like(size, count / len(x), dtype=torch.float32)
            for name, count in (("forwards", surrogate.forwards), ("backwards", surrogate.backwards))
        }
        return Outcome({"correct": correct, "clean": clean, "size": size, **passes, **extra}, x_adv)

    def _size(self, x: Tensor, x_adv: Tensor) -> Tensor:
        return self.threat.check(x, x_adv).float()


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the attacked samples back at their places among all; NaN (or False) elsewhere."""
    fill = float("nan") if values.is_floating_point() else 0
    full = torch.full((len(mask), *values.shape[1:]), fill, dtype=values.dtype, device=values.device)
    full[mask] = values
    return full
