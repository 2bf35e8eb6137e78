"""Noise that a net keeps when it is deployed (bench.core.stochastic), in closed form: on what enters a layer, and on
its weights.

Noise on the weights of a convolution is shared by all positions, so its outputs are correlated: `weight_piece` keeps
that, element-wise variances drop it. Between the images of a batch nothing is said of correlation, since each image's
moments are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

from bench.core.stochastic import OwnNoise, noise_sites
from bench.noise.layer_moments import Moments, Step, conv2d, linear


def on_weight(site: Any) -> TypeGuard[OwnNoise]:
    """Is the noise on a layer's weights?"""
    return isinstance(site, OwnNoise) and site.kind == "weight"


def insert_sources(graph: Graph, net: nn.Module) -> None:
    """Give each noise source on activations a node of its own in the traced graph of `net`: hooks are not traced."""
    names = {module: name for name, module in net.named_modules()}
    for site in noise_sites(net):
        if on_weight(site):
            continue
        name = names[site.source]
        if site.layer is net:
            image = next(node for node in graph.nodes if node.op == "placeholder")
            with graph.inserting_after(image):
                noisy = graph.call_module(name, (image,))
            image.replace_all_uses_with(noisy, lambda user, noisy=noisy: user is not noisy)
            continue
        layer, kind = names[site.layer], str(site.kind)
        for node in [n for n in graph.nodes if n.op == "call_module" and n.target == layer]:
            if kind == "output":
                with graph.inserting_after(node):
                    noisy = graph.call_module(name, (node,))
                node.replace_all_uses_with(noisy, lambda user, noisy=noisy: user is not noisy)
                continue
            with graph.inserting_before(node):
                noisy = graph.call_module(name, (node.args[0],))
            node.replace_input_with(node.args[0], noisy)  # the layer alone: a skip from there has no noise


def weight_step(x: Moments | Tensor, layer: Any, spread: Tensor) -> Step:
    """A convolution or linear layer whose weights have independent noise of variance `spread` (of their shape), on
    random or known input: variance (W * W) v + spread (m^2 + v). Positions of a convolution count as independent in it.
    """
    random = x if isinstance(x, Moments) else Moments(x, torch.zeros_like(x))
    plain = linear(random, layer.weight, layer.bias) if isinstance(layer, nn.Linear) else conv2d(random, layer)
    own = _apply(random.mean.square() + random.var, layer, spread)
    out = Moments(plain.out.mean, plain.out.var + own)

    def further(rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        pieces = [weight_piece(rows, random.mean, layer, spread)]
        return [*pieces, (rows, _apply(random.var, layer, spread))] if random is x else pieces

    return Step(out, plain.pulls if random is x else (), further=further)


def weight_piece(rows: Tensor, x: Tensor, layer: Any, spread: Tensor) -> tuple[Tensor, Tensor]:
    """What noise of variance `spread` (of their shape) on the weights adds to the covariance of rows (r b out...) at
    the layer's output, where its input is `x` (b in...): R and w of the term R diag(w) R^T. Exact, positions that share
    a weight included."""
    # the layer is asked for its shape only: each look at a noisy weight would be a draw
    if isinstance(layer, nn.Linear):
        if x.dim() == 2:  # an output has its own weights: no correlation, and no need for r b out in numbers
            return rows, _apply(x.square(), layer, spread)
        flat = rows.flatten(2, -2), x.flatten(1, -2)
        return torch.einsum("rbno,bni->rboi", *flat), spread
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    groups = layer.groups
    of_group = rows.flatten(3).unflatten(2, (groups, -1)), patches.unflatten(1, (groups, -1))
    return torch.einsum("rbgop,bgip->rbgoi", *of_group).reshape(*rows.shape[:2], *spread.shape), spread


def _apply(x: Tensor, layer: Any, weight: Tensor) -> Tensor:
    """The linear map of `layer` with other weights and no bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


@contextmanager
def watch(
    sites: Sequence[tuple[int, OwnNoise]], capture: Callable[[int, Tensor], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """While open, what noise falls on goes through `capture(place, z)`: the activation, or for noise on weights the
    layer's output. Gives the input of each layer of the latter kind."""
    inputs: dict[int, Tensor] = {}

    def activation(place: int) -> Any:
        return lambda module, args, out: capture(place, out.clone())  # not what a skip from there goes on with

    def layer(place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            inputs[place] = args[0]
            return capture(place, out)

        return hook

    hooks = [
        s.layer.register_forward_hook(layer(p)) if on_weight(s) else s.source.register_forward_hook(activation(p))
        for p, s in sites
    ]
    try:
        yield inputs
    finally:
        for handle in hooks:
            handle.remove()
