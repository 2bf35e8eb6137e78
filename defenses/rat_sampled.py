"""min_w CE(f(x), y) + beta E_u[ KL(p(x; w + u) || p(x'; w + u)) ], u ~ noise on the weights, by draws

Sampled randomized adversarial training: the control of `rat` (Jin et al. 2023, CVPR, arXiv 2303.10653), with the same
noise, drawn anew at every step instead of expanded, and x' found as there.

Not a published method: it separates what the noise does from what the Taylor terms do. `rat` with w0 = 1, w1 = 0 and
w2 = 1 is the expectation of this loss up to terms of order sigma^4, as odd moments of u vanish; its first-order term,
the mean *size* of the change, has no counterpart in an expectation. Cross-entropy is taken at w, in both. With noise on
the head a draw is a product with the features; on all layers it is one more pass for each branch, and BatchNorm's
buffers move by all of them. sigma = 0 is TRADES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn
from torch.func import functional_call

from bench.core.defense import Batch, Losses
from bench.core.pgd import kl
from bench.core.weights import layer_weights
from defenses._randomized_trades import RandomizedTRADES, head, head_inputs, noise_like, noisy_layers, root_mean_square


@dataclass
class RATSampled(RandomizedTRADES):
    """TRADES under draws of the weights. Costs 2 steps + 7 forward passes F an image; with noise on all layers
    2 steps + 4 + 6 draws, or 3 draws where only the adversarial branch is noisy."""

    cost: ClassVar[str] = "(2 steps + 7) F = 27F"
    revision: ClassVar[int] = 1

    beta: Annotated[float, Ge(0)] = 6.0
    """Weight of the divergence, as in TRADES."""
    sigma: Annotated[float, Ge(0)] = 0.01
    """Standard deviation of the weight noise, relative to the root mean square of each weight tensor."""
    noise: Literal["gaussian", "uniform", "laplace"] = "gaussian"
    """Distribution of the weight noise; all have standard deviation sigma."""
    draws: Annotated[int, Ge(1)] = 1
    """Draws of the noise a step, shared by the batch; the divergence is their mean."""
    noise_on: Literal["head", "network"] = "head"
    """Weights that carry the noise in the loss: last layer, or all convolutions and linear layers."""
    branches: Literal["joint", "adversarial"] = "joint"
    """Branches that carry it: both the same noise, or the adversarial one alone (second_on of `rat`)."""

    def inner(self, net: nn.Module, batch: Batch) -> Tensor:
        """Adversarial images of TRADES against one noisy copy of the net."""
        with noisy_layers(net, self.sigma, self.noise):
            return super().inner(net, batch)

    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        """Mean cross-entropy on the clean images, and beta times the mean divergence over images and draws."""
        if not self.sigma:
            return super().loss(net, batch, adv)
        draw = self._head_draws if self.noise_on == "head" else self._network_draws
        clean, p, q = draw(net, batch.x, adv)
        ce = F.cross_entropy(clean, batch.y, label_smoothing=batch.smoothing)
        return {"ce": ce, "kl": self.beta * kl(p.flatten(0, 1), q.flatten(0, 1)).mean()}

    def _head_draws(self, net: nn.Module, x: Tensor, adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise-free clean logits (b k), and logits of each branch under each draw (draws b k)."""
        with head_inputs(net) as features:
            clean, moved = net(x), net(adv)
        h, h_adv = features
        weight = head(net).weight
        noise = noise_like(weight.new_empty(self.draws, *weight.shape), self.noise)
        u = self.sigma * root_mean_square(weight) * noise
        q = moved + torch.einsum("bp,nkp->nbk", h_adv, u)
        p = clean + torch.einsum("bp,nkp->nbk", h, u) if self.branches == "joint" else clean.expand_as(q)
        return clean, p, q

    def _network_draws(self, net: nn.Module, x: Tensor, adv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with noise on every layer; its weights enter by value, so that gradients reach the means."""
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        clean, pairs = net(x), list[tuple[Tensor, Tensor]]()
        for _ in range(self.draws):
            noisy = {
                names[id(w)]: w + self.sigma * root_mean_square(w) * noise_like(w, self.noise)
                for w in layer_weights(net)
            }
            q = functional_call(net, noisy, (adv,))
            pairs.append((functional_call(net, noisy, (x,)) if self.branches == "joint" else clean, q))
        p, q = (torch.stack(branch) for branch in zip(*pairs, strict=True))
        return clean, p, q
