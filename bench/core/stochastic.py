"""Stochastic models: the noise sources of a network, the classifier that averages draws, and accuracy over draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bench.core.classifier import Classifier, predicted
from bench.core.rng import normal_like, scope, seed

DRAWS = 100  # noise draws that score an image; as many others select between attacks


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
    """Noise of the network itself: on the input, the output or the weights of `layer`, and its source."""

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
    """The noise of the network itself: every input, output or weight with a noise source, in module order."""
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


class Randomized(Classifier):
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
        return predicted(total)


@torch.no_grad()
def class_counts(model: nn.Module, x: Tensor, draws: int) -> Tensor:
    """How many of `draws` forward passes predict each class, int64 `b k`; a pass that gives NaN predicts none."""
    passes = (model(x) for _ in range(draws))
    return torch.stack([F.one_hot(predicted(logits) + 1, logits.shape[1] + 1)[:, 1:] for logits in passes]).sum(0)


def wrong_draws(model: nn.Module, x: Tensor, y: Tensor, draws: int) -> Tensor:
    """In how many of `draws` fresh passes each image is misclassified, int64 of shape b."""
    return draws - class_counts(model, x, draws).gather(1, y[:, None]).squeeze(1)


def draw_columns(model: nn.Module, x: Tensor, y: Tensor, seed_: int) -> dict[str, Tensor]:
    """Accuracy of a stochastic model on images `x` over fresh noise draws that no attack has seen.

    `select`: share of DRAWS draws that are correct, by which the worst case selects between attacks. On as many
    *other* draws, so that the selection is unbiased: `share` (of correct draws), `vote` (the majority is correct) and
    `always` (all are).
    """
    with scope(seed(seed_, "select")):
        select = class_counts(model, x, DRAWS)
    with scope(seed(seed_, "single")):
        counts = class_counts(model, x, DRAWS)
    hits = counts.gather(1, y[:, None]).squeeze(1)
    return {
        "select": select.gather(1, y[:, None]).squeeze(1).float() / DRAWS,
        "share": hits.float() / DRAWS,
        "vote": (counts.argmax(1) == y) & (hits > 0),
        "always": hits == DRAWS,
    }
