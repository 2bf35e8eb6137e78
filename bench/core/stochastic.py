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
    """Base of noise sources inside a network. `enabled` is independent of train or eval mode, which attacks change."""

    enabled: bool = True

    @property
    def sigma(self) -> float | None:
        """Standard deviation, if it is one number for every signal and batch, else None."""
        return None

    def std(self, signal: Tensor) -> Tensor:
        """Standard deviation of the (Gaussian, independent) noise on `signal`; broadcasts to its shape."""
        raise NotImplementedError(f"{type(self).__name__} must define std")

    def forward(self, signal: Tensor) -> Tensor:
        """The signal with one fresh noise draw, or the signal itself if disabled."""
        return signal + self.std(signal) * normal_like(signal) if self.enabled else signal

    def attach(self, layer: nn.Module, kind: Literal["input", "output"] = "input") -> None:
        """Add this noise to the input or output of `layer` in every forward pass. The source becomes its submodule
        `noise_input` or `noise_output`."""
        layer.register_module(f"noise_{kind}", self)
        if kind == "input":
            layer.register_forward_pre_hook(_on_input)
        else:
            layer.register_forward_hook(_on_output)


class InputNoise(NoiseSource):
    """Noise N(0, sigma^2) of constant sigma."""

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
    """Every place where the network draws noise, in module order, as the closed-form attack needs it."""
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
    """Context in which every noise source of the network is disabled; their state is restored afterwards."""
    saved = [(source, source.enabled) for source in net.modules() if isinstance(source, NoiseSource)]
    try:
        for source, _ in saved:
            source.enabled = False
        yield
    finally:
        for source, enabled in saved:
            source.enabled = enabled


class Randomised(Classifier):
    """A network with its own noise: `forward` is one draw, `predict` the argmax of the mean softmax over `draws`."""

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
