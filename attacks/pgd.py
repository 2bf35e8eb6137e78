"""x_{t+1} = Pi(x_t + a * argmax_{||d|| <= 1} <grad_x L(f(x_t), y), d>), x_0 = Pi(x + u)

Projected gradient descent (Madry et al. 2018, arXiv 1706.06083): `steps` steps of length rel_step_size * eps from a
random start, each projected to ball and box, `restarts` times.

Differs from the released code, which returns the last iterate: here the strongest iterate is kept for every image (a
misclassified one before any other, then the higher loss), which lowers accuracy by some tenths of a point. For a
stochastic model the last iterate counts, because a single misclassified draw may be chance. Later restarts attack only
the images that are still robust. `cw` is the plain margin of the logits (Carlini and Wagner 2017, arXiv 1608.04644,
without the relu, which never clips in practice), `dlr` that of Croce and Hein (2020, arXiv 2003.01690), `kl` that of
TRADES.

Under L1 a step moves the share 1 - `sparsity` of the coordinates with the largest gradient, all by the same amount, as
the sparse descent of Tramer and Boneh (2019, arXiv 1904.13000); a coordinate at the edge of the box whose gradient
points outwards is skipped, because it would use up the step without moving. `eot` averages the gradient over fresh
draws of a stochastic model (Athalye et al. 2018, arXiv 1707.07397).

Under Linf, from `LONG` steps on, an image leaves once its iterate equals the one before or the one two steps before:
the map from one iterate to the next is fixed, so that all later iterates have been seen. The others go on in a smaller
batch, which may round differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import predicted
from bench.core.pgd import AttackLoss, Best, Start, attack_loss, check_reach, start_delta

LONG, EVERY = 50, 5  # steps of an attack that looks for repeated iterates, and steps between two looks


@dataclass
class PGD(Attack):
    """Projected gradient attack. Costs 2 steps + 1 passes an image and restart, 2 eot steps + 1 if stochastic."""

    cost: ClassVar[str] = "(2 steps eot restarts + 2) F = 42F"
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = ("sparsity", "eot")
    needed_classes: ClassVar[dict[str, int]] = {"dlr": 3}
    test_settings: ClassVar[dict[str, Any]] = {"steps": 3, "rel_step_size": 0.5, "restarts": 2}
    watched: ClassVar[bool] = False  # a subclass that records the passes: every image stays to the end

    steps: Annotated[int, Gt(0)] = 20
    """Gradient steps of each restart."""
    rel_step_size: Annotated[float, Gt(0)] = 0.1
    """Step size in units of eps."""
    restarts: Annotated[int, Gt(0)] = 1
    """Random restarts; the strongest iterate of all counts."""
    loss: AttackLoss = "ce"
    """Loss to maximize: cross-entropy, margin of the logits, difference-of-logits ratio, or KL from the clean one."""
    start: Start = "uniform"
    """First iterate: uniform in the ball, 0.001 N(0,1) around the image, or the image itself."""
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Share of the coordinates that a step leaves unchanged, for L1 only."""
    eot: Annotated[int, Gt(0)] = 1
    """Draws of a stochastic model whose gradients are averaged at each step; ignored for a deterministic model."""

    def __post_init__(self) -> None:
        check_reach(self.steps, self.rel_step_size)
        if self.start == "zero" and self.restarts > 1:
            raise ValueError("start=zero makes all restarts equal; use start=uniform or restarts=1")
        if self.start == "zero" and self.loss == "kl":
            raise ValueError("the gradient of loss=kl is 0 at the image itself; use start=normal or start=uniform")

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """The strongest iterate of each image over all restarts; no further columns."""
        best = Best(x)
        self.strengthen(model, x, y, ctx, best)
        return best.x_adv, {}

    def strengthen(
        self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context, best: Best, warm: Tensor | None = None
    ) -> None:
        """Update `best` with all restarts; a restart from `warm` (in the ball), if given, comes first."""
        clean_logits = None
        if self.loss == "kl":
            with torch.no_grad():
                clean_logits = model(x)
        stochastic = bool(getattr(model, "stochastic", False))
        starts = [None] * self.restarts if warm is None else [warm, *[None] * self.restarts]
        for done, start in enumerate(starts, start=1):
            rows = torch.arange(len(x), device=x.device) if stochastic else (~best.wrong).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            logits = None if clean_logits is None else clean_logits[rows]
            first = None if start is None else start[rows]
            self._ascend(model, x[rows], y[rows], logits, best, rows, stochastic, first)
            ctx.report(done, len(starts), f"{int(best.wrong.sum())} of {len(x)} broken")

    def _ascend(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        clean_logits: Tensor | None,
        best: Best,
        rows: Tensor,
        last_only: bool,
        first: Tensor | None = None,
    ) -> None:
        """One restart on the images `rows`; updates `best` with every iterate, or with the last one only."""
        objective = attack_loss(self.loss, y, clean_logits)
        threat, step_size = self.threat, self.rel_step_size * self.threat.radius
        draws = self.eot if last_only else 1
        periodic = threat.norm == "Linf" and self.steps >= LONG and not last_only and not self.watched
        x_adv = (
            first.clone() if first is not None else threat.project_to_image(x, x + start_delta(self.start, x, threat))
        )
        earlier = x_adv
        for step in range(self.steps + 1):
            last = step == self.steps
            x_adv.requires_grad_(not last)
            grads: list[Tensor] = []
            for _ in range(1 if last else draws):
                with torch.set_grad_enabled(not last):
                    logits = model(x_adv)
                    loss = objective(logits)
                if not last:
                    # the projection is outside the graph: a clip inside zeroes the gradient of pixels at the edge
                    grads += torch.autograd.grad(loss.sum(), x_adv)
            point = x_adv.detach()
            if last or not last_only:
                best.update(point, loss.detach(), predicted(logits.detach()) != y, rows)
            if last:
                break
            grad = grads[0] if draws == 1 else torch.stack(grads).mean(0)
            x_adv = threat.project_to_image(x, point + step_size * self._direction(grad, point))
            if periodic and step % EVERY == EVERY - 1:
                moves = (x_adv != point).flatten(1).any(1) & (x_adv != earlier).flatten(1).any(1)
                left = moves.nonzero().squeeze(1)
                if len(left) == 0:
                    break
                if len(left) < len(x):
                    x, y, rows, x_adv, point = (each[left] for each in (x, y, rows, x_adv, point))
                    clean_logits = None if clean_logits is None else clean_logits[left]
                    objective = attack_loss(self.loss, y, clean_logits)
            earlier = point

    def _direction(self, grad: Tensor, point: Tensor) -> Tensor:
        """The step of unit norm from `point`: steepest ascent; for L1 over the largest coordinates that can move."""
        if self.threat.norm != "L1":
            return self.threat.steepest_direction(grad)
        stuck = ((point <= 0) & (grad < 0)) | ((point >= 1) & (grad > 0))
        flat = grad.masked_fill(stuck, 0.0).flatten(1)
        count = max(1, round((1 - self.sparsity) * flat.shape[1]))
        top = flat.abs().topk(count, dim=1).indices
        signs = torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top).sign())
        return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view_as(grad)
