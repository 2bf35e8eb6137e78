"""Networks that stay random when they are deployed: their noise sources, and the classifier that averages draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.core.classifier import Classifier
from bench.core.rng import normal_like


class NoiseSource(nn.Module):
    """Base of what draws noise inside a net. `enabled` is a switch of its own: attack libraries force eval mode."""

    enabled: bool = True

    @property
    def sigma(self) -> float | None:
        """Standard deviation where it is one number whatever the signal and the batch, else None."""
        return None

    def std(self, signal: Tensor) -> Tensor:
        """Standard deviation of the (Gaussian, independent) noise on `signal`; broadcasts to its shape."""
        raise NotImplementedError(f"{type(self).__name__} must define std")

    def forward(self, signal: Tensor) -> Tensor:
        """The signal under one fresh draw, or the signal itself where switched off."""
        return signal + self.std(signal) * normal_like(signal) if self.enabled else signal

    def attach(self, layer: nn.Module, kind: Literal["input", "output"] = "input") -> None:
        """Let every forward pass of `layer` put this noise on what enters it, or on what it puts out. The source
        becomes the layer's child `noise_input` or `noise_output`."""
        layer.register_module(f"noise_{kind}", self)
        if kind == "input":
            layer.register_forward_pre_hook(_on_input)
        else:
            layer.register_forward_hook(_on_output)


class InputNoise(NoiseSource):
    """Noise N(0, sigma^2), the same everywhere."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self._sigma = sigma

    @property
    def sigma(self) -> float:
        """Its standard deviation."""
        return self._sigma

    def std(self, signal: Tensor) -> Tensor:
        """sigma, whatever the signal."""
        return signal.new_full((), self.sigma)  # a fill on the device, no copy from the host


# functions of the module, not closures: a copy of the net must draw from its own sources
def _on_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.noise_input(args[0]), *args[1:])  # type: ignore[operator]


def _on_output(layer: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    noisy: Tensor = layer.noise_output(out)  # type: ignore[operator]
    return noisy


class OwnNoise(NamedTuple):
    """Where a net is noisy: on what enters `layer` ("input"), on what it puts out ("output") or on its weights
    ("weight"), and what draws it."""

    layer: nn.Module
    kind: Literal["input", "output", "weight"]
    source: NoiseSource

    @property
    def weight(self) -> Tensor:
        """The layer's weights without noise."""
        if self.kind == "weight":
            return self.layer.parametrizations.weight.original  # type: ignore[union-attr,return-value]
        return self.layer.weight  # type: ignore[return-value]


def noise_sites(net: nn.Module) -> list[OwnNoise]:
    """Every place where the net draws noise, in module order: what an attack in closed form has to know."""
    sites = list[OwnNoise]()
    for layer in net.modules():
        for kind in ("input", "output"):
            source = getattr(layer, f"noise_{kind}", None)
            sites += [OwnNoise(layer, kind, source)] if isinstance(source, NoiseSource) else []  # type: ignore[arg-type]
        if parametrize.is_parametrized(layer, "weight"):
            found = layer.parametrizations.weight  # type: ignore[union-attr]
            sites += [OwnNoise(layer, "weight", s) for s in found if isinstance(s, NoiseSource)]  # type: ignore[union-attr]
    return sites


@contextmanager
def noise_off(net: nn.Module) -> Iterator[None]:
    """Inside, no noise source of the net draws; each switch is as it was afterwards."""
    saved = [(source, source.enabled) for source in net.modules() if isinstance(source, NoiseSource)]
    try:
        for source, _ in saved:
            source.enabled = False
        yield
    finally:
        for source, enabled in saved:
            source.enabled = enabled


class Randomised(Classifier):
    """A net with noise of its own: `forward` is one draw, `predict` the argmax of the mean softmax over `draws`."""

    stochastic = True

    def __init__(self, net: nn.Module, draws: int) -> None:
        super().__init__(net)
        if draws < 1:
            raise ValueError(f"expected at least one draw, got {draws}")
        self.draws = draws

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Labels of shape b; with one draw the argmax of that draw."""
        total = self(x).softmax(1)
        for _ in range(self.draws - 1):
            total += self(x).softmax(1)
        return total.argmax(1)
