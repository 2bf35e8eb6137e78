"""Mean and covariance of the logits under Gaussian noise at one site, and the losses in closed form made of them.

Noise z -> z + N(0, var) enters at the site: the pre-activation of the first convolution or linear layer, or the image.
Three structures give the covariance S of the logits: `jacobian` (S = J var J^T of the noise-free network), `diag`
(element-wise variances) and `adjoint` (a backward recursion over the gates of the element-wise pass).
All are read through `pieces`, so losses and attacks need not know which one made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from bench.core.moments import ReluRule
from bench.core.propagation import Propagation, Site, SiteVariance, propagate

Structure = Literal["jacobian", "diag", "adjoint"]
Target = Literal["logits", "softmax"]
Piece = tuple[Tensor, Tensor]  # R (r b ...) and w (broadcastable to b ...): one term R diag(w) R^T of A S A^T

Q_MIN = 1e-6  # floor of a pair's variance: below it log Phi saturates at the start of training


class LogitMoments(NamedTuple):
    """Logits of the noisy network: `mean` (b k), the noise-free quantity `site` at the site, and `pieces`: it maps
    rows A (r b k; one r x k matrix a sample) to the terms R diag(w) R^T whose sum is A S A^T."""

    mean: Tensor
    site: Tensor
    pieces: Callable[[Tensor], list[Piece]]

    def quadratic(self, rows: Tensor) -> Tensor:
        """a^T S a for each row a, shape r b: the variance of the combination a . logits."""
        total = rows.new_zeros(rows.shape[:2], dtype=self.mean.dtype)
        for r, w in self.pieces(rows):
            total = total + (r.square() * w).flatten(2).sum(2)
        return total

    def covariance(self) -> Tensor:
        """S itself, b k k: as many rows as classes, so k backward passes for `jacobian`."""
        b, k = self.mean.shape
        total = self.mean.new_zeros(b, k, k)
        with torch.autocast(self.mean.device.type, enabled=False):
            for r, w in self.pieces(unit_rows(self.mean)):
                total = total + torch.einsum("rbn,sbn->brs", (r * w).flatten(2), r.flatten(2))
        return total


def unit_rows(mean: Tensor) -> Tensor:
    """The k unit vectors for each sample, k b k."""
    b, k = mean.shape
    return torch.eye(k, dtype=mean.dtype, device=mean.device)[:, None].expand(k, b, k)


def sign_rows(mean: Tensor, probes: int) -> Tensor:
    """Hutchinson's random signs v in {-1,+1}^k, `probes` b k: E[v^T S v] = tr S."""
    return torch.randint(0, 2, (probes, *mean.shape), device=mean.device).to(mean.dtype) * 2 - 1


def competitors(mean: Tensor, y: Tensor, count: int) -> Tensor:
    """The `count` classes j != y of largest mean logit, b `count`, strongest first; 0 means all k - 1."""
    others = mean.detach().scatter(1, y[:, None], float("-inf"))
    return others.topk(count or mean.shape[1] - 1, dim=1).indices


