"""l(a, b) = CE(f(clip(x + a eps u + b eps v)), y),  nonlinearity = max_{||a u + b v|| <= 1} |l(a, b) - l - <d, grad l>|

Loss surface over the plane of the gradient and a random direction, as drawn by Tramer et al. (2018, arXiv 1705.07204)
and Engstrom, Ilyas and Athalye (2018, arXiv 1807.10272), with the local-linearity measure of Qin et al. (2019, arXiv
1907.02610).

u is the steepest direction of the loss at the image (sign of the gradient in Linf, unit gradient in L2), v has random
signs (Linf), or is Gaussian, made orthogonal to u and of unit length (L2). Every point is clipped to [0,1], which no
attack may leave, and d is the displacement left after that. What counts for a number lies in the ball before clipping;
where u and v are signs, that is |a| + |b| <= 1. Where the gradient is 0, so is u.

Qin et al. take the maximum over the whole ball, by PGD: ours, over points of one plane, is a lower bound of it.
off_gradient is the highest loss of these points less that of the whole gradient step (a = 1, b = 0). Above 0 the
gradient did not point to the worst place of even this plane: a sign of masked gradients where it is large. Some comes
from curvature, and in L2 from clipping. A smooth surface is no proof of robustness.

A stochastic model draws the same noise for the gradient and at every point: it is the surface of one draw, and its
differences are the image's alone. A loss that is not finite stays so in the columns, and tables say how many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from bench.core.attack import Context, Evaluation, Outcome
from bench.core.classifier import Classifier, Counted, frozen
from bench.core.pgd import attack_loss
from bench.core.rng import scope, seed
from bench.core.threat import Threat

INSIDE = 1 + 1e-5  # norms over thousands of pixels are rounded; points lie much farther from each other


@dataclass
class Surface(Evaluation):
    """Losses on a plane through each image. Costs points x points + 3 passes an image."""

    metric: ClassVar[str] = "nonlinearity"
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    cost: ClassVar[str] = "(points points + 3) F = 228F"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {"points": 3}

    points: Annotated[int, Ge(3)] = 15
    """Values of a and of b, evenly spaced; odd, so that the image itself is among the points."""
    reach: Annotated[float, Gt(0)] = 1.0
    """Largest a and b, in units of eps."""

    def __post_init__(self) -> None:
        if self.points < 3 or self.points % 2 == 0:
            raise ValueError(f"surface: points is {self.points}; expected an odd number, 3 or more")
        if not 0 < self.reach < math.inf:
            raise ValueError(f"surface: reach is {self.reach}; expected a finite number above 0, in units of eps")

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Columns: `loss` (float32, b x points x points; the first axis after the images is a), and in float64
        `clean_loss`, `nonlinearity` and `off_gradient`."""
        counted, objective = Counted(model.surrogate()), attack_loss("ce", y)

        def loss(images: Tensor) -> Tensor:
            with scope(seed(ctx.seed, "loss")):  # the same noise everywhere
                return objective(counted(images))

        with frozen(model):
            z = x.detach().clone().requires_grad_(True)
            here = loss(z)
            (grad,) = torch.autograd.grad(here.sum(), z)
            clean, u = here.detach().double(), self.threat.steepest_direction(grad)
            with scope(seed(ctx.seed, "direction")):
                v = across(self.threat, u)
            highest, gap, surface = clean, torch.zeros_like(clean), list[Tensor]()
            for a, b in self._places():
                step = a * u + b * v
                moved = (x + self.threat.radius * step).clamp(0, 1)
                with torch.no_grad():
                    there = loss(moved).double()
                inside = self.threat.norm_of(step) <= INSIDE
                rise = ((moved.double() - x.double()) * grad.double()).flatten(1).sum(1)
                gap = torch.where(inside, gap.maximum((there - clean - rise).abs()), gap)
                highest = torch.where(inside, highest.maximum(there), highest)
                surface.append(there.float())
                if len(surface) % self.points == 0:
                    ctx.report(len(surface), self.points**2, "")
        columns = {"clean_loss": clean, "nonlinearity": gap, "off_gradient": highest - there}
        grid = torch.stack(surface[:-1], 1).unflatten(1, (self.points, self.points))
        return Outcome({**columns, "loss": grid, **counted.columns(x)})

    def _places(self) -> list[tuple[float, float]]:
        """Every a and b, row by row, then the whole gradient step, which need not be on the grid."""
        axis = [self.reach * (2 * k / (self.points - 1) - 1) for k in range(self.points)]
        return [*((a, b) for a in axis for b in axis), (1.0, 0.0)]


def across(threat: Threat, u: Tensor) -> Tensor:
    """A random direction for each image: signs in Linf, else orthogonal to u and of unit length."""
    v = torch.empty_like(u)
    for index in range(len(u)):  # one by one, so that no image's direction depends on how many come after it
        v[index] = torch.randn(u.shape[1:], dtype=u.dtype, device=u.device)
    if threat.norm == "Linf":
        return torch.ones_like(v).copysign(v)
    along = (v * u).flatten(1).sum(1)
    return threat.steepest_direction(v - along.view(-1, *[1] * (v.dim() - 1)) * u)
