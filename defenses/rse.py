"""min_w E_n[ CE(f_n(x), y) ], n ~ N(0, s^2) before every convolution; deployed as argmax of E_n[softmax f_n(x)]

Random self-ensemble (Liu et al. 2018, arXiv 1712.00673): Gaussian noise before every convolution, in training and at
prediction, which averages the softmax of several draws. No adversarial examples.

The first noise (0.2) is added to the image in [0,1], before normalization, the others (0.1) to what enters each further
convolution, in module order. A net without convolutions has them before its linear layers instead. The noise has its
own switch and does not follow train or eval mode. An earlier public layer of the same author, which adds noise after
the convolution and in training only, is not this method. 10 draws at prediction are our choice. The released schedule
(80, 60, 40 and 20 epochs at rates falling tenfold, each with a new optimizer) becomes 200 epochs of the step schedule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import nn

from bench.core.defense import Batch, Defense, Losses
from bench.core.stochastic import InputNoise, Randomized


@dataclass
class RSE(Defense):
    """Noise before every convolution. Costs 3 forward passes F an image in training, n_draws at prediction."""

    uses_threat: ClassVar[bool] = False
    predictor: ClassVar[str] = "randomised"
    cost: ClassVar[str] = "3F"
    adaptive_attacks: ClassVar[str] = "closed_form, eot"
    revision: ClassVar[int] = 2
    supports_recipe: ClassVar[tuple[str, ...]] = ("label_smoothing", "bf16", "fp16")
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.01,
        "weight_decay": 5e-4,
        "schedule": "step",
        "epochs": 200,
    }
    test_settings: ClassVar[dict[str, Any]] = {"n_draws": 2}

    sigma_init: Annotated[float, Ge(0)] = 0.2
    """Standard deviation of the noise on the image, in pixel units ([0,1])."""
    sigma_inner: Annotated[float, Ge(0)] = 0.1
    """Standard deviation of the noise before each further convolution, in units of its input."""
    n_draws: Annotated[int, Gt(0)] = 10
    """Draws of the deployed prediction."""

    def wrap(self, net: nn.Module) -> nn.Module:
        """The same net with noise sources (no parameters) at its input and at each layer but the first."""
        layers: list[nn.Module] = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        layers = layers or [m for m in net.modules() if isinstance(m, nn.Linear)]
        InputNoise(self.sigma_init).attach(net)
        for layer in layers[1:]:
            InputNoise(self.sigma_inner).attach(layer)
        return net

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy of one noisy pass."""
        return {"ce": F.cross_entropy(net(batch.x), batch.y, label_smoothing=batch.smoothing)}

    def deploy(self, net: nn.Module) -> Randomized:
        """The noisy net, which averages the softmax of n_draws passes."""
        return Randomized(net, self.n_draws)
