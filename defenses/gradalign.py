"""min_w E[ CE(f(x'), y) + lam * (1 - cos(g, grad_x CE(f(x + n), y))) ], g = grad_x CE(f(x), y), n ~ U(-eps, eps)

GradAlign (Andriushchenko and Flammarion 2020, arXiv 2007.02617): FGSM from the image itself, x' = x + eps sign(g), and
a penalty on the angle between the gradients at the image and at a random point of the ball, against catastrophic
overfitting: where the loss is linear in the ball, one step is the whole inner maximization.

The paper's formula leaves open which gradient learns. As in the released code, g is the constant that the attack has
computed, and only the gradient at x + n is differentiated; n is not clipped to [0,1], x' is. The cosine is the mean
over images with two nonzero gradients, in float64, as the squares of small ones vanish. BatchNorm is in train mode in
all three passes, and its statistics move three times a step; the gradients see those of the batch, through which images
mix. fp16 is not supported: the gradient that is differentiated again would need a loss scale of its own. Gradients are
those of the loss with the true label, also where the recipe smooths labels. lam is the paper's for eps 8/255 on
CIFAR-10; it has .02 * 10^(255 eps / 8) for other budgets up to 16/255. The recipe is that of its curves over eps, but
that the rate peaks at 30 % of training, not at 40 %. lam = 0 is FGSM training (fast_at with variant=n_fgsm, noise=0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from bench.core.classifier import BatchNormMode, frozen
from bench.core.defense import Batch, Defense, Losses


@dataclass
class GradAlign(Defense):
    """FGSM and aligned gradients. Costs 5 forward passes F an image for FGSM and 6 for the penalty."""

    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    cost: ClassVar[str] = "5F + 6F = 11F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16")
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.3,
        "weight_decay": 5e-4,
        "schedule": "one_cycle",
        "epochs": 30,
        "batch_size": 128,
    }

    lam: Annotated[float, Ge(0)] = 0.2
    """Weight of 1 - cosine."""
    attack_bn_mode: BatchNormMode = "train"
    """BatchNorm for the gradient at the image: running statistics (eval), batch statistics (train), or these with no
    trace left. The random point always has that of training."""

    def inner(self, net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The images one step of eps away, and the gradient at the clean images that points there (both b c h w)."""
        clean = batch.x.clone().requires_grad_()
        with frozen(net, self.attack_bn_mode) as target:
            (grad,) = torch.autograd.grad(F.cross_entropy(target(clean), batch.y, reduction="sum"), clean)
        return (batch.x + self.threat.radius * grad.sign()).clamp(0, 1), grad

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the adversarial images, and lam times 1 - mean cosine; `adv` is what `inner` gives."""
        images, grad = adv
        ce = F.cross_entropy(net(images), batch.y, label_smoothing=batch.smoothing)
        eps = self.threat.radius
        point = (batch.x + torch.empty_like(batch.x).uniform_(-eps, eps)).requires_grad_()
        ce_there = F.cross_entropy(net(point), batch.y, reduction="sum")
        (grad_there,) = torch.autograd.grad(ce_there, point, create_graph=True)
        return {"ce": ce, "align": self.lam * (1 - mean_cosine(grad, grad_there)).to(ce)}


def mean_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Mean cosine (a float64 scalar) of the rows of `a` and `b` (b ...), over the pairs of nonzero rows; 1 if none."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    sizes = a.norm(dim=1) * b.norm(dim=1)
    angled = sizes > 0
    total = ((a * b).sum(1) / torch.where(angled, sizes, 1)).sum()
    return torch.where(angled.any(), total / angled.sum().clamp_min(1), 1)
