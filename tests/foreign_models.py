"""Models as users write them, each with one oddity. Their weights solve a ridge regression of the digits' classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

P = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def linear(k: int = 10) -> nn.Sequential:
    digits = load_digits()
    x, y = torch.tensor(digits.images[:1437] / 16).flatten(1), torch.tensor(digits.target[:1437])
    x, y = torch.cat([x, torch.ones(len(x), 1)], 1)[y < k], y[y < k]
    w = torch.linalg.solve(x.T @ x + torch.eye(65), x.T @ (F.one_hot(y, k).double() - 1 / k))
    layer = nn.Linear(64, k)
    layer.load_state_dict({"weight": 20 * w[:64].T, "bias": 20 * w[64]})
    return nn.Sequential(nn.Flatten(), layer)


class Odd(nn.Module):
    """Calls a function with the linear net and the images."""

    def __init__(self, does: Callable[[nn.Sequential, Tensor], Tensor], k: int = 10) -> None:
        super().__init__()
        self.net, self.does = linear(k), does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self.net, x)


class Tutorial(nn.Module):
    """A convolution, then `view` of a fixed shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(96, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.max_pool2d(torch.relu(self.conv(x)), 2).view(-1, 96))
        return logits


class Raw(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(x.view(x.size(0), -1))
        return logits


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.draws = linear(), np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x + torch.from_numpy(self.draws.normal(0, 0.1, x.shape)).float())
        return logits


def reseeds() -> nn.Module:
    def does(net: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return net(x + 0.02 * torch.randn(1, 1, 8, 8))

    return Odd(does)


def keeps() -> nn.Module:
    return Odd(lambda net, x: net(x + 0.02 * P))


def in_place() -> nn.Module:
    def does(net: nn.Module, x: Tensor) -> Tensor:
        x -= 0.5
        x /= 0.5
        return net((x + 1) / 2)

    return Odd(does)


def relu_first() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), linear())


def slope_of_nan() -> nn.Module:
    return Odd(lambda net, x: net(x) + 0 * (x - x.detach()).flatten(1).square().sum(1, keepdim=True).sqrt())


def half() -> nn.Module:
    return Odd(lambda net, x: net(x).half())


def half_up() -> nn.Module:
    return Odd(lambda net, x: net(x).half().float())


def two() -> nn.Module:
    return linear(2)


def three() -> nn.Module:
    return linear(3)


def swapped_2() -> nn.Module:
    return Odd(lambda net, x: net(x).flip(1), 2)


def dark_2() -> nn.Module:
    return Odd(lambda net, x: net(x / 255), 2)


def offset_2() -> nn.Module:
    return Odd(lambda net, x: net(x) + torch.tensor([20.0, 0.0]), 2)


def purifies() -> nn.Module:
    def does(net: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            d = torch.zeros_like(x, requires_grad=True)
            z = net(x.detach() + d)
            F.cross_entropy(z, z.argmax(1)).backward()
        assert d.grad is not None
        return net(x - 0.02 * d.grad.sign())

    return Odd(does)


def adapts() -> nn.Module:
    def does(net: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            (g,) = torch.autograd.grad(net(x.detach()).logsumexp(1).mean(), [net[1].bias])  # type: ignore[index]
        return net(x) - 0 * g

    return Odd(does)


def one_by_one() -> nn.Module:
    return Odd(lambda net, x: torch.cat([net(each[None]) for each in x]))


def iterates() -> nn.Module:
    def does(net: nn.Module, x: Tensor) -> Tensor:
        for _ in range(4):
            x = (x + 1e-4 * net(x).amax(1)[:, None, None, None]).clamp(0, 1)
        return net(x)

    return Odd(does)


def scripted() -> nn.Module:
    return torch.jit.script(linear())


def traced() -> nn.Module:
    return torch.jit.trace(linear(), torch.zeros(2, 1, 8, 8))


def compiled() -> nn.Module:
    return torch.compile(linear(), backend="eager")


def exported() -> nn.Module:
    return torch.export.export(linear(), (torch.zeros(2, 1, 8, 8),)).module()


def quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(linear(), {nn.Linear})


def drawn_when_built() -> nn.Module:
    mix = torch.eye(64) + 0.002 * torch.from_numpy(np.random.default_rng().standard_normal((64, 64))).float()
    return Odd(lambda net, x: net(x.flatten(1) @ mix))


def sigmoid() -> nn.Module:
    return Odd(lambda net, x: net(x).sigmoid())
