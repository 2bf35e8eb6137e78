"""The threat model: a norm ball around an image, intersected with the pixel box [0,1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bench.core.epsilon import ROUNDING, Epsilon, reach

Norm = Literal["Linf", "L2", "L1"]
NORMS: tuple[Norm, ...] = ("Linf", "L2", "L1")


class NotFiniteError(ValueError):
    """Adversarial images that contain NaN or Inf: their accuracy is meaningless."""


@dataclass(frozen=True)
class Threat:
    """All x + delta with ||delta||_norm <= eps and x + delta in [0,1]. `eps` is exact; tensors see `float(eps)`.

    Tensors are images `b c h w`; every function acts on each sample of the batch by itself.
    """

    norm: Norm
    eps: Epsilon

    @property
    def radius(self) -> float:
        return float(self.eps)

    def scaled(self, factor: float) -> Threat:
        """The same ball with eps times `factor` (warm-ups)."""
        return self if factor >= 1 else Threat(self.norm, Epsilon(self.radius * max(factor, 0.0)))

    def norm_of(self, delta: Tensor) -> Tensor:
        """||delta||_norm of each sample, shape b."""
        flat = delta.flatten(1)
        if self.norm == "Linf":
            return flat.abs().amax(1)
        return flat.norm(p=2 if self.norm == "L2" else 1, dim=1)

    def project(self, delta: Tensor) -> Tensor:
        """The nearest point of the ball (without the box), per sample."""
        if self.norm == "Linf":
            return delta.clamp(-self.radius, self.radius)
        if self.norm == "L2":
            size = self.norm_of(delta).clamp_min(1e-12)
            return delta * _per_sample((self.radius / size).clamp_max(1.0), delta)
        return self._project_l1(delta)

    def _project_l1(self, delta: Tensor) -> Tensor:
        """Projection onto the L1 ball by sorting (Duchi et al. 2008); sums of thousands of pixels need float64."""
        flat = delta.flatten(1).double()
        magnitude, _ = flat.abs().sort(1, descending=True)
        excess = magnitude.cumsum(1) - self.radius
        rank = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
        support = (magnitude * rank > excess).sum(1, keepdim=True).clamp_min(1)
        threshold = (excess.gather(1, support - 1) / support).clamp_min(0)
        return (flat.sign() * (flat.abs() - threshold).clamp_min(0)).to(delta.dtype).view_as(delta)

    def project_to_image(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """The point of ball and box reached from `x_adv`: project around `x`, then clip to [0,1].

        Clipping only moves towards `x` (which lies in the box), so the result is inside both sets. Rounding moves
        either way: in L1 that adds up over thousands of pixels, so there it is directed towards `x`.
        """
        delta = self.project(x_adv - x)
        moved = x + delta
        if self.norm == "L1":
            beyond = (moved.double() - x.double()).abs() > delta.double().abs()
            moved = torch.where(beyond, moved.nextafter(x), moved)
        return moved.clamp(0, 1)

    def steepest_direction(self, grad: Tensor) -> Tensor:
        """Steepest ascent of unit norm: the sign (Linf), the normalized gradient (L2), one coordinate (L1); 0 stays 0.

        A gradient of 1e-20, as of an image classified with high confidence, has a direction like any other: a constant
        added to its norm would shorten the step to nothing, and the image would look robust.
        """
        if self.norm == "Linf":
            return grad.sign()
        if self.norm == "L2":
            largest = grad.abs().flatten(1).amax(1)  # brought to size first, as squares of small numbers vanish
            grad = grad / _per_sample(torch.where(largest > 0, largest, 1), grad)
            return grad / _per_sample(grad.flatten(1).norm(dim=1).clamp_min(1), grad)
        flat = grad.flatten(1)
        top = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, top, flat.gather(1, top).sign()).view_as(grad)

    def dual_norm(self, grad: Tensor) -> Tensor:
        """The dual norm of each sample's gradient, shape b: Linf -> L1, L2 -> L2, L1 -> Linf."""
        flat = grad.flatten(1)
        if self.norm == "L1":
            return flat.abs().amax(1)
        return flat.norm(p=1 if self.norm == "Linf" else 2, dim=1)

    def sample(self, x: Tensor) -> Tensor:
        """A random start delta in the ball: uniform in the cube (Linf), else a random direction times U(0,1) eps."""
        if self.norm == "Linf":
            return torch.empty_like(x).uniform_(-self.radius, self.radius)
        noise = torch.randn_like(x)
        share = torch.rand(len(x), device=x.device, dtype=x.dtype) * self.radius
        return noise * _per_sample(share / self.norm_of(noise).clamp_min(1e-12), x)

    def check(self, x: Tensor, x_adv: Tensor) -> Tensor:
        """The size of every perturbation, shape b, after checking in float64 that all lie in ball and box.

        Raises ValueError with the worst numbers: an infeasible image would be a false success.
        """
        if x_adv.shape != x.shape:
            raise ValueError(f"adversarial images have shape {tuple(x_adv.shape)}, expected {tuple(x.shape)}")
        if not bool(torch.isfinite(x_adv).all()):
            raise NotFiniteError("adversarial images hold NaN or Inf")
        size = self.norm_of(x_adv.double() - x.double())
        low, high = float(x_adv.min()), float(x_adv.max())
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(f"adversarial images leave the pixel box [0,1]: min {low:.6g}, max {high:.6g}")
        worst = float(size.max())
        if worst > reach(self.radius):
            raise ValueError(f"adversarial images leave the {self.norm} ball: {worst:.6g} > eps {self.radius:.6g}")
        return size

    def __str__(self) -> str:
        return f"{self.norm} {self.eps}"


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
