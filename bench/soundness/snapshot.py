"""A snapshot of the weights, buffers, modes and gradients of a model: compare with it, restore it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Snapshot:
    """A copy of all state of `model` that an attack could change."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, list[tuple[Tensor, Tensor]]] = {
            "weights": [(p, p.detach().clone()) for p in model.parameters()],
            "buffers": [(b, b.detach().clone()) for b in model.buffers()],
        }
        self.modes = [(m, m.training) for m in model.modules()]
        self.flags = [(p, p.requires_grad) for p in model.parameters()]
        self.grads = [(p, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]

    def changes(self) -> list[str]:
        """Descriptions of what differs from the snapshot; one transfer from the device."""
        found = [
            f"{name} changed"
            for name, pairs in self.tensors.items()
            if pairs and not bool(torch.stack([_same(now, then) for now, then in pairs]).all())
        ]
        if any(module.training != mode for module, mode in self.modes):
            found.append("train or eval mode changed")
        if any(p.requires_grad != flag for p, flag in self.flags):
            found.append("requires_grad changed")
        if any((p.grad is None) != (then is None) for p, then in self.grads):
            found.append("gradients left on weights")
        elif not all(bool(_same(p.grad, then)) for p, then in self.grads if then is not None and p.grad is not None):
            found.append("gradients on weights changed")
        return found

    def restore(self) -> None:
        """Restore everything, bit for bit."""
        with torch.no_grad():
            for pairs in self.tensors.values():
                for now, then in pairs:
                    now.copy_(then)
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        for parameter, grad in self.grads:
            parameter.grad = grad


def _same(now: Tensor, then: Tensor) -> Tensor:
    """Whether both are equal, NaN included, as a scalar on the device."""
    return torch.isclose(now.detach(), then, rtol=0, atol=0, equal_nan=True).all()
