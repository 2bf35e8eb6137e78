"""Weights as variables: shift them and back bit for bit, noise and directions of their size, what reaches the head."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from bench.core.rng import normal_like

NoiseKind = Literal["gaussian", "uniform", "laplace"]
Shifts = Sequence[tuple[Tensor, Tensor]]  # weights and what is added to each


def layer_weights(net: nn.Module) -> list[nn.Parameter]:
    """The weight tensors of convolutions and linear layers, each once: chosen by module type, so no BatchNorm scale
    and no bias is among them."""
    found = {
        id(weight): weight
        for module in net.modules()
        if isinstance(module, (_ConvNd, nn.Linear)) and (weight := module._parameters.get("weight")) is not None
    }
    return list(found.values())


def noiseless_weights(net: nn.Module) -> list[nn.Parameter]:
    """`layer_weights`, and of a layer whose weights are noisy (a parametrization) those that the noise is added to."""
    found: dict[int, nn.Parameter] = {}
    for module in net.modules():
        if isinstance(module, (_ConvNd, nn.Linear)):
            noisy = parametrize.is_parametrized(module, "weight")
            weight = module.parametrizations.weight.original if noisy else module.weight  # type: ignore[union-attr]
            found[id(weight)] = weight  # type: ignore[assignment]
    return list(found.values())


@contextmanager
def shifted(shifts: Shifts) -> Iterator[None]:
    """Inside, each weight w of the pairs (w, v) is w + v, in place: no copy of the net, optimizer states are unchanged.

    Afterwards the shift is taken back: w gets its saved value plus what happened to it inside (an optimizer step), so
    without a step it is the saved value bit for bit, which subtracting v would not give.
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
                weight.copy_(before + (weight - at))


@contextmanager
def visiting(shifts: Shifts) -> Iterator[None]:
    """As `shifted`, for evaluation only: w always gets its saved value back, also where w + v is not finite."""
    with torch.no_grad():
        saved = [weight.detach().clone() for weight, _ in shifts]
        for weight, shift in shifts:
            weight.add_(shift)
    try:
        yield
    finally:
        with torch.no_grad():
            for (weight, _), before in zip(shifts, saved, strict=True):
                weight.copy_(before)


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


def filter_direction(weight: Tensor) -> Tensor:
    """A Gaussian direction whose every filter has the norm of that filter of `weight` (Li et al. 2018).

    A filter is what makes one output: a slice along the first axis. Where it is 0 so is the direction.
    """
    drawn = normal_like(weight.detach())
    sizes = weight.detach().flatten(1).norm(dim=1) / (drawn.flatten(1).norm(dim=1) + 1e-20)
    return drawn * sizes.view(-1, *[1] * (weight.dim() - 1))


def root_mean_square(weight: Tensor) -> Tensor:
    """Root of the mean square of a tensor, a scalar without a graph: the size that relative noise refers to."""
    return weight.detach().square().mean().sqrt()


def noise_like(weight: Tensor, kind: NoiseKind = "gaussian") -> Tensor:
    """Independent draws of mean 0 and standard deviation 1 in the shape of `weight`."""
    with torch.no_grad():
        if kind == "gaussian":
            return torch.randn_like(weight)
        if kind == "uniform":
            return torch.empty_like(weight).uniform_(-math.sqrt(3), math.sqrt(3))
        # the difference of two exponentials is Laplace with variance 2
        return (torch.empty_like(weight).exponential_() - torch.empty_like(weight).exponential_()) / math.sqrt(2)


def head(net: nn.Module) -> nn.Linear:
    """The last linear layer of the net. Raises ValueError where `net.head` is none."""
    found = getattr(net, "head", None)
    if not isinstance(found, nn.Linear):
        raise ValueError(f"{type(net).__name__} has no linear layer 'head', found {type(found).__name__}")
    return found


@contextmanager
def head_inputs(net: nn.Module) -> Iterator[list[Tensor]]:
    """While open, collects the features (b p, with their graph) that reach `net.head`, one tensor a forward pass.

    Features of a 16-bit pass are given in fp32: formulas on them multiply them with fp32 logits.
    """
    seen: list[Tensor] = []

    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        h = args[0]
        seen.append(h.float() if h.dtype in (torch.bfloat16, torch.float16) else h)

    handle = head(net).register_forward_pre_hook(collect)
    try:
        yield seen
    finally:
        handle.remove()
