"""min_w E[ max_{x' in B(x, eps)} CE(f(x'), y) ]

PGD adversarial training (Madry et al. 2018, arXiv 1706.06083): the inner maximum by projected gradient ascent from a
uniform random start, the weights trained on adversarial images alone.

Defaults and `recipe` follow Rice et al. (2020, arXiv 2002.11569): 10 steps of eps / 4 (2/255 at 8/255), the network in
train mode during the attack, so that batch statistics are used and each attack step also moves the running ones; their
L2 step is 15/128 of eps. Madry's MNIST runs took 40 steps of eps / 30, his CIFAR-10 model decay 2e-4. Training on a
mixture of clean and adversarial images is another method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from bench.core.classifier import BatchNormMode, frozen
from bench.core.defense import Batch, Defense, Losses
from bench.core.pgd import Start, ascend, attack_loss, check_reach


@dataclass
class PGDAT(Defense):
    """Adversarial training. Costs 2 steps + 3 forward passes F an image."""

    uses_threat: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("Linf", "L2")
    predictor: ClassVar[str] = "deterministic"
    cost: ClassVar[str] = "(2 steps + 3) F = 23F"
    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: a plain differentiable net is deployed"
    revision: ClassVar[int] = 1
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "step",
        "epochs": 200,
        "batch_size": 128,
    }
    test_settings: ClassVar[dict[str, Any]] = {"steps": 2, "rel_step_size": 0.5}

    steps: Annotated[int, Gt(0)] = 10
    """Gradient steps of the inner maximisation."""
    rel_step_size: Annotated[float, Gt(0)] = 0.25
    """Step size in units of eps."""
    start: Start = "uniform"
    """First iterate: uniform in the ball, 0.001 N(0,1) around the image, or the image itself."""
    attack_bn_mode: BatchNormMode = "train"
    """BatchNorm during the attack: running statistics (eval), batch statistics (train), or these with no trace left."""

    def __post_init__(self) -> None:
        check_reach(self.steps, self.rel_step_size)

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """Adversarial images: the last iterate of ascent on cross-entropy."""
        objective = attack_loss("ce", batch.y)
        with frozen(net, self.attack_bn_mode) as target:
            return ascend(
                lambda x: objective(target(x)),
                batch.x,
                self.threat,
                steps=self.steps,
                rel_step_size=self.rel_step_size,
                start=self.start,
            )

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the adversarial images `adv`."""
        return {"ce": F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)}
