"""Projected gradient ascent on the input and the losses that attacks maximize, for attacks and adversarial training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.threat import Threat

AttackLoss = Literal["ce", "cw", "dlr", "kl"]
Start = Literal["uniform", "normal", "zero"]


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y for each image, shape b: positive if and only if the prediction is wrong."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - true


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Difference-of-logits ratio (Croce and Hein 2020), shape b: the margin, invariant to scale and shift of the
    logits.

    Raises ValueError for fewer than 3 classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, got {logits.shape[1]}; use loss cw")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(softmax(p) || softmax(q)) for each image, shape b. Both arguments get a gradient."""
    log_p = p_logits.log_softmax(1)
    return (log_p.exp() * (log_p - q_logits.log_softmax(1))).sum(1)


def attack_loss(name: AttackLoss, y: Tensor, clean_logits: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The loss that an attack maximizes: a map from logits (b k) to a loss per image (b).

    `ce` is cross-entropy, `cw` the margin, `dlr` the difference-of-logits ratio, `kl` the divergence from
    `clean_logits`.
    """
    if name == "ce":
        return lambda logits: F.cross_entropy(logits, y, reduction="none")
    if name == "cw":
        return lambda logits: margin(logits, y)
    if name == "dlr":
        return lambda logits: dlr(logits, y)
    if clean_logits is None:
        raise ValueError("loss kl needs the clean logits")
    constant = clean_logits.detach()
    return lambda logits: kl(constant, logits)


def start_delta(kind: Start, x: Tensor, threat: Threat) -> Tensor:
    """The initial perturbation (b c h w): uniform in the ball, 0.001 N(0,1) as in TRADES, or zero."""
    if kind == "uniform":
        return threat.sample(x)
    return 0.001 * torch.randn_like(x) if kind == "normal" else torch.zeros_like(x)


def ascend(
    objective: Callable[[Tensor], Tensor],
    x: Tensor,
    threat: Threat,
    *,
    steps: int,
    rel_step_size: float,
    start: Start | Tensor = "uniform",
) -> Tensor:
    """The last iterate of projected steepest ascent on `objective` (adversarial images -> loss per image, shape b).

    `rel_step_size` is the step size in units of eps, `start` the kind of the initial perturbation or that perturbation
    itself (b c h w). The result lies in ball and box and has no graph. The projection is *outside* the differentiated
    graph: a clip inside it would zero the gradient of every pixel at the edge of the box, which feigns robustness on
    MNIST, where most pixels are 0.
    """
    step_size = rel_step_size * threat.radius
    first = start if isinstance(start, Tensor) else start_delta(start, x, threat)
    x_adv = threat.project_to_image(x, x + first)
    for _ in range(steps):
        x_adv.requires_grad_(True)
        (grad,) = torch.autograd.grad(objective(x_adv).sum(), x_adv)
        x_adv = threat.project_to_image(x, x_adv.detach() + step_size * threat.steepest_direction(grad))
    return x_adv.detach()


class Best:
    """The strongest iterate of each image so far: a misclassified one before any other, then the higher loss."""

    def __init__(self, x: Tensor) -> None:
        self.x_adv = x.clone()
        self.loss = torch.full((len(x),), float("-inf"), device=x.device, dtype=x.dtype)
        self.wrong = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def update(self, x_adv: Tensor, loss: Tensor, wrong: Tensor, rows: Tensor) -> None:
        """Take the iterates `x_adv` of the images `rows` where they are stronger; a NaN loss never replaces a
        misclassified iterate."""
        better = (wrong & ~self.wrong[rows]) | ((wrong == self.wrong[rows]) & (loss > self.loss[rows]))
        stronger = rows[better]
        self.x_adv[stronger], self.wrong[stronger] = x_adv[better], wrong[better]
        self.loss[stronger] = loss[better].to(self.loss)


def check_reach(steps: int, rel_step_size: float) -> None:
    """Raise ValueError if the steps together are shorter than eps: such an attack cannot reach the edge of the ball."""
    if steps * rel_step_size < 1:
        raise ValueError(
            f"steps x step_size is {steps * rel_step_size:.3g} eps, less than the budget; "
            f"expected steps * rel_step_size >= 1 (steps={steps}, rel_step_size={rel_step_size})"
        )
