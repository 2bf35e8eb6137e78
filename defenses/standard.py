"""min_w E[ CE(f(x), y) ]

Standard training, empirical risk minimization (Vapnik 1991): cross-entropy on clean images, the baseline of every
ratio in the tables.

Recipe of the reference runs: SGD with momentum 0.9, learning rate 0.1 dropped tenfold at 50 % and 75 %, weight decay
5e-4, crop and flip. An undefended network must come out near 0 % under attack, which makes it a test of the attacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import nn

from bench.core.defense import Batch, Defense, Losses


@dataclass
class Standard(Defense):
    """No defense. Costs 3 forward passes F an image."""

    uses_threat: ClassVar[bool] = False
    cost: ClassVar[str] = "3F"
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

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the clean images."""
        return {"ce": F.cross_entropy(net(batch.x), batch.y, label_smoothing=batch.smoothing)}
