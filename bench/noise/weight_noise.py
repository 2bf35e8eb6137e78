"""The net's own noise on the weights of a layer (bench.core.stochastic) in closed form.

Noise on the weights of a convolution is shared by all positions, so its outputs are correlated: `weight_piece` keeps
this correlation, element-wise variances drop it. Correlation between the images of a batch is not modeled, since the
moments are those of each image by itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.noise.layer_moments import Moments, Step, apply, weighted


def weight_step(x: Moments | Tensor, layer: Any, spread: Tensor) -> Step:
    """A convolution or linear layer whose weights have independent noise of variance `spread` (of their shape), on
    random or known input: variance (W * W) v + spread (m^2 + v). Positions of a convolution count as independent in it.
    """
    random = x if isinstance(x, Moments) else Moments(x, torch.zeros_like(x))
    noise_free = weighted(random, layer)
    var = noise_free.out.var + apply(random.mean.square() + random.var, layer, spread)

    def further(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        pieces = [weight_piece(rows, random.mean, layer, spread)]
        return [*pieces, (rows, apply(random.var, layer, spread))] if random is x else pieces

    return Step(Moments(noise_free.out.mean, var), noise_free.pulls if random is x else (), further=further)


def weight_piece(rows: Tensor, x: Tensor, layer: Any, spread: Tensor) -> tuple[Tensor, Tensor]:
    """What noise of variance `spread` (of their shape) on the weights adds to the covariance of rows (r b out...) at
    the layer's output, where its input is `x` (b in...): R and w of the term R diag(w) R^T. Exact, positions that share
    a weight included."""
    # only the shape of the layer is used: where the weights are noisy, each access is a draw
    if isinstance(layer, nn.Linear):
        if x.dim() == 2:  # an output has its own weights: no correlation, and no need for an r b out in tensor
            return rows, apply(x.square(), layer, spread)
        return torch.einsum("rbno,bni->rboi", rows.flatten(2, -2), x.flatten(1, -2)), spread
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    groups = layer.groups
    of_group = rows.flatten(3).unflatten(2, (groups, -1)), patches.unflatten(1, (groups, -1))
    return torch.einsum("rbgop,bgip->rbgoi", *of_group).reshape(*rows.shape[:2], *spread.shape), spread
