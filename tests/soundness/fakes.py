"""False defenses: each looks robust, or is evaluated wrongly, for one reason that a check has to name.

All are built on honest nets for digits. The first column of pixels is black in every digit, so it tells a net whether,
and by how much, an image was changed: some of the nastier fakes react to that.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from honest_nets import Split
from torch import Tensor, nn

from bench.core.classifier import Classifier

Nets = dict[str, nn.Module]


class Fake(nn.Module):
    """An honest net inside, and `rule`, which makes of net and images something else."""

    def __init__(self, net: nn.Module, rule: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.rule = net, rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self.net, x)


def tripwire(x: Tensor) -> Tensor:
    """How far the black column was lifted, shape b."""
    return x[..., 0].flatten(1).amax(1)


def untouched(x: Tensor) -> Tensor:
    """Is each image made of whole gray levels, as those of the data set are? Shape b."""
    return ((255 * x) - (255 * x).round()).abs().flatten(1).amax(1) < 1e-3


def tall(mask: Tensor) -> Tensor:
    return mask.view(-1, 1)


def rounded(net: nn.Module, x: Tensor) -> Tensor:
    return net((4 * x).round() / 4)


def large_logits(net: nn.Module, x: Tensor) -> Tensor:
    return 1e4 * net(x)


def one_hot(net: nn.Module, x: Tensor) -> Tensor:
    return F.one_hot(net(x).argmax(1), 10).float()


def noisy(net: nn.Module, x: Tensor) -> Tensor:
    return net(x + 0.01 * torch.randn_like(x))


def dropout(net: nn.Module, x: Tensor) -> Tensor:
    return net(F.dropout(x, 0.2, training=True))


def softmax(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).softmax(1)


def log_softmax(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).log_softmax(1)


def nan_logits(net: nn.Module, x: Tensor) -> Tensor:
    z = net(x)
    return torch.where(tall(z.amax(1) > z.amax(1).median()), z / 0.0 * 0.0, z)


def nan_gradient(net: nn.Module, x: Tensor) -> Tensor:
    """NaN in the gradient of one pixel, by the infinite slope of a root at 0 times 0; the others are right."""
    moved = x.clone()
    moved[..., 0, 0] = x[..., 0, 0] + (0 * x[..., 0, 0]).sqrt()
    return net(moved)


def nan_off_the_data(net: nn.Module, x: Tensor) -> Tensor:
    """NaN for every image whose black column was lifted, without a trace in the gradient."""
    return net(x).masked_fill(tall(tripwire(x) > 0), float("nan"))


def cut(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).detach()


def through_numpy(net: nn.Module, x: Tensor) -> Tensor:
    return net(torch.from_numpy(x.numpy().clip(0, 1)))


def purified(net: nn.Module, x: Tensor) -> Tensor:
    """A small step towards more confidence before the prediction; gradients pass straight through the step."""
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(net(z).log_softmax(1).amax(1).sum(), z)
    return net(x + 1e-3 * grad.sign())


def purified_by_func(net: nn.Module, x: Tensor) -> Tensor:
    grad = torch.func.grad(lambda z: net(z).log_softmax(1).amax(1).sum())(x.detach())
    return net(x + 1e-3 * grad.detach().sign())


def repeated(net: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([net(x + shift) for shift in (-0.02, -0.01, 0.0, 0.01, 0.02)]).mean(0)


def divides_by_255(net: nn.Module, x: Tensor) -> Tensor:
    return net(x / 255)


def normalises_twice(net: nn.Module, x: Tensor) -> Tensor:
    return net((x - 0.5) / 0.5)


def blind_at_clean_images(net: nn.Module, x: Tensor) -> Tensor:
    """No gradient exactly at the images of the data set, an honest one next to them."""
    clean = untouched(x).view(-1, 1, 1, 1)
    return net(torch.where(clean, x.detach() + 0 * x, x))


class _Misled(torch.autograd.Function):
    """The identity. Backwards, the black column is pulled up at clean images, and down anywhere else."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        up = torch.where(untouched(x), 1.0, -1.0).view(-1, 1, 1)
        grad = grad.clone()
        grad[..., 0] = up * (grad[..., 0].abs() + 1e-6)
        return grad


def one_step_trapdoor(net: nn.Module, x: Tensor) -> Tensor:
    """Wrong wherever the black column is lifted by one amount as a whole, which gradients from elsewhere hide."""
    column = x[..., 0].flatten(1)
    sprung = (column.amin(1) > 0) & (column.amin(1) == column.amax(1))
    z = net(_Misled.apply(x))
    return torch.where(tall(sprung), -z, z)


def noise_trapdoor(net: nn.Module, x: Tensor) -> Tensor:
    """Wrong for a rare order of four black pixels, which one start in 384 hits and no gradient leads to."""
    u = x[..., 0].flatten(1)[:, :4].detach()
    sprung = (u[:, :3] > u[:, 1:]).all(1) & (u[:, 3] > 0)
    z = net(x)
    return torch.where(tall(sprung), -z, z)


class Counts(nn.Module):
    """Counts its own calls in a buffer."""

    calls: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x)


