"""Weights as variables: the weights of layers, shifts that are undone bit for bit, and balls around weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

Shifts = Sequence[tuple[Tensor, Tensor]]  # weights and what is added to each


def layer_weights(net: nn.Module, parametrized: bool = False) -> list[nn.Parameter]:
    """The weight tensors of convolutions and linear layers, each once: chosen by module type, so no BatchNorm scale
    and no bias is among them. A layer with parametrized weights (noise) is left out, or with `parametrized` represented
    by the weights without the noise."""
    found: dict[int, nn.Parameter] = {}
    for module in net.modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            weight = module._parameters.get("weight")
            if parametrized and parametrize.is_parametrized(module, "weight"):
                weight = module.parametrizations.weight.original  # type: ignore[union-attr,assignment]
            if weight is not None:
                found[id(weight)] = weight
    return list(found.values())


@contextmanager
def shifted(shifts: Shifts) -> Iterator[None]:
    """Inside, each weight w of the pairs (w, v) is w + v, in place: no copy of the net, optimizer states are unchanged.

    Afterwards w is its saved value plus what was added to it inside (an optimizer step). A value that did not change
    inside is restored bit for bit, which subtracting v would not do, also where w + v is not finite.
    """
    with torch.no_grad():
        saved = [weight.detach().clone() for weight, _ in shifts]
        for weight, shift in shifts:
            weight.add_(shift)
        moved = [weight.detach().clone() for weight, _ in shifts]
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), before, at in zip(shifts, saved, moved, strict=True):
                same = (weight == at) | (weight.isnan() & at.isnan())
                weight.copy_(torch.where(same, before, before + (weight - at)))


def uphill(weights: Sequence[Tensor], grads: Sequence[Tensor | None], gamma: float) -> list[tuple[Tensor, Tensor]]:
    """Pairs (w, v) with v along the gradient of w and ||v|| = gamma ||w||, for each weight that has a gradient."""
    return [
        (weight, grad * (gamma * weight.detach().norm() / (grad.norm() + 1e-20)))
        for weight, grad in zip(weights, grads, strict=True)
        if grad is not None
    ]


def within(weight: Tensor, shift: Tensor, gamma: float) -> Tensor:
    """The nearest shift v with ||v|| <= gamma ||w||."""
    return shift * (gamma * weight.detach().norm() / (shift.norm() + 1e-20)).clamp_max(1.0)
