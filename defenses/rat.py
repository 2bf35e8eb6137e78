"""min_w E[ CE(f(x), y) + beta (w0 KL + w1 E|<u, grad_W KL>| + w2 E u^T H u / 2) ], KL(p(x) || p(x')), u ~ noise on W

Randomized adversarial training through Taylor expansion (Jin et al. 2023, CVPR, arXiv 2303.10653): TRADES under random
weights, expanded around the mean weights; x' comes from a noisy copy of the net. Reconstructed from the abstract: the
full text was not read.

Paper against release: the released code (rat_release) holds no derivative of the weights. Its first and second order
are soft labels that follow gradient gaps between classes, its noise is absolute, on convolutions and for x' alone, and
its AWP variant has none and climbs plain TRADES (awp on this defense climbs the whole loss).

The Taylor terms are taken on the weights W of the last layer, in closed form, so they cost next to nothing: zeroth KL;
first sigma sqrt(2/pi) ||grad_W KL||, exact for gaussian noise, for the others by the central limit over the entries of
W; second sigma^2/2 tr H, exact for any independent noise of that variance. So w1 = w2 = 0, w2 = 0 and all three are the
paper's three settings, and sigma = 0 is TRADES. The KL is the batch mean: u is shared by the batch. Both terms train
the features too. For x' all convolutions and linear layers are noisy, in place, and restored bit for bit.

With features h, h', outputs p, q = p', S_p = sum_i p_i (1 - p_i) and w_i = (z'_i - z_i) - E_p(z' - z) the trace is
tr H = S_p |h - h'|^2 + (S_q - S_p) |h'|^2 + 2 |h|^2 sum_i p_i^2 w_i, image by image (derived here): each part vanishes
at x' = x. It is tiny because the same u moves both branches, and it can be negative, as KL is not convex in W: where p
is flat the last part is 0 and S_q - S_p is at most 0. `second_on=adversarial` has the noise in the adversarial branch
alone: tr H = S_q |h'|^2, never negative. Wang et al. 2023 (arXiv 2211.12624) penalize the Hessian's trace of a robust
loss, also in the last layer and in closed form. `rat_sampled` is the control that draws the noise.

sigma is relative to the root mean square of each weight tensor (a constant in the gradient). The released 1e-4 is
absolute: 0.4 to 1.2 % of a ResNet-18's convolutions at PyTorch's initialization, but another share in every layer and
at every stage of training; 0.01 here has its size. At that size the terms are far below KL: see the `share_` metrics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from bench.core.defense import Batch, Losses
from bench.core.pgd import kl
from bench.core.weights import layer_weights
from defenses._randomized_trades import RandomizedTRADES, head, head_inputs, noisy_layers, root_mean_square


@dataclass
class RAT(RandomizedTRADES):
    """TRADES with Taylor terms of randomized weights. Costs 2 steps + 7 forward passes F an image, as TRADES does."""

    cost: ClassVar[str] = "(2 steps + 7) F = 27F"
    revision: ClassVar[int] = 1
    settings_added_later: ClassVar[tuple[str, ...]] = ("second_on",)

    beta: Annotated[float, Ge(0)] = 6.0
    """Weight of all Taylor terms together, as of the divergence in TRADES."""
    w0: Annotated[float, Ge(0)] = 1.0
    """Weight of the zeroth term, the divergence itself."""
    w1: Annotated[float, Ge(0)] = 0.2
    """Weight of the first-order term (eta of the paper)."""
    w2: Annotated[float, Ge(0)] = 0.2
    """Weight of the second-order term, whose factor 1/2 is Taylor's and not in here."""
    sigma: Annotated[float, Ge(0)] = 0.01
    """Standard deviation of the weight noise, relative to the root mean square of each weight tensor."""
    noise: Literal["gaussian", "uniform", "laplace"] = "gaussian"
    """Distribution of the weight noise; all have standard deviation sigma."""
    first_on: Literal["head", "network"] = "head"
    """Weights of the first-order term: last layer, or all layers by double backward (12F more)."""
    second_on: Literal["joint", "adversarial"] = "joint"
    """Branches whose noise the second-order term expands: both, with the same noise, or the adversarial one alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._last: Losses = {}  # of the last loss

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """Adversarial images of TRADES against one noisy copy of the net."""
        with noisy_layers(net, self.sigma, self.noise):
            return super().inner(net, batch)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the clean images and the weighted Taylor terms; a term of weight 0 is left out."""
        with head_inputs(net) as features:
            clean, moved = net(batch.x), net(adv)
        divergence = kl(clean, moved).mean()
        sigma = self.sigma * root_mean_square(head(net).weight)
        terms = {"ce": F.cross_entropy(clean, batch.y, label_smoothing=batch.smoothing)}
        if self.w0:
            terms["kl"] = self.beta * self.w0 * divergence
        if self.w1:
            if self.first_on == "head":
                size = sigma * kl_gradient(clean, moved, *features).norm()
            else:
                weights = layer_weights(net)
                grads = torch.autograd.grad(divergence, weights, create_graph=True)
                pairs = zip(weights, grads, strict=True)
                size = torch.stack([self.sigma * root_mean_square(w) * g.norm() for w, g in pairs]).norm()
            terms["first"] = self.beta * self.w1 * math.sqrt(2 / math.pi) * size
        if self.w2:
            joint = self.second_on == "joint"
            trace = kl_trace(clean, moved, *features) if joint else adversarial_trace(moved, features[1])
            terms["second"] = self.beta * self.w2 * 0.5 * sigma.square() * trace
        self._last = {name: value.detach() for name, value in terms.items()}
        return terms

    def metrics(self, net: nn.Module) -> dict[str, Tensor]:
        """Share of each term in the sum of their sizes, in the last step."""
        total = sum((value.abs() for value in self._last.values()), torch.tensor(0.0))
        return {f"share_{name}": value.abs() / total for name, value in self._last.items()}


def kl_gradient(clean: Tensor, moved: Tensor, h: Tensor, h_adv: Tensor) -> Tensor:
    """grad_W of the mean KL(p || p') where W h gave the logits `clean` and W h' `moved` (b k), shape k p."""
    p, q = clean.softmax(1), moved.softmax(1)
    ratio = clean.log_softmax(1) - moved.log_softmax(1)
    slope = p * (ratio - (p * ratio).sum(1, keepdim=True))
    return (slope.T @ h + (q - p).T @ h_adv) / len(h)


def kl_trace(clean: Tensor, moved: Tensor, h: Tensor, h_adv: Tensor) -> Tensor:
    """Trace of the Hessian in W of the same mean divergence, exactly, from its three diagonal blocks in the logits."""
    p, q = clean.softmax(1), moved.softmax(1)
    ratio = clean.log_softmax(1) - moved.log_softmax(1)
    spread = (p * (1 - p)).sum(1)
    curved = (p * (1 - 2 * p) * (ratio - (p * ratio).sum(1, keepdim=True))).sum(1) + spread
    within = curved * h.square().sum(1) + (q * (1 - q)).sum(1) * h_adv.square().sum(1)
    return (within - 2 * spread * (h * h_adv).sum(1)).mean()


def adversarial_trace(moved: Tensor, h_adv: Tensor) -> Tensor:
    """Trace of that Hessian where only the logits W h' (b k) depend on W: the mean of S_q |h'|^2, at least 0."""
    q = moved.softmax(1)
    return ((q * (1 - q)).sum(1) * h_adv.square().sum(1)).mean()