class Memory(nn.Module):
    """Sees changes of a size between `low` and `high`, and then answers from memory, without a gradient."""

    def __init__(self, net: nn.Module, low: float, high: float, memory: Split) -> None:
        super().__init__()
        self.net, self.low, self.high, self.memory = net, low, high, memory

    def forward(self, x: Tensor) -> Tensor:
        z, size = self.net(x), tripwire(x)
        seen = ((size > self.low) & (size < self.high)).nonzero().squeeze(1)
        nearest = torch.cdist(x[seen].detach().flatten(1), self.memory.x.flatten(1)).argmin(1)
        return z.index_copy(0, seen, 10.0 * F.one_hot(self.memory.y[nearest], 10))


class Stored(nn.Module):
    """Answers by the squared distances to the nearest stored image of each class; where `net` is given, only for images
    that differ from a stored one by at most `reach` in every pixel, and with `net` for all others."""

    def __init__(self, stored: Split, net: nn.Module | None = None, reach: float = 0.0) -> None:
        super().__init__()
        self.stored, self.net, self.reach = stored, net, reach

    def forward(self, x: Tensor) -> Tensor:
        rows, stored = x.flatten(1), self.stored.x.flatten(1)
        distance = rows.square().sum(1, keepdim=True) - 2 * rows @ stored.T + stored.square().sum(1)
        answer = -torch.stack([distance[:, self.stored.y == c].amin(1) for c in range(10)], dim=1)
        if self.net is None:
            return answer
        near = torch.cdist(rows.detach(), stored, p=float("inf")).amin(1) <= self.reach
        return torch.where(tall(near), answer, self.net(x))


class HiddenFeatures(nn.Module):
    """The gradient goes round the last layer: right for this head, none for any other on the same features."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net.hidden(self.net.normalise(x).flatten(1))
        way_round = F.linear(hidden, self.net.head.weight, self.net.head.bias)
        return self.net.head(hidden.detach() + 0 * hidden) + way_round - way_round.detach()


def rule(
    function: Callable[[nn.Module, Tensor], Tensor], kind: str = "standard"
) -> Callable[[Nets, Split], Classifier]:
    return lambda nets, memory: Classifier(Fake(nets[kind], function).eval())


def in_train_mode(nets: Nets, memory: Split) -> Classifier:
    return Classifier(nets["batchnorm"]).train()


class BatchStatistics(nn.Module):
    """BatchNorm that looks at the batch whatever mode it is put into."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def train(self, mode: bool = True) -> BatchStatistics:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = True
        return self


# name -> (how it is made, codes it must get with their level)
FAKES: dict[str, tuple[Callable[[Nets, Split], Classifier], dict[str, str]]] = {
    "rounded": (rule(rounded), {"C4": "U"}),
    "large logits": (rule(large_logits), {"C4": "F"}),
    "one-hot": (rule(one_hot), {"C5": "U", "C2": "F"}),
    "noise": (rule(noisy), {"C1": "U"}),
    "dropout": (rule(dropout), {"C1": "U"}),
    "softmax": (rule(softmax), {"C2": "F"}),
    "log-softmax": (rule(log_softmax), {"C2": "F"}),
    "NaN logits": (rule(nan_logits), {"C3": "X"}),
    "NaN gradient": (rule(nan_gradient), {"C3": "X"}),
    "NaN off the data": (rule(nan_off_the_data), {"C3": "X", "C29": "not checked"}),
    "cut graph": (rule(cut), {"C5": "U"}),
    "through NumPy": (rule(through_numpy), {"C5": "U"}),
    "purified": (rule(purified), {"C6": "U"}),
    "purified by torch.func": (rule(purified_by_func), {"C6": "U"}),
    "repeated": (rule(repeated), {"C6": "U"}),
    "divides by 255": (rule(divides_by_255), {"C18": "X"}),
    "normalizes twice": (rule(normalises_twice), {"C18": "X"}),
    "train mode": (in_train_mode, {"C1": "U"}),
    "batch statistics": (lambda nets, memory: Classifier(BatchStatistics(nets["batchnorm"])).eval(), {"C1": "U"}),
    "blind at clean images": (rule(blind_at_clean_images), {"C4": "U"}),
    "one-step trapdoor": (rule(one_step_trapdoor, "adversarial"), {"C7": "U"}),
    "memory of larger changes": (
        lambda nets, memory: Classifier(Memory(nets["standard"], 0.12, 0.45, memory).eval()),
        {"C8": "U"},
    ),
    "memory of the largest": (
        lambda nets, memory: Classifier(Memory(nets["standard"], 0.45, 9.0, memory).eval()),
        {"C9": "U"},
    ),
    "noise trapdoor": (rule(noise_trapdoor, "adversarial"), {"C12": "U"}),
    "counts its calls": (lambda nets, memory: Classifier(Counts(nets["standard"]).eval()), {"C17": "X"}),
    "memory of the test images": (lambda nets, memory: Classifier(Stored(memory)), {"C30": "U"}),
    "hidden features": (lambda nets, memory: Classifier(HiddenFeatures(nets["standard"]).eval()), {"C19": "U"}),
}
# each grave check has a fake of its own, which no other check reports as U or X
OWNERS = {
    "C1": "noise",
    "C3": "NaN gradient",
    "C4": "blind at clean images",
    "C5": "cut graph",
    "C6": "purified",
    "C7": "one-step trapdoor",
    "C8": "memory of larger changes",
    "C9": "memory of the largest",
    "C12": "noise trapdoor",
    "C17": "counts its calls",
    "C18": "normalizes twice",
    "C19": "hidden features",
    "C30": "memory of the test images",
}
