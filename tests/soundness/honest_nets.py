"""Small honest networks on scikit-learn's digits, trained in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.classifier import frozen
from bench.core.epsilon import Epsilon
from bench.core.pgd import ascend
from bench.core.rng import scope
from bench.core.threat import Threat
from bench.models import mlp
from bench.models.common import Inputs

DIGITS = Inputs(1, 8, 10, (0.0,), (1.0,))
EPS = Epsilon("0.1")


class Split(NamedTuple):
    """Digits in [0,1]: the first column of pixels is black in every image."""

    x: Tensor
    y: Tensor


class ConvBN(nn.Module):
    """Two convolutions with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(x))).flatten(1))


def trained(kind: str, train: Split) -> nn.Module:
    """An honest net in eval mode: "standard" and "adversarial" (5 steps at eps 0.1) MLPs, "batchnorm" a small CNN."""
    with scope(7):
        net: nn.Module = ConvBN() if kind == "batchnorm" else mlp.build(DIGITS, width=64, depth=2)
        optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
        threat = Threat("Linf", EPS)
        for _ in range(40 if kind == "adversarial" else 20):
            for rows in torch.randperm(len(train.x)).split(64):
                x, y = train.x[rows], train.y[rows]
                if kind == "adversarial":
                    with frozen(net) as target:
                        x = ascend(_loss(target, y), x, threat, steps=5, rel_step_size=0.25)
                optimiser.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimiser.step()
    for parameter in net.parameters():
        parameter.grad = None
    return net.eval()


def _loss(net: nn.Module, y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(net(x), y, reduction="none")
