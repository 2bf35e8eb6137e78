"""The toy network, images and budgets on which plug-ins are checked, and comparisons of states."""

import torch
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.rng import scope
from bench.core.smoothing import Smoothed
from bench.core.stochastic import InputNoise, Randomized
from bench.core.threat import Norm, Threat

CLASSES, CHANNELS, SIZE = 5, 1, 8
BUDGET: dict[Norm, Epsilon] = {"Linf": Epsilon("8/255"), "L2": Epsilon("0.3"), "L1": Epsilon("1")}


class Toy(nn.Module):
    """A small network with a convolution, BatchNorm and a linear `head`; no parameter is dead (no bias before BN)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.flat = nn.Flatten()
        self.head = nn.Linear(6 * (SIZE // 2) ** 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits `b 5` of images `b 1 8 8`."""
        logits: Tensor = self.head(self.flat(self.pool(self.relu(self.norm(self.conv(x))))))
        return logits


def threat(norm: Norm, scale: int = 1) -> Threat:
    """The budget of checks in this norm, `scale` times."""
    return Threat(norm, Epsilon(BUDGET[norm] * scale))


def images(count: int = 12) -> tuple[Tensor, Tensor]:
    """Images `n 1 8 8` in [0,1] and labels; the same ones each time."""
    with scope(1):
        x = torch.rand(count, CHANNELS, SIZE, SIZE)
        x[:, :, :2] = 0  # faulty projections fail at the bounds of the pixel box
        return x, torch.arange(count) % CLASSES


def modes(net: nn.Module) -> list[tuple[str, bool]]:
    """Training mode of every module and gradient flag of every parameter."""
    return [
        *((name, module.training) for name, module in net.named_modules()),
        *((name, parameter.requires_grad) for name, parameter in net.named_parameters()),
    ]


def copy(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers as they are now."""
    return {name: value.clone() for name, value in net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> str | None:
    """None if both states are equal bit for bit, else the names that differ."""
    if one.keys() != other.keys():
        return f"tensors {sorted(one.keys() ^ other.keys())} are in one state only"
    changed = [name for name, value in one.items() if not torch.equal(value, other[name])]
    return f"{', '.join(changed)} differ" if changed else None


def toy_model(kind: str) -> Classifier:
    """A toy model in eval mode, except for its BatchNorm layer: an attack has to set and restore the mode itself."""
    with scope(5):
        net = Toy()
        net(torch.rand(64, CHANNELS, SIZE, SIZE))  # running statistics
    net.eval().norm.train()
    if kind == "smoothed":
        return Smoothed(net, sigma=0.1, n_vote=20)
    if kind == "randomised":
        InputNoise(0.1).attach(net.conv)
        return Randomized(net, draws=5)
    return Classifier(net)
