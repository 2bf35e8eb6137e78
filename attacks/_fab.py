"""x_{t+1} = (1 - a)(x_t + 1.05 d(x_t)) + a (x_0 + 1.05 d(x_0)), d(.) the smallest step to the linearized boundary

Targeted FAB (Croce and Hein 2020, arXiv 1907.02044) for Linf, many rows at once, without restarts as in AutoAttack.

Differs from the authors' package: a point is judged by the next gradient pass instead of a pass of its own, and if it
is adversarial, pulled back towards the image with the linearization of that pass. Three passes a step in place of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attacks._rows import SHRINK, Found, Rows, arithmetic, gather
from bench.core.classifier import predicted

STEPS = 100
BEYOND, BACK, MOST = 1.05, 0.9, 0.1  # extrapolation, share kept of a step back, largest weight of the image
NEWTON, TINY = 8, 1e-30  # steps of Newton's method, which ends after 3 to 6; keeps 0 / 0 from being NaN
PIXELS = (1, 2, 3)
CACHED = 2**15  # numbers in a tensor of a step, so that its temporaries stay in the cache of a CPU


def to_plane(point: Tensor, normal: Tensor, height: Tensor) -> Tensor:
    """The smallest step d in Linf (r c h w) from points in the box with <normal, d> = -height and point + d in the box;
    the nearest corner where no such step exists. `height` has shape r 1 1 1.

    With room_i the way of coordinate i to the edge of the box, |d_i| = min(l, room_i) for the l that solves
    sum_i |w_i| min(l, room_i) = |height|. The left side is concave in l: Newton's method from 0 never overshoots, and
    it ends at the exact l, since each step is computed anew from the coordinates that are at their edge.
    """
    towards = -torch.sign(normal * torch.sign(height))
    room = torch.where(towards > 0, 1 - point, point).mul_(towards.abs())
    weight, goal, length = normal.abs(), height.abs(), torch.zeros_like(height)
    reach = weight * room
    for _ in range(NEWTON):
        free = (room > length).to(weight.dtype)
        slope = (weight * free).sum(PIXELS, keepdim=True)
        rest = goal - (reach * free.neg_().add_(1)).sum(PIXELS, keepdim=True)
        longer = torch.maximum(length, rest / slope.clamp_min_(TINY))
        if torch.equal(longer, length):
            break
        length = longer
    return towards.mul_(torch.minimum(room, length))


def fab(
    found: Found, rows: Rows, precision: str = "fp32", leave: dict[int, float] | None = None
) -> tuple[Rows, Tensor]:
    """Attack rows; hits go to `found`. Returns the rows of images that nothing broke and the distance of the nearest
    adversarial point of each, inf where none was met.

    `leave`: the distance in units of eps beyond which a row without hope leaves, by the number of steps made.
    """
    rows = rows.kept(found.robust[rows.image])
    assert rows.target is not None
    center = gather(found.x, rows.image)
    point, distance = center.clone(), torch.full((len(center),), float("inf"), device=center.device)
    for step in range(STEPS + 1):
        if len(rows.image) == 0:
            break
        ahead, normal, wrong = _linearized(found, rows, point, precision, last=step == STEPS)
        size = (point - center).abs().amax(PIXELS)
        found.offer(rows.image, point, wrong & (size <= found.threat.radius))
        distance = torch.where(wrong, torch.minimum(size, distance), distance)
        if step == STEPS:
            break
        keep = found.robust[rows.image]
        floor = (leave or {}).get(step)
        if floor is not None:
            keep &= distance <= floor * found.threat.radius
        if (left := int(keep.sum())) < SHRINK * len(keep) or (floor is not None and left < len(keep)):
            rows, kept = rows.kept(keep), keep.nonzero().squeeze(1)
            center, point, distance = gather(center, kept), gather(point, kept), distance[kept]
            ahead, normal, wrong = ahead[kept], gather(normal, kept), wrong[kept]
        parts = [
            each.split(max(CACHED // center.shape[1:].numel(), 1)) for each in (center, point, ahead, normal, wrong)
        ]
        point = torch.cat([_step(*part) for part in zip(*parts, strict=True)])
    return rows, distance


def _linearized(found: Found, rows: Rows, point: Tensor, precision: str, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z_t - z_y at each point, its gradient, and whether the prediction is wrong."""
    point = point.detach().requires_grad_(not last)
    y = found.y[rows.image]
    assert rows.target is not None
    with torch.set_grad_enabled(not last), arithmetic(precision, point):
        logits = found.model(point).float()
        ahead = (logits.gather(1, rows.target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    normal = point if last else torch.autograd.grad(ahead.sum(), point)[0]
    return ahead.detach(), normal, predicted(logits.detach()) != y


def _step(center: Tensor, point: Tensor, ahead: Tensor, normal: Tensor, wrong: Tensor) -> Tensor:
    """The next points."""
    back = (point - center) * (wrong * (BACK - 1)).view(-1, 1, 1, 1)
    point = point + back
    height = ahead.view(-1, 1, 1, 1) + (normal * back).sum(PIXELS, keepdim=True)
    height_center = height + (normal * (center - point)).sum(PIXELS, keepdim=True)
    d, d_center = to_plane(point, normal, height), to_plane(center, normal, height_center)
    size, size_center = (each.abs().amax(PIXELS, keepdim=True).clamp_min(1e-8) for each in (d, d_center))
    weight = (size / (size + size_center)).clamp_max(MOST)
    moved = d.mul_(BEYOND).add_(point).lerp_(d_center.mul_(BEYOND).add_(center), weight)
    return moved.clamp_(0, 1)
