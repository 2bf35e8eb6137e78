"""x' = argmin over random squares of margin(f(x'), y), accepted greedily, without gradients

Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049): random search over square-shaped changes at the corners
of the ball, which sees logits only, so that a masked gradient cannot stop it.

The implementation is that of AutoAttack's authors (package pyautoattack) with AutoAttack's settings: p = 0.8, one
restart, margin loss, and the schedule of p not rescaled to the number of queries. For a stochastic model acceptance
rests on one draw a query, which makes it weak there: use EOT attacks beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context


@dataclass
class Square(Attack):
    """Black-box random search. Costs up to n_queries + 3 forward passes an image; broken images stop early."""

    access: ClassVar[Literal["gradients", "scores"]] = "scores"
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    cost: ClassVar[str] = "100F to n_queries F"
    revision: ClassVar[int] = 1
    needed_side: ClassVar[dict[str, int]] = {"L2": 5}  # its first pattern has 5x5 tiles
    test_settings: ClassVar[dict[str, Any]] = {"n_queries": 20}

    n_queries: Annotated[int, Gt(0)] = 5000
    """Largest number of queries of the model for each image."""
    batch_size: Annotated[int, Gt(0)] = 250
    """Images searched together; they share the random squares of a query, so results depend on it slightly."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """Images found by the search; an image that was not broken comes back unchanged."""
        from pyautoattack.square import SquareAttack

        search = SquareAttack(
            model,
            p_init=0.8,
            n_queries=self.n_queries,
            eps=self.threat.radius,
            norm=self.threat.norm,
            n_restarts=1,
            seed=ctx.seed % 2**31,
            resc_schedule=False,
            device=x.device,
        )
        found = []
        with torch.no_grad():
            for part, labels in zip(x.split(self.batch_size), y.split(self.batch_size), strict=True):
                found.append(search.perturb(part, labels))
                ctx.report(sum(map(len, found)), len(x), "")
        return torch.cat(found), {}
