"""x_{t+1} = Pi(x_t + 0.75 (Pi(x_t + a_t sign grad L) - x_t) + 0.25 (x_t - x_{t-1})), a_t halved where L stops rising

AutoPGD (Croce and Hein 2020, arXiv 2003.01690, algorithm 1) for Linf, many rows at once. Steps, start, momentum and
checkpoints are those of the authors' package, in the same law: each row draws its start by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks._rows import SHRINK, Found, Rows, arithmetic, gather, uniforms
from bench.core.classifier import predicted

STEPS = 100
FIRST, SHORTER, SHORTEST = 22, 3, 6  # steps to the first checkpoint; each interval is shorter by 3, down to 6
RISING = 0.75  # the step is halved where the loss rose in less than this share of the steps of an interval
MOMENTUM = 0.25


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), shape r: positive only where the prediction is wrong."""
    top = logits.topk(4, dim=1).values
    ahead = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
    return ahead.squeeze(1) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def apgd(found: Found, rows: Rows, key: int, precision: str = "fp32", leave: dict[int, float] | None = None) -> bool:
    """Attack rows, by cross-entropy or, where they have targets, by targeted DLR; hits go to `found`.

    `leave`: the loss below which a row without hope leaves, by the number of steps made. Returns whether every row had
    a gradient at its start: an exact zero tells that gradients are masked, and then no row leaves.
    """
    rows = rows.kept(found.robust[rows.image])
    if len(rows.image) == 0:
        return True
    state = _Rows(found, rows, key, precision)
    state.pass_()
    visible = bool((state.grad.flatten(1) != 0).any(1).all())
    state.begin()
    interval, since = FIRST, 0
    for step in range(1, STEPS + 1):
        state.move()
        state.pass_(last=step == STEPS)
        if step == STEPS:
            break
        state.track()
        since += 1
        if since == interval:
            state.check(interval)
            interval, since = max(interval - SHORTER, SHORTEST), 0
        if not state.shrink(leave.get(step) if leave and visible else None):
            break
    return visible


class _Rows:
    """The state of rows: point, the one before, gradient, the best of each, and what the checkpoints need."""

    def __init__(self, found: Found, rows: Rows, key: int, precision: str) -> None:
        self.found, self.rows, self.precision = found, rows, precision
        center, radius = gather(found.x, rows.image), found.threat.radius
        self.y = found.y[rows.image]
        self.low, self.high = (center - radius).clamp_min_(0), (center + radius).clamp_max_(1)
        noise = torch.empty_like(center).copy_(uniforms(tuple(center.shape[1:]), key, rows)).mul_(2).sub_(1)
        scale = radius / noise.abs().flatten(1).amax(1)
        self.point = center.add_(noise.mul_(scale.view(-1, 1, 1, 1))).clamp_(0, 1)
        self.size = torch.full((len(center), 1, 1, 1), 2 * radius, device=center.device)
        self.momentum = 0.0  # none in the first step

    def pass_(self, last: bool = False) -> None:
        """Loss and gradient at the point; a misclassified one is a hit."""
        self.point.requires_grad_(not last)
        with torch.set_grad_enabled(not last), arithmetic(self.precision, self.point):
            logits = self.found.model(self.point).float()
            target = self.rows.target
            if target is None:
                loss = F.cross_entropy(logits, self.y, reduction="none")
            else:
                loss = targeted_dlr(logits, self.y, target)
        if not last:
            (self.grad,) = torch.autograd.grad(loss.sum(), self.point)
        self.point = self.point.detach()
        self.loss = loss.detach()
        self.found.offer(self.rows.image, self.point, predicted(logits.detach()) != self.y)

    def begin(self) -> None:
        """The start is the best so far."""
        self.before, self.best, self.best_grad = self.point, self.point.clone(), self.grad.clone()
        self.best_loss, self.checked_loss = self.loss.clone(), self.loss.clone()
        self.halved = torch.ones_like(self.loss, dtype=torch.bool)
        self.rises, self.last_loss = torch.zeros_like(self.loss), torch.zeros_like(self.loss)

    def move(self) -> None:
        """One step with momentum; projections to ball and box are one, since the box is an interval too."""
        ahead = torch.sign(self.grad).mul_(self.size).add_(self.point)
        torch.clamp(ahead, self.low, self.high, out=ahead)
        if self.momentum:
            ahead.mul_(1 - self.momentum).add_(self.point, alpha=2 * self.momentum)
            ahead.sub_(self.before, alpha=self.momentum)
            torch.clamp(ahead, self.low, self.high, out=ahead)
        self.before, self.point, self.momentum = self.point, ahead, MOMENTUM

    def track(self) -> None:
        """Count rises of the loss and keep the best point."""
        self.rises += self.loss > self.last_loss
        self.last_loss = self.loss
        better = self.loss > self.best_loss
        where = better.view(-1, 1, 1, 1)
        self.best = torch.where(where, self.point, self.best)
        self.best_grad = torch.where(where, self.grad, self.best_grad)
        self.best_loss = torch.where(better, self.loss, self.best_loss)

    def check(self, interval: int) -> None:
        """Halve the step where the loss rose too rarely, or where the best stood still since a step that was kept, and
        go on from the best point there."""
        stuck = ~self.halved & (self.checked_loss >= self.best_loss)
        self.halved = (self.rises <= RISING * interval) | stuck
        self.checked_loss, self.rises = self.best_loss, torch.zeros_like(self.rises)
        where = self.halved.view(-1, 1, 1, 1)
        self.size = torch.where(where, self.size / 2, self.size)
        self.point = torch.where(where, self.best, self.point)
        self.grad = torch.where(where, self.best_grad, self.grad)

    def shrink(self, floor: float | None) -> bool:
        """Drop rows of broken images and, with `floor`, those whose best loss is below it. Returns whether any stay."""
        keep = self.found.robust[self.rows.image]
        if floor is not None:
            keep &= self.best_loss >= floor
        left = int(keep.sum())
        if left > 0 and (floor is not None or left < SHRINK * len(keep)) and left < len(keep):
            self.rows = self.rows.kept(keep)
            for name, values in vars(self).items():
                if isinstance(values, Tensor):
                    setattr(self, name, gather(values, keep.nonzero().squeeze(1)))
        return left > 0
