"""min_w E_n[ mean_i CE(f(x' + n_i), y) ], x' = argmax_{B(x, eps)} -log mean_i softmax_y f(x' + n_i), n_i ~ N(0, s^2 I)

SmoothAdv (Salman et al. 2019, arXiv 1906.04584): adversarial training of a smoothed classifier. The attack climbs the
log of the *averaged* probability, not the mean of cross-entropies, and the loss sees the same m draws of noise.

`pgd`: from x itself, `steps` steps of 2 eps / steps along the normalized gradient (a random direction where it is 0),
each followed by the clip of x' to [0,1], then by the projection of x' - x. `ddn` (Rony et al. 2019, arXiv 1811.09600):
the norm of x' - x shrinks by gamma where x' + n is misclassified and grows where not, along steps falling from 1 to .01
by a cosine; the smallest misclassified x' counts, projected onto the ball, and x itself where there is none.

Differs from the released code: all m copies of a batch make one optimizer step (there the batch is split in m parts of
m noises each, one step a part); DDN decides by the averaged probability for every m (there by the majority of draws)
and does not round to 256 levels; the logarithm is of a stable sum, not of a probability clamped at 1e-20. There an eps
of 64 is 64/256 = .25. Its warm-up of eps, 10 of 150 epochs, is in `recipe`; its schedule drops at a third and two
thirds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Gt, Lt
from torch import Tensor, nn

from bench.core.classifier import BatchNormMode, frozen
from bench.core.defense import Batch, Defense, Losses
from bench.core.smoothing import Smoothed


class Attacked(NamedTuple):
    """Adversarial images (b c h w) and the draws of noise (m b c h w) they were found under."""

    x_adv: Tensor
    noise: Tensor


@dataclass
class SmoothAdv(Defense):
    """Adversarial training under shared noise, and a vote. Costs (2 steps + 3) draws forward passes F an image."""

    norms: ClassVar[tuple[str, ...]] = ("L2",)
    predictor: ClassVar[str] = "smoothed"
    cost: ClassVar[str] = "(2 steps + 3) draws F = 14F"
    adaptive_attacks: ClassVar[str] = "closed_form, eot"
    revision: ClassVar[int] = 2
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule": "step",
        "epochs": 150,
        "batch_size": 256,
        "eps_warmup": 0.0667,
    }
    test_settings: ClassVar[dict[str, Any]] = {"n_vote": 20}

    sigma: Annotated[float, Gt(0)] = 0.25
    """Standard deviation of the noise in training and in the vote, in pixel units ([0,1])."""
    draws: Annotated[int, Gt(0)] = 2
    """Draws of noise an image and step, shared by attack and loss (m of the paper: 1, 2, 4 or 8)."""
    attack: Literal["pgd", "ddn"] = "pgd"
    """Inner attack: projected ascent, or decoupled direction and norm."""
    steps: Annotated[int, Gt(0)] = 2
    """Gradient steps of the inner maximization (T of the paper: 2 to 10)."""
    gamma: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Factor by which DDN changes the norm in a step."""
    init_norm: Annotated[float, Gt(0)] = 1.0
    """Norm that DDN starts with, in pixel units, before any step."""
    attack_bn_mode: BatchNormMode = "eval"
    """BatchNorm during the attack: running statistics (eval), batch statistics (train), or these with no trace left."""
    n_vote: Annotated[int, Gt(0)] = 100
    """Draws of the deployed vote."""
    alpha: Annotated[float, Gt(0), Lt(1)] = 0.001
    """Probability that the deployed vote returns another class than the ideal vote."""

    def __post_init__(self) -> None:
        if self.threat.norm != "L2":
            raise ValueError(f"smoothadv attacks in the L2 ball, as its certificate is one; got {self.threat.norm}")

    def inner(self, net: nn.Module, batch: Batch) -> Attacked:
        """Adversarial images under fresh draws of noise, and these draws."""
        noise = self.sigma * torch.randn(self.draws, *batch.x.shape, dtype=batch.x.dtype, device=batch.x.device)
        with frozen(net, self.attack_bn_mode) as target:

            def log_mean(delta: Tensor) -> Tensor:
                logits = target((batch.x + delta + noise).flatten(0, 1)).unflatten(0, noise.shape[:2])
                return logits.log_softmax(2).logsumexp(0) - math.log(self.draws)

            delta = (self._pgd if self.attack == "pgd" else self._ddn)(log_mean, batch)
        return Attacked(self.threat.project_to_image(batch.x, batch.x + delta), noise)

    def _pgd(self, log_mean: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        delta = torch.zeros_like(batch.x)
        for _ in range(self.steps):
            direction, _ = _uphill(log_mean, delta, batch.y)
            moved = batch.x + delta + 2 * self.threat.radius / self.steps * direction
            delta = self.threat.project(moved.clamp(0, 1) - batch.x)
        return delta

    def _ddn(self, log_mean: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        delta = best = torch.zeros_like(batch.x)
        farthest = _size(torch.maximum(batch.x, 1 - batch.x))
        norm, smallest = torch.full_like(farthest, self.init_norm), farthest
        for step in range(1, self.steps + 1):
            direction, log_p = _uphill(log_mean, delta, batch.y)
            wrong = (log_p.argmax(1) != batch.y).view_as(norm)
            nearer = wrong & (_size(delta) < smallest)
            best, smallest = torch.where(nearer, delta, best), torch.where(nearer, _size(delta), smallest)
            norm = torch.minimum(norm * (1 - self.gamma * (2 * wrong.to(norm.dtype) - 1)), farthest)
            delta = delta + (0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2) * direction
            delta = (batch.x + delta * norm / _size(delta).clamp_min(1e-12)).clamp(0, 1) - batch.x
        return best

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy over all draws of the attack."""
        logits = net((adv.x_adv + adv.noise).flatten(0, 1))
        return {"ce": F.cross_entropy(logits, batch.y.repeat(len(adv.noise)), label_smoothing=batch.smoothing)}

    def deploy(self, net: nn.Module) -> Smoothed:
        """The smoothed classifier with the noise of training."""
        return Smoothed(net, self.sigma, self.n_vote, self.alpha)


def _size(delta: Tensor) -> Tensor:
    """L2 norm of each sample, b 1 1 1."""
    return delta.flatten(1).norm(dim=1).view(-1, *[1] * (delta.dim() - 1))


def _uphill(log_mean: Callable[[Tensor], Tensor], delta: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Unit direction (b c h w) in which -log p_y grows fastest, and the log-probabilities (b k) at `delta`."""
    delta = delta.detach().requires_grad_()
    log_p = log_mean(delta)
    (grad,) = torch.autograd.grad(-log_p.gather(1, y[:, None]).sum(), delta)
    length = _size(grad)
    random = torch.randn_like(grad)
    direction = torch.where(length > 0, grad / length.clamp_min(1e-30), random / _size(random))
    return direction, log_p.detach()
