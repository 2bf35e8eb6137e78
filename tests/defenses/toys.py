"""A small float64 net with a head, its batch, an updater, and the cost of a step in forward passes: shared here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.core.defense import Batch, Defense, Losses
from bench.core.epsilon import Epsilon
from bench.core.threat import Norm, Threat
from bench.training.cost import profile_step
from defenses.standard import Standard

NONE = Threat("Linf", Epsilon(0))


def threat(norm: Norm = "Linf", eps: str = "0.05") -> Threat:
    return Threat(norm, Epsilon(eps))


class Net(nn.Module):
    """Convolutions, BatchNorm on demand, a smooth activation, a head. The first layer is a small share of the work."""

    def __init__(self, batch_norm: bool, classes: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3) if batch_norm else nn.Identity()
        self.second = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8 * 36, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).tanh()).tanh().flatten(1)


def net(batch_norm: bool = False, classes: int = 4) -> Net:
    torch.manual_seed(0)
    made = Net(batch_norm, classes).double()
    with torch.no_grad():
        made.head.weight *= 5  # margins of some size
    return made.train()


def batch(count: int = 10, low: float = 0.0, high: float = 1.0, epoch: int = 1, progress: float = 0.5) -> Batch:
    torch.manual_seed(1)
    x = low + (high - low) * torch.rand(count, 1, 6, 6, dtype=torch.float64)
    return Batch(x, torch.arange(count) % 4, torch.arange(count), epoch, progress)


class Descent:
    """An Updater with SGD and momentum."""

    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        self.steps = 0

    def descend(self, terms: Losses) -> None:
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()
        self.steps += 1


def weights_after(defense: Defense, steps: int = 3, batch_norm: bool = False, **kinds: Any) -> list[Tensor]:
    model, data = net(batch_norm), batch(**kinds)
    updater = Descent(model)
    torch.manual_seed(2)
    for _ in range(steps):
        defense.step(model, updater, data)
    return [parameter.detach().clone() for parameter in model.parameters()]


def plain_weights(batch_norm: bool = False, **kinds: Any) -> list[Tensor]:
    return weights_after(Standard(NONE), batch_norm=batch_norm, **kinds)


def assert_same(found: list[Tensor], expected: list[Tensor], atol: float = 1e-10) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


def differ(found: list[Tensor], expected: list[Tensor]) -> bool:
    return any(bool((a - b).abs().max() > 1e-6) for a, b in zip(found, expected, strict=True))


def gradients(total: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(model.parameters())))


def assert_loss(terms: Losses, expected: Tensor, model: nn.Module, reference: nn.Module | None = None) -> None:
    """The sum of the terms and its gradient in every parameter equal the reference's to 1e-10."""
    total = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
    assert_same(gradients(total, model), gradients(expected, reference or model))


def dual_step(norm: Norm, grad: Tensor) -> Tensor:
    """argmax <delta, grad> over the unit ball, image by image, as a loop."""
    rows = []
    for g in grad:
        if norm == "Linf":
            rows.append(g.sign())
        elif norm == "L2":
            rows.append(g / g.square().sum().sqrt())
        else:
            flat = torch.zeros(g.numel(), dtype=g.dtype)
            place = int(g.flatten().abs().argmax())
            flat[place] = g.flatten()[place].sign()
            rows.append(flat.view_as(g))
    return torch.stack(rows)


def cost(defense: Defense, batch_norm: bool = False, data: Batch | None = None) -> tuple[float, float]:
    """Passes of one step in units of F (a backward pass to the input is 1, to weights and input 2), by hooks; and the
    work of convolutions and matrix products, by the counter of the training loop: less, as the first layer needs no
    gradient at its input where only weights learn."""
    model, data = net(batch_norm), data or batch()
    units = 0.0

    def forward(module: nn.Module, args: Any, logits: Tensor) -> None:
        nonlocal units
        units += len(args[0])
        weights = any(p.requires_grad for p in module.parameters())
        if logits.requires_grad:
            logits.register_hook(lambda grad: backward(2 * len(grad) if weights else len(grad)))

    def backward(count: int) -> None:
        nonlocal units
        units += count

    handle = model.register_forward_hook(forward)
    updater: Any = Descent(model)
    _, counted = profile_step(defense, model, updater, data)
    handle.remove()
    return units / len(data.x) - 1, counted["work_per_image_f"]  # the counter makes one pass of its own


def assert_leaves_no_trace(run: Callable[[nn.Module], Any]) -> None:
    """An attack leaves weights, BatchNorm buffers, modes, flags and .grad alone."""
    model = net(batch_norm=True)
    model.norm.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    run(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
