"""The affine map from the image to a quantity inside a net: does it exist, and what is its operator norm in L2?

Randomized smoothing certifies in the space of the noise. Where that space is A x + b, a change of the image by d moves
the quantity by A d, at most ||A||_2 ||d||_2: a radius there is 1 / ||A||_2 times as large in the image. An estimate
from below, such as power iteration gives, would certify too much; the norm here is exact or a proven upper bound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bench.core.stochastic import NoiseSource, noise_off
from bench.noise import graph as ops
from bench.noise.graph import evaluate, module_of, trace

EXACT = 4096  # image or quantity of at most so many values: exact norm, within seconds
ROUNDING = 1e-9  # relative; far above the error of float64 sums and eigenvalues at this size
# these copy, move or average values: linear, and no coefficient is negative
_MOVES: tuple[Any, ...] = (*ops.RESHAPES, *ops.MEANS, torch.permute, torch.transpose, F.avg_pool2d)
_MOVES += (F.adaptive_avg_pool2d, F.pad, "permute", "transpose", "contiguous", "clone")


class NotAffine(ValueError):
    """No affine map from the image could be shown; the message is one line with the obstacle."""


class AffineMap:
    """From the image to the input or output of `layer`, in the net's eval mode.

    A call applies the linear part of that map. The constructor raises NotAffine from the structure of the net's graph.
    """

    def __init__(self, net: nn.Module, layer: nn.Module, kind: Literal["input", "output"]) -> None:
        self.net, self.layer, self.kind = net, layer, kind
        try:
            graph = trace(net)
        except ValueError as error:
            raise NotAffine(str(error)) from error
        self._image = next(node for node in graph.nodes if node.op == "placeholder")
        self._end = self._image if layer is net and kind == "input" else self._find(graph)
        reached, needed = {self._image}, {self._end}
        for node in graph.nodes:
            if node.target not in ops.SHAPE_QUERIES and any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        for node in reversed(graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        self._order = [node for node in graph.nodes if node in needed and node is not self._image]
        self._rules = {node: self._rule(node, reached) for node in self._order if node in reached}
        if self._end not in reached:
            raise NotAffine(f"{self._place()} does not depend on the image")

    def _find(self, graph: Graph) -> Node:
        """The node of the quantity. A layer that is traced as a function is found by the noise attached to it."""
        modules = {node: module_of(node, self.net) for node in graph.nodes}
        source = getattr(self.layer, f"noise_{self.kind}", None)
        if source is None:
            found = [node for node, module in modules.items() if module is self.layer]
        else:
            found = [node for node, module in modules.items() if module is source]
        if len(found) != 1:
            raise NotAffine(f"{self._place()} occurs {len(found)} times in {type(self.net).__name__}; expected once")
        return found[0] if source is None and self.kind == "output" else found[0].all_input_nodes[0]

    def _place(self) -> str:
        name = next((name for name, module in self.net.named_modules() if module is self.layer), "?")
        return f"the noise on the {self.kind} of {name or 'the net'}"

    def _rule(self, node: Node, reached: set[Node]) -> Callable[..., Tensor]:
        """The linear part of a node whose value depends on the image: a function of `absolute` and its arguments."""
        own = [source in reached for source in (*node.args, *node.kwargs.values())]
        target: Any = module_of(node, self.net) or node.target
        if isinstance(target, nn.Conv2d):
            return lambda a, x: target._conv_forward(x, _entries(target.weight, x, a), None)
        if isinstance(target, nn.Linear):
            return lambda a, x: F.linear(x, _entries(target.weight, x, a))
        if isinstance(target, _BatchNorm) and not target.training and target.running_var is not None:
            return lambda a, x: x * _entries(_slope(target), x, a).view(1, -1, *[1] * (x.dim() - 2))
        if isinstance(target, NoiseSource) or (isinstance(target, _DropoutNd) and not target.training):
            return lambda a, x: x
        if target in (*ops.SUMS, *ops.DIFFERENCES) and not node.kwargs:
            sign = -1.0 if target in ops.DIFFERENCES else 1.0
            # a constant vanishes, but not the shape to which it broadcasts the other term
            return lambda a, *xs: _term(xs[0], own[0]) + (1.0 if a else sign) * _term(xs[1], own[1])
        if target in ops.PRODUCTS and own.count(True) == 1 and not node.kwargs:
            return lambda a, *xs: xs[own.index(True)] * _entries(xs[own.index(False)], xs[own.index(True)], a)
        if target in ops.QUOTIENTS and own == [True, False] and not node.kwargs:
            return lambda a, x, by: x / _entries(by, x, a)
        padded = target is F.pad and (len(node.args) > 3 or node.kwargs.get("value"))  # with a number other than 0
        if target in _MOVES and own[0] and own.count(True) == 1 and not padded:
            return lambda a, *xs, **options: evaluate(node, self.net, xs, options)
        raise NotAffine(f"{self._place()} is behind {_name(target)}; expected only affine steps from the image")

    def __call__(self, x: Tensor, absolute: bool = False) -> Tensor:
        """A x, images first (b ...); with `absolute` M x for a matrix M >= |A|, entry by entry."""
        values: dict[Node, Any] = {self._image: x}
        for node in self._order:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            rule = self._rules.get(node)
            values[node] = rule(absolute, *args, **kwargs) if rule else evaluate(node, self.net, args, kwargs)
        found: Tensor = values[self._end]
        return found

    def transposed(self, u: Tensor, x: Tensor, absolute: bool = False) -> Tensor:
        """A^T u, for images shaped like `x`."""
        with torch.enable_grad():
            at = x.new_zeros(len(u), *x.shape[1:], dtype=u.dtype).requires_grad_()
            return torch.autograd.grad(self(at, absolute), at, u)[0]

    def norm(self, x: Tensor) -> float:
        """||A||_2 for images shaped like `x` (b c h w), or an upper bound where both sides are large.

        Raises NotAffine where the net does not compute what its graph says.
        """
        if self._end is self._image:
            return 1.0
        self._confirm(x)
        one = x.new_zeros(1, *x.shape[1:], dtype=torch.float64)
        with torch.no_grad():
            size = min(one.numel(), self(one).numel())
            return self._exact(one) if size <= EXACT else self._above(one)

    def _exact(self, one: Tensor) -> float:
        """Largest singular value, from the eigenvalues of the smaller Gram matrix in float64."""
        there = self(one)
        wide = one.numel() > there.numel()
        like = there if wide else one
        columns = []
        for part in torch.eye(like.numel(), dtype=like.dtype, device=like.device).split(256):
            units = part.view(len(part), *like.shape[1:])
            back = self(self.transposed(units, one)) if wide else self.transposed(self(units), one)
            columns.append(back.flatten(1))
        gram = torch.cat(columns)
        top = float(torch.linalg.eigvalsh((gram + gram.T) / 2)[-1])
        return math.sqrt(max(top, 0.0)) * (1 + ROUNDING)

    def _above(self, one: Tensor) -> float:
        """sqrt(||M||_1 ||M||_inf) >= ||M||_2 >= ||A||_2 for M >= |A|."""
        rows = self(torch.ones_like(one), absolute=True)
        columns = self.transposed(torch.ones_like(rows), one, absolute=True)
        return math.sqrt(float(rows.max()) * float(columns.max())) * (1 + ROUNDING)

    def _confirm(self, x: Tensor) -> None:
        """Compare A with the net itself, in float64: the difference of two images must move the quantity by A times it.

        Raises NotAffine."""
        name = next(name for name, module in self.net.named_modules() if module is self.layer)
        net = copy.deepcopy(self.net).double().eval()
        layer, seen = net.get_submodule(name), list[Tensor]()
        if self.kind == "output":
            layer.register_forward_hook(lambda module, args, out: seen.append(out))
        else:
            layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        random = torch.Generator().manual_seed(0)
        pair = torch.rand(2, *x.shape[1:], generator=random, dtype=torch.float64).to(x.device)
        with torch.no_grad(), noise_off(net):
            net(pair)
            moved, expected = seen[0][0] - seen[0][1], self(pair[:1] - pair[1:])[0]
        if not float((moved - expected).norm()) <= ROUNDING * max(float(expected.norm()), 1e-300):
            raise NotAffine(f"{self._place()}: {type(self.net).__name__} does not compute what its graph says")


def _entries(weight: Any, like: Tensor, absolute: bool) -> Any:
    """Coefficients (a tensor or a number) in the precision of what they multiply."""
    weight = weight.detach().to(like.dtype) if isinstance(weight, Tensor) else weight
    return abs(weight) if absolute else weight


def _slope(norm: Any) -> Tensor:
    """What BatchNorm in eval mode multiplies each channel by."""
    slope: Tensor = (norm.running_var.double() + norm.eps).rsqrt()
    return slope if norm.weight is None else slope * norm.weight


def _term(value: Any, own: bool) -> Any:
    return value if own else value * 0


def _name(target: Any) -> str:
    if isinstance(target, nn.Module):
        return f"a {type(target).__name__}"
    return str(getattr(target, "__name__", target))
