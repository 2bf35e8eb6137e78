"""Mean and covariance of the logits under Gaussian noise at one or more sites of a network (bench.noise.injection).

Noise z -> z + N(0, var) enters at each site, independent of the others. Four structures give the covariance S of the
logits: `jacobian` (S = sum over sites of J var J^T of the noise-free network), `ungated` (the same with every
activation's slope replaced by 1), `diag` (element-wise variances) and `adjoint` (a backward recursion over the gates of
the element-wise pass). All are read through `pieces`, so losses and attacks do not depend on the structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from bench.noise.injection import Site, edit_site, on_weight
from bench.noise.layer_moments import ReluRule
from bench.noise.propagation import Propagation, SiteVariance, propagate
from bench.noise.weight_noise import weight_piece

Structure = Literal["jacobian", "diag", "adjoint", "ungated"]
Piece = tuple[Tensor, Tensor]  # R (r b ...) and w (broadcastable to b ...): one term R diag(w) R^T of A S A^T


class LogitMoments(NamedTuple):
    """Logits of the noisy network: `mean` (b k), the (mean) quantity at each of the `sites`, and `pieces`: it maps
    rows A (r b k; one r x k matrix a sample) to the terms R diag(w) R^T whose sum is A S A^T."""

    mean: Tensor
    sites: list[Tensor]
    pieces: Callable[[Tensor], list[Piece]]

    def quadratic(self, rows: Tensor) -> Tensor:
        """a^T S a for each row a, shape r b: the variance of the combination a . logits."""
        total = rows.new_zeros(rows.shape[:2], dtype=self.mean.dtype)
        for r, w in self.pieces(rows):
            # row by row: all squares at once would be the peak of a training step's memory
            total = total + torch.stack([(row.square() * w).flatten(1).sum(1) for row in r])
        return total

    def covariance(self) -> Tensor:
        """S itself, b k k: as many rows as classes, so k backward passes for `jacobian`."""
        b, k = self.mean.shape
        total = self.mean.new_zeros(b, k, k)
        with torch.autocast(self.mean.device.type, enabled=False):
            for r, w in self.pieces(unit_rows(self.mean)):
                total = total + torch.einsum("rbn,sbn->brs", (r * w).flatten(2), r.flatten(2))
        return total


class Passes(NamedTuple):
    """Passes an image: forward and backward ones for the value of a loss, backward ones for its gradient in images."""

    forwards: int
    value: int
    gradient: int


def unit_rows(mean: Tensor) -> Tensor:
    """The k unit vectors for each sample, k b k."""
    b, k = mean.shape
    return torch.eye(k, dtype=mean.dtype, device=mean.device)[:, None].expand(k, b, k)


def sign_rows(mean: Tensor, probes: int) -> Tensor:
    """Hutchinson's random signs v in {-1,+1}^k, `probes` b k: E[v^T S v] = tr S."""
    return torch.randint(0, 2, (probes, *mean.shape), device=mean.device).to(mean.dtype) * 2 - 1


def logit_moments(
    net: nn.Module,
    x: Tensor,
    variances: Sequence[SiteVariance],
    sites: Sequence[Site] = ("first",),
    structure: Structure = "jacobian",
    rule: ReluRule = "laplace",
) -> LogitMoments:
    """Moments of the logits for images `x` (b c h w) with noise of `variances[i](z)` on the quantity z at `sites[i]`.

    `rule` is for `diag` and `adjoint`.
    Differentiable in weights, images and variances. Raises ValueError where there is no site or no rule for a layer.
    """
    if structure == "jacobian":
        if rule != "laplace":
            raise ValueError(f"relu={rule} needs propagated variances; use structure=diag or structure=adjoint")
        return jacobian_moments(net, x, variances, sites)
    if structure == "ungated":
        rule, structure = "ungated", "adjoint"
    return propagated_moments(net, x, variances, sites, structure, rule)


def passes(structure: Structure, rows: int, noisy_weights: bool = False) -> Passes:
    """Cost of a loss that reads the covariance along `rows` rows, by the work of its convolutions and matrix products.

    Element-wise variances are a second map beside that of the means, a forward pass more, and noise on the weights is
    another (in adjoint two). A row is a backward pass, which the gradient differentiates at the cost of two; where the
    weights are noisy it is multiplied with each layer's input besides, which costs as much again."""
    row = 2 if noisy_weights else 1
    if structure == "jacobian":
        return Passes(1, row * rows, 1 + 2 * row * rows)
    if structure == "diag":
        return Passes(1 + row, 0, 1 + row)
    return Passes(2 * row, row * rows, 2 * row + 2 * row * rows)


