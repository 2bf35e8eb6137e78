"""g(a) = E max_{x'} CE(f_{w + a d}(x'), y),  ||d_f|| = ||w_f||;   rise = max_{||v_l|| <= gamma ||w_l||} g(w + v) - g(w)

Weight-loss landscape along filter-normalized random directions (Li et al. 2018, arXiv 1712.09913), of the clean and of
the adversarial loss (Wu et al. 2020, arXiv 2004.05884), and the rise at the worst weights that AWP trains against.

A direction is Gaussian, each filter scaled to the norm of the net's own, so that rescaling the layers of a ReLU net
changes nothing. Parameters of one axis (biases, BatchNorm) stay where they are, as in the code of Li et al., and so do
BatchNorm's running statistics. Adversarial images are made anew at each point: those of the unperturbed net, as
in work before Wu et al. (images=fixed), hide part of the rise. Directions, starts and the noise of a stochastic model
are the same at every point, so that differences are the weights' alone.

The worst weights are those of each block of images: the gradient climbs the loss of the images made at w, each step as
AWP's, every layer is put back into its ball, and the highest point met counts; weight_steps=1 is AWP's own step. The
loss there is taken like that of any point. A loss that is not finite stays so in the column, and tables say how many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from bench.core.attack import Columns, Context, Evaluation, Outcome
from bench.core.classifier import Classifier, Counted, frozen
from bench.core.pgd import ascend, attack_loss, check_reach
from bench.core.rng import normal_like, scope, seed
from bench.core.weights import Shifts, layer_weights, shifted, uphill, within


@dataclass
class Flatness(Evaluation):
    """Losses around the weights. Costs 2 steps + 2 passes an image at each of directions x distances + 2 points, and
    twice 2 weight_steps + 1 to climb in weight space."""

    metric: ClassVar[str] = "adversarial_rise"
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    cost: ClassVar[str] = "((2 steps + 2) (directions distances + 2) + 6 weight_steps) F = 434F"
    revision: ClassVar[int] = 1
    test_settings: ClassVar[dict[str, Any]] = {"directions": 2, "steps": 2, "rel_step_size": 0.5, "weight_steps": 2}

    distances: list[float] = field(default_factory=lambda: [0.1, 0.25, 0.5])
    """How far to go along each direction, in units of the weights' own size."""
    directions: Annotated[int, Gt(0)] = 5
    """Random directions."""
    images: Literal["anew", "fixed"] = "anew"
    """Adversarial images of each point (Wu et al.), or those of the unperturbed net everywhere."""
    steps: Annotated[int, Gt(0)] = 10
    """Gradient steps of the attack on cross-entropy, from a uniform start."""
    rel_step_size: Annotated[float, Gt(0)] = 0.25
    """Its step size in units of eps."""
    gamma: Annotated[float, Gt(0)] = 5e-3
    """Largest worst-case perturbation of each layer, relative to the layer's weights."""
    weight_steps: Annotated[int, Gt(0)] = 10
    """Ascent steps in weight space, each 2.5 gamma / weight_steps long and put back into the ball."""

    def __post_init__(self) -> None:
        check_reach(self.steps, self.rel_step_size)
        if not self.distances or 0 in self.distances or len(set(self.distances)) < len(self.distances):
            raise ValueError(f"flatness: distances is {self.distances}; expected different numbers other than 0")

    def evaluate(self, model: Classifier, x: Tensor, y: Tensor, ctx: Context) -> Outcome:
        """Columns (float64): `clean_loss`, `adversarial_loss`, both again with `_<distance>` (b x directions), and
        `clean_rise`, `adversarial_rise` at the worst weights for each."""
        counted = Counted(model.surrogate())
        with frozen(model):
            weights = layer_weights(model, parametrized=True)
            *here, x_adv = self._losses([], counted, x, y, ctx, None)
            fixed = x_adv if self.images == "fixed" else None
            columns = dict(zip(("clean_loss", "adversarial_loss"), here, strict=True))
            columns |= self._random(weights, counted, x, y, ctx, fixed)
            worst = self._worst(weights, counted, x, y, ctx)
            columns["clean_rise"] = self._losses(worst, counted, x, y, ctx, x)[0] - here[0]
            worst = self._worst(weights, counted, x_adv, y, ctx)
            columns["adversarial_rise"] = self._losses(worst, counted, x, y, ctx, fixed)[1] - here[1]
        return Outcome({**columns, **counted.columns(x)})

    def _losses(
        self, shifts: Shifts, model: nn.Module, x: Tensor, y: Tensor, ctx: Context, x_adv: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """At shifted weights: clean and adversarial loss (float64, shape b), and the images, made here unless given."""
        objective = attack_loss("ce", y)
        with shifted(shifts):
            if x_adv is None and self.threat.radius > 0:
                with scope(seed(ctx.seed, "attack")):
                    x_adv = ascend(
                        lambda z: objective(model(z)),
                        x,
                        self.threat,
                        steps=self.steps,
                        rel_step_size=self.rel_step_size,
                    )
            x_adv = x if x_adv is None else x_adv
            losses = []
            for images in (x, x_adv):
                with torch.no_grad(), scope(seed(ctx.seed, "loss")):
                    losses.append(objective(model(images)).double())
        return losses[0], losses[1], x_adv

    def _random(
        self, weights: list[nn.Parameter], model: nn.Module, x: Tensor, y: Tensor, ctx: Context, fixed: Tensor | None
    ) -> Columns:
        """Clean and adversarial loss at each distance, `b x directions`."""
        found: dict[str, list[Tensor]] = {}
        for place in range(self.directions):
            # not of ctx.seed: every block of images must look the same way
            with scope(seed("flatness", "direction", place)):
                direction = [filter_direction(w) for w in weights]
            for distance in self.distances:
                shifts = [(w, distance * d) for w, d in zip(weights, direction, strict=True)]
                clean, adversarial, _ = self._losses(shifts, model, x, y, ctx, fixed)
                found.setdefault(f"clean_loss_{distance:g}", []).append(clean)
                found.setdefault(f"adversarial_loss_{distance:g}", []).append(adversarial)
            ctx.report(place + 1, self.directions + 1, "")
        return {name: torch.stack(values, 1) for name, values in found.items()}

    def _worst(self, weights: list[nn.Parameter], model: nn.Module, images: Tensor, y: Tensor, ctx: Context) -> Shifts:
        """The shift at which the mean loss of `images` was highest on the way up (none, if it never rose)."""
        length = 2.5 * self.gamma / self.weight_steps
        shifts = best = [torch.zeros_like(w) for w in weights]
        highest = torch.full((), float("-inf"), device=images.device)
        for step in range(self.weight_steps + 1):
            last = step == self.weight_steps
            for weight in weights:
                weight.requires_grad_(not last)
            # the same noise at every step, to compare them, and other noise than the loss is taken with
            with shifted(list(zip(weights, shifts, strict=True))), scope(seed(ctx.seed, "climb")):
                with torch.set_grad_enabled(not last):
                    loss = F.cross_entropy(model(images), y)
                grads = () if last else torch.autograd.grad(loss, weights, allow_unused=True)
            higher = loss.detach() > highest  # not where it is NaN
            best = [torch.where(higher, s, b) for s, b in zip(shifts, best, strict=True)]
            highest = torch.where(higher, loss.detach(), highest)
            if not last:
                full = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
                moved = [s + v for s, (_, v) in zip(shifts, uphill(weights, full, length), strict=True)]
                shifts = [within(w, v, self.gamma) for w, v in zip(weights, moved, strict=True)]
        return list(zip(weights, best, strict=True))


def filter_direction(weight: Tensor) -> Tensor:
    """A Gaussian direction whose every filter has the norm of that filter of `weight` (Li et al. 2018).

    A filter is what makes one output: a slice along the first axis. Where it is 0 so is the direction.
    """
    drawn = normal_like(weight.detach())
    sizes = weight.detach().flatten(1).norm(dim=1) / (drawn.flatten(1).norm(dim=1) + 1e-20)
    return drawn * sizes.view(-1, *[1] * (weight.dim() - 1))
