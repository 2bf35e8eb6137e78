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
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from bench.core.adversarial_training import AdversarialTraining
from bench.core.classifier import BatchNormMode
from bench.core.defense import Batch, Losses


@dataclass
class PGDAT(AdversarialTraining):
    """Adversarial training. Costs 2 steps + 3 forward passes F an image."""

    cost: ClassVar[str] = "(2 steps + 3) F = 23F"
    revision: ClassVar[int] = 1
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "step",
        "epochs": 200,
        "batch_size": 128,
    }

    attack_bn_mode: BatchNormMode = "train"
    """BatchNorm during the attack: running statistics (eval), batch statistics (train), or these with no trace left."""

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the adversarial images `adv`."""
        return {"ce": F.cross_entropy(net(adv), batch.y, label_smoothing=batch.smoothing)}