def pair_rows(mean: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """e_y - e_j for the classes j in `rivals` (b r), shape r b k: their quadratic is the variance of z_y - z_j."""
    k = mean.shape[1]
    return (nn.functional.one_hot(y, k)[None] - nn.functional.one_hot(rivals.T, k)).to(mean.dtype)


def pair_variance(covariance: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """q_j = S_yy + S_jj - 2 S_yj for j in `rivals` (b r), shape r b, from a full covariance b k k."""
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    row = covariance.gather(1, y[:, None, None].expand(-1, 1, covariance.shape[2])).squeeze(1)
    return (diagonal.gather(1, y[:, None]) + diagonal.gather(1, rivals) - 2 * row.gather(1, rivals)).T


def softmax_rows(mean: Tensor, rows: Tensor) -> Tensor:
    """Jp v = p * v - p (p . v) for rows v (r b k), with Jp = diag(p) - p p^T the (symmetric) softmax Jacobian."""
    p = mean.softmax(1)
    return p * rows - p * (p * rows).sum(2, keepdim=True)


def trace(mean: Tensor, covariance: Tensor, target: Target) -> Tensor:
    """tr S, or tr Jp S Jp for the softmax, shape b, from a full covariance b k k."""
    if target == "softmax":
        once = softmax_rows(mean, covariance.transpose(0, 1)).transpose(0, 1)  # S Jp: Jp acts on each row of S
        covariance = softmax_rows(mean, once.permute(2, 0, 1)).permute(1, 0, 2)  # and on each column of the result
    return covariance.diagonal(dim1=1, dim2=2).sum(1)


def log_win(mean: Tensor, q: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """log Phi(d_j / sqrt q_j), r b: log-probability that the true class beats each rival."""
    gap = (mean.gather(1, y[:, None]) - mean.gather(1, rivals)).T
    return torch.special.log_ndtr(gap / q.clamp_min(Q_MIN).sqrt())


def squared_error(mean: Tensor, trace: Tensor, y: Tensor, target: Target) -> Tensor:
    """E||Y - onehot(y)||^2 = ||mu - onehot||^2 + trace, shape b; `target` says whether Y is logits or softmax."""
    mu = mean.softmax(1) if target == "softmax" else mean
    return (mu - nn.functional.one_hot(y, mean.shape[1])).square().sum(1) + trace


def first_weight(net: nn.Module) -> Tensor:
    """The weights (detached) of the first Conv2d or Linear in module order, for the log: a fixed noise at its output
    is escaped by growing them."""
    return next(m.weight.detach() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


@contextmanager
def edit_site(net: nn.Module, site: Site, edit: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """While open, `edit(module, z)` replaces the quantity z at the site in each forward pass of `net`.

    `first` is the Conv2d or Linear that runs first, whatever its name and place in the module tree. Only the plain
    forward pass of `net` itself counts: each call of it starts anew.
    """
    fresh = True

    def start(module: nn.Module, args: tuple[Any, ...]) -> Any:
        nonlocal fresh
        fresh = True
        return (edit(module, args[0]), *args[1:]) if site == "input" else None

    def layer(module: nn.Module, args: Any, z: Tensor) -> Tensor | None:
        nonlocal fresh
        first, fresh = fresh, False
        return edit(module, z) if first else None

    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))] if site == "first" else []
    handles = [net.register_forward_pre_hook(start), *(m.register_forward_hook(layer) for m in layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _record_statistics(layers: list[_BatchNorm]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Batch mean and (biased) variance of what each BatchNorm sees, as constants."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module in seen:
            raise ValueError("a BatchNorm layer runs twice in one forward pass; its statistics would be ambiguous")
        x = args[0].detach()
        axes = [0, *range(2, x.dim())]
        seen[module] = (x.mean(axes), x.var(axes, unbiased=False))

    handles = [layer.register_forward_pre_hook(record) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _fixed_statistics(seen: dict[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """BatchNorm layers normalise with the given statistics; running buffers are put back untouched."""
    saved = [(layer, layer.training, layer.running_mean, layer.running_var) for layer in seen]
    try:
        for layer, (mean, var) in seen.items():
            layer.training = False
            layer.running_mean, layer.running_var = mean, var
        yield
    finally:
        for layer, training, running_mean, running_var in saved:
            layer.training = training
            layer.running_mean, layer.running_var = running_mean, running_var


def logit_moments(
    net: nn.Module,
    x: Tensor,
    variance: SiteVariance,
    site: Site = "first",
    structure: Structure = "jacobian",
    rule: ReluRule = "laplace",
) -> LogitMoments:
    """Moments of the logits for images `x` (b c h w) with noise of `variance(z)` on the quantity z at the site.

    Differentiable in weights, images and variance. Raises ValueError where there is no site or no rule for a layer.
    """
    if structure == "jacobian":
        if rule != "laplace":
            raise ValueError(f"relu={rule} needs propagated variances; use structure=diag or structure=adjoint")
        return jacobian_moments(net, x, variance, site)
    return propagated_moments(net, x, variance, site, structure, rule)


def jacobian_moments(net: nn.Module, x: Tensor, variance: SiteVariance, site: Site = "first") -> LogitMoments:
    """S = J diag(var) J^T with J = d logits / d site of the noise-free network.

    Exact to first order, skips and pools included; a row costs one backward pass. The gradient flows through J. Where
    BatchNorm is in training mode, `mean` comes from one ordinary pass (buffers move once) and J from a second one with
    that batch's statistics as constants: through live statistics a summed vector-Jacobian product mixes samples.
    """
    reached: list[Tensor] = []

    def capture(module: nn.Module, z: Tensor) -> Tensor:
        z = z if z.requires_grad else z.detach().requires_grad_()
        reached.append(z)
        return z.clone()  # an in-place ReLU must not overwrite what we differentiate by

    # layers whose output for one sample depends on the others
    mixing = [m for m in net.modules() if isinstance(m, _BatchNorm) and (m.training or m.running_mean is None)]
    with torch.enable_grad():
        if mixing:
            with _record_statistics(mixing) as seen:
                mean = net(x)
            with _fixed_statistics(seen), edit_site(net, site, capture):
                logits = net(x)
        else:
            with edit_site(net, site, capture):
                mean = logits = net(x)
    if len(reached) != 1:
        raise ValueError(f"{type(net).__name__} has no Conv2d or Linear layer to put the noise after; use site=input")
    z = reached[0]

    def pieces(rows: Tensor) -> list[Piece]:
        # one product after the other: on CPU the batched (vmap) backward took 1.4 to 2.6 times as long. Samples are
        # independent here, so the gradient of the sum over the batch holds each sample's own product.
        rows = rows.to(logits.dtype)
        with torch.enable_grad():
            products = [torch.autograd.grad(logits, z, row, create_graph=True)[0] for row in rows]
        return [(_full_precision(torch.stack(products)), _full_precision(variance(z)))]

    return LogitMoments(_full_precision(mean), z, pieces)


def propagated_moments(
    net: nn.Module,
    x: Tensor,
    variance: SiteVariance,
    site: Site = "first",
    structure: Literal["diag", "adjoint"] = "diag",
    rule: ReluRule = "laplace",
) -> LogitMoments:
    """Element-wise moments through the network, or with their covariance restored by a backward recursion (adjoint).

    Running buffers of BatchNorm in training move once, by a noise-free pass of their own."""
    if any(isinstance(m, _BatchNorm) and m.training and m.running_mean is not None for m in net.modules()):
        with torch.no_grad():
            net(x)
    run = propagate(net, x, variance, site, rule)

    def pieces(rows: Tensor) -> list[Piece]:
        return [(rows, run.logits.var)] if structure == "diag" else _adjoint(run, rows)

    return LogitMoments(run.logits.mean, run.site, pieces)


def _adjoint(run: Propagation, rows: Tensor) -> list[Piece]:
    """Rows pulled back through gates and weights from the logits to the site. Every nonlinearity adds its innovation,
    independent of all before it, and the site the noise itself: a sum of positive semi-definite terms."""
    back: dict[Node, Tensor] = {run.exit: rows}
    pieces: list[Piece] = []
    with torch.autocast(rows.device.type, enabled=False):
        for node, sources, step in reversed(run.steps):
            r = back.pop(node, None)
            if r is None:
                continue  # does not reach the logits
            if step.innovation is not None:
                pieces.append((r, step.innovation))
            for source, pull in zip(sources, step.pulls, strict=True):
                before = pull(r)
                back[source] = back[source] + before if source in back else before
    return [*pieces, (back[run.entry], run.noise)]


def _full_precision(t: Tensor) -> Tensor:
    """At least float32: squares of half-precision gradients underflow."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
