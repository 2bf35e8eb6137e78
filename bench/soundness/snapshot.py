"""Weights, buffers, modes and gradients of a model at one moment: what changed since, and putting it back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Snapshot:
    """A copy of all that an attack could change in `model`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [(p, p.detach().clone()) for p in model.parameters()]
        self.buffers = [(b, b.detach().clone()) for b in model.buffers()]
        self.modes = [(m, m.training) for m in model.modules()]
        self.flags = [(p, p.requires_grad) for p in model.parameters()]
        self.grads = [(p, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]

    def changes(self) -> list[str]:
        """What differs from the moment of the snapshot, in words; one read from the device."""
        found = [
            name
            for name, pairs in (("weights changed", self.parameters), ("buffers changed", self.buffers))
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
        """Put everything back, bit for bit."""
        with torch.no_grad():
            for now, then in (*self.parameters, *self.buffers):
                now.copy_(then)
        for module, mode in self.modes:
            module.training = mode
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        for parameter, grad in self.grads:
            parameter.grad = grad


def _same(now: Tensor, then: Tensor) -> Tensor:
    """Are both equal, NaN included? A scalar on the device."""
    return torch.isclose(now.detach(), then, rtol=0, atol=0, equal_nan=True).all()
