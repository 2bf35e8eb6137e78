"""Small nets trained on the embedded digits: what the tests of imported models and of their doctor share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.rng import scope
from bench.data import datasets
from bench.data import images as loading
from bench.models.common import Inputs
from bench.plugins import build_model

FACTS = datasets.KNOWN["digits"]


class NoisyInput(nn.Module):
    """A net under Gaussian noise on its input."""

    def __init__(self, net: nn.Module, sigma: float = 0.2) -> None:
        super().__init__()
        self.net, self.sigma = net, sigma

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.sigma * torch.randn_like(x))


class Unproved(Classifier):
    """A classifier of which bounds prove nothing, so that attacks try every image."""

    def decisive(self) -> None:
        return None


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, then the first 200 test images and labels."""
    found = loading.load("digits", root=Path(), device=torch.device("cpu"), test=200)
    x, y = loading.test_block(found, 0, 200)
    return loading.to_float(found.train.x), found.train.y, x, y


def mlp(width: int = 64, depth: int = 1) -> nn.Module:
    """The architecture of bench, without any training."""
    with scope(0):
        inputs = Inputs(FACTS.channels, FACTS.size, FACTS.classes, FACTS.mean, FACTS.std)
        return build_model("mlp", {"width": width, "depth": depth}, inputs)


def fit(net: nn.Module, change: Callable[[Tensor], Tensor] = lambda x: x, steps: int = 150) -> nn.Module:
    """The net trained on changed images, above 90 % right on them; in eval mode."""
    x, y, _, _ = digits()
    with scope(1):
        optimiser = torch.optim.Adam(net.parameters(), lr=5e-3)
        for step in range(steps):
            part = slice(step % 5 * 287, step % 5 * 287 + 287)
            loss = F.cross_entropy(net.train()(change(x[part])), y[part])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return net.eval()


@functools.cache
def weights() -> dict[str, Tensor]:
    """State of a trained mlp of width 64 and depth 1, the two normalization buffers among it."""
    return {name: value.clone() for name, value in fit(mlp()).state_dict().items()}
