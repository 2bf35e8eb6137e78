"""min_w E[ CE(f(x'), y) + lam / K * ||f(x') - f(x + p)||^2 ], x' = Pi(x + p + eps * sign(grad CE(f(x + p), y)))

FGSM with prior-guided initialization (Jia et al. 2022, ECCV, arXiv 2207.08859): the one step of each image starts from
p, what the attacks on it in earlier epochs have left, and the logits at start and end of the step stay close. With g
the gradient at x + p, each visit also moves m <- g / ||g||_1 + decay m and then p <- Pi(x + p + eps sign(m)) - x.

This is FGSM-MEP, as released; with decay = 0, p is the last perturbation and the method FGSM-EP. From that code:
||g||_1 is over the whole minibatch; p is eps times random signs and m is 0 in the first epoch, and again every 40
epochs; p belongs to the image, so crops and flips do not move it; the gradient of the second term flows through both
logits, and the pass at x + p serves attack and loss, in train mode like the other: the statistics move twice a step.
Ours: x + p is clipped to [0,1] before the gradient is taken (from below 0, where most pixels of MNIST are, a step of
eps ends at 0); g is that of the true label, where the code has its soft one (60 % on the label). Its soft labels and
the paper's weight average are the recipe's `label_smoothing` and `average`; its rate drops after 91 and 95 % of
training, here at half and three quarters. fp16 is not supported: a gradient that overflows would stay in m.

p and m are float32 tensors as large as the training images, on their device and in each checkpoint: 188 MB each for
MNIST, 614 MB each for CIFAR-10; decay = 0 needs p alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from bench.core.defense import Batch, Defense, Losses, Updater


@dataclass
class FGSMPGI(Defense):
    """One step from a perturbation kept for each image. Costs 7 forward passes F an image."""

    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    cost: ClassVar[str] = "3F + 4F = 7F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16")
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "step",
        "epochs": 110,
        "batch_size": 128,
    }

    lam: Annotated[float, Ge(0)] = 10.0
    """Weight of the squared distance of the logits, a mean over classes."""
    decay: Annotated[float, Ge(0)] = 0.3
    """Share of an image's momentum that its next visit keeps."""
    reset: Annotated[int, Gt(0)] = 40
    """Epochs after which perturbations are random again and momenta 0."""

    def __post_init__(self) -> None:
        self._budget = self.threat  # of the random signs, whatever a warm-up makes of `threat`
        self._epoch = -1
        self._prior = self._momentum = torch.empty(0)  # p and m by position in the training set, as far as it was seen

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """The images x + p (b c h w), in ball and box: where the step starts."""
        self._extend(batch)
        return self.threat.project_to_image(batch.x, batch.x + self._prior[batch.index])

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy at x', and lam times the mean squared distance of the logits from those at x + p.

        `adv` holds these (b k, with their graph) and the images x'.
        """
        before, images = adv
        logits = net(images)
        ce = F.cross_entropy(logits, batch.y, label_smoothing=batch.smoothing)
        return {"ce": ce, "distance": self.lam * F.mse_loss(logits, before)}

    def step(self, net: nn.Module, updater: Updater, batch: Batch) -> Losses:
        """One update: the pass at x + p gives the step to x' and the logits that those at x' stay close to."""
        start = self.inner(net, batch).requires_grad_()
        before = net(start)
        ce = F.cross_entropy(before, batch.y, reduction="sum")
        (grad,) = torch.autograd.grad(ce, start, retain_graph=True)
        terms = self.loss(net, batch, (before, self._moved(batch, start, grad)))
        updater.descend(terms)
        self._remember(batch, start, grad)
        return terms

    def _moved(self, batch: Batch, start: Tensor, direction: Tensor) -> Tensor:
        """The images one step of eps from `start`, in ball and box."""
        return self.threat.project_to_image(batch.x, start.detach() + self.threat.radius * direction.sign())

    def _remember(self, batch: Batch, start: Tensor, grad: Tensor) -> None:
        """Put m and p of the batch where the next epoch finds them."""
        direction = grad / grad.abs().sum().clamp_min(torch.finfo(grad.dtype).tiny)
        if self.decay:
            direction = direction + self.decay * self._momentum[batch.index]
            self._momentum[batch.index] = direction
        self._prior[batch.index] = self._moved(batch, start, direction) - batch.x

    def _extend(self, batch: Batch) -> None:
        """Begin anew where an epoch demands it; random signs and no momentum for positions not seen before."""
        if batch.epoch != self._epoch and batch.epoch % self.reset == 0:
            self._prior = self._momentum = batch.x.new_empty(0)
        self._epoch = batch.epoch
        new = int(batch.index.max()) + 1 - len(self._prior)
        if new <= 0:
            return
        signs = 2 * batch.x.new_empty(new, *batch.x.shape[1:]).bernoulli_(0.5) - 1
        self._prior = torch.cat([self._prior.to(signs), self._budget.radius * signs])
        if self.decay:
            self._momentum = torch.cat([self._momentum.to(signs), torch.zeros_like(signs)])

    def state_dict(self) -> dict[str, Tensor]:
        """The epoch, and p and m of each image."""
        return {"epoch": torch.tensor(self._epoch), "prior": self._prior, "momentum": self._momentum}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        self._epoch, self._prior, self._momentum = int(state["epoch"]), state["prior"], state["momentum"]