@contextmanager
def fixed_batch_statistics(net: nn.Module, x: Tensor) -> Iterator[Tensor | None]:
    """Inside, the samples of a batch do not influence each other: BatchNorm in training mode has the statistics of one
    ordinary pass over `x`, as constants. Gives that pass's logits (buffers move once), None where none was needed."""
    mixing = [m for m in net.modules() if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)]
    if not mixing:
        yield None
        return
    statistics: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if layer in statistics:
            raise ValueError("a BatchNorm layer runs twice in one forward pass; its statistics would be ambiguous")
        z = full_precision(args[0].detach())  # BatchNorm's buffers are never half-precision
        axes = [0, *range(2, z.dim())]
        statistics[layer] = (z.mean(axes), z.var(axes, unbiased=False))

    with ExitStack() as hooks:
        for layer in mixing:
            hooks.enter_context(layer.register_forward_pre_hook(record))
        logits = net(x)
    saved = [(layer, layer.training, layer.running_mean, layer.running_var) for layer in mixing]
    try:
        for layer in mixing:
            layer.training = False
            layer.running_mean, layer.running_var = statistics[layer]
        yield logits
    finally:
        for layer, training, running_mean, running_var in saved:
            layer.training = training
            layer.running_mean, layer.running_var = running_mean, running_var


def jacobian_moments(
    net: nn.Module,
    x: Tensor,
    variances: Sequence[SiteVariance],
    sites: Sequence[Site] = ("first",),
) -> LogitMoments:
    """S = sum of J diag(var) J^T over the sites, J = d logits / d site of the noise-free network.

    Exact to first order, skips and pools included; a row costs one backward pass. The gradient flows through J. Where
    BatchNorm is in training mode, `mean` comes from one ordinary pass (buffers move once) and J from a second one with
    that batch's statistics as constants: through live statistics a summed vector-Jacobian product mixes samples.
    """
    reached, inputs = dict[int, Tensor](), dict[int, Tensor]()  # by the index of the site

    def capture(index: int, z: Tensor) -> Tensor:
        reached[index] = z if z.requires_grad else z.detach().requires_grad_()
        return reached[index].clone()  # an in-place ReLU must not overwrite what we differentiate by

    def record_input(index: int, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[index] = args[0]

    with torch.enable_grad(), fixed_batch_statistics(net, x) as ordinary, ExitStack() as hooks:
        for index, site in enumerate(sites):
            hooks.enter_context(edit_site(net, site, partial(capture, index)))
            if on_weight(site):
                hooks.enter_context(site.layer.register_forward_pre_hook(partial(record_input, index)))
        logits = net(x)
    at = [reached[index] for index in range(len(sites))]

    def piece(index: int, products: Tensor) -> Piece:
        site, variance = sites[index], variances[index]
        if on_weight(site):
            spread = variance(site.weight).expand_as(site.weight)
            return weight_piece(products, full_precision(inputs[index]), site.layer, spread)
        return products, full_precision(variance(at[index]))

    def pieces(rows: Tensor) -> list[Piece]:
        # one product after the other: on CPU the batched (vmap) backward took 1.4 to 2.6 times as long. Samples are
        # independent here, so the gradient of the sum over the batch holds each sample's own product.
        rows = rows.to(logits.dtype)
        with torch.enable_grad():
            products = [torch.autograd.grad(logits, at, row, create_graph=True) for row in rows]
        parts = zip(*products, strict=True)
        return [piece(index, full_precision(torch.stack(part))) for index, part in enumerate(parts)]

    return LogitMoments(full_precision(logits if ordinary is None else ordinary), at, pieces)


def propagated_moments(
    net: nn.Module,
    x: Tensor,
    variances: Sequence[SiteVariance],
    sites: Sequence[Site] = ("first",),
    structure: Literal["diag", "adjoint"] = "diag",
    rule: ReluRule = "laplace",
) -> LogitMoments:
    """Element-wise moments through the network, or with their covariance restored by a backward recursion (adjoint).

    Running buffers of BatchNorm in training move once, by a noise-free pass of their own."""
    if any(isinstance(m, _BatchNorm) and m.training and m.running_mean is not None for m in net.modules()):
        with torch.no_grad():
            net(x)
    run = propagate(net, x, variances, sites, rule)

    def pieces(rows: Tensor) -> list[Piece]:
        return [(rows, run.logits.var)] if structure == "diag" else _adjoint(run, rows)

    return LogitMoments(run.logits.mean, [mean for mean, _ in run.sites.values()], pieces)


def _adjoint(run: Propagation, rows: Tensor) -> list[Piece]:
    """Rows pulled back through gates and weights from the logits to the sites. Every nonlinearity adds its innovation,
    independent of all before it, and every site its noise: a sum of positive semi-definite terms."""
    back: dict[Node, Tensor] = {run.exit: rows}
    pieces: list[Piece] = []
    with torch.autocast(rows.device.type, enabled=False):
        for node, sources, step in reversed(run.steps):
            r = back.pop(node, None)
            if r is None:
                continue  # does not reach the logits
            if node in run.sites:
                pieces.append((r, run.sites[node][1]))
            if step.innovation is not None:
                pieces.append((r, step.innovation))
            if step.further is not None:
                pieces += step.further(r)
            for source, pull in zip(sources, step.pulls, strict=True):
                before = pull(r)
                back[source] = back[source] + before if source in back else before
    # what is left are the sites with nothing random before them
    return [*pieces, *((r, run.sites[node][1]) for node, r in back.items() if node in run.sites)]


def full_precision(t: Tensor) -> Tensor:
    """At least float32: squares of half-precision gradients underflow."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
