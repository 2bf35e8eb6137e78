"""What `rat`, `rat_sampled` and `rat_release` share: noise on the weights, and the features of the last layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor, nn

from bench.core.weights import layer_weights, shifted
from defenses.trades import TRADES

NoiseKind = Literal["gaussian", "uniform", "laplace"]


@dataclass
class RandomizedTRADES(TRADES):
    """Base of the readings of randomized adversarial training (Jin et al. 2023, CVPR, arXiv 2303.10653)."""

    adaptive_attacks: ClassVar[str] = "standard attacks are adaptive: its weights are perturbed in training only"
    recipe: ClassVar[dict[str, Any]] = {
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 5e-4,
        "schedule": "step",
        "epochs": 200,
        "batch_size": 128,
    }

    rel_step_size: Annotated[float, Gt(0)] = 0.25
    """Step size in units of eps."""

    def check(self, net: nn.Module, x: Tensor, classes: int) -> None:
        """The formulas are those of a last layer that is linear."""
        head(net)


def root_mean_square(weight: Tensor) -> Tensor:
    """Root of the mean square of a tensor, a scalar without a graph: the unit of relative noise."""
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


@contextmanager
def noisy_layers(net: nn.Module, sigma: float, kind: NoiseKind) -> Iterator[None]:
    """While open, the weights of all convolutions and linear layers carry one draw of noise, in place, of standard
    deviation `sigma` relative to each tensor's root mean square; afterwards they are restored bit for bit."""
    weights = layer_weights(net) if sigma else []
    with shifted([(w, sigma * root_mean_square(w) * noise_like(w, kind)) for w in weights]):
        yield


def head(net: nn.Module) -> nn.Linear:
    """The last linear layer of the net. Raises ValueError if `net.head` is not one."""
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

    with head(net).register_forward_pre_hook(collect):
        yield seen
