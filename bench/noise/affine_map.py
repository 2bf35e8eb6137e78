"""The affine map from the image to a place inside a net: is it one, and what is its operator norm in L2?

Randomized smoothing certifies in the space where the noise is. Where that space is A x + b, a change of the image by d
moves it by A d, at most ||A||_2 ||d||_2: a radius there is worth 1 / ||A||_2 of it in the image. An estimate from
below, such as power iteration gives, would certify too much; what stands here is exact or proven to be above.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bench.core.stochastic import NoiseSource, noise_off

EXACT = 4096  # image or quantity of at most so many values: exact norm, within seconds
ROUNDING = 1e-9  # relative; far above the error of float64 sums and eigenvalues at this size
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_DIFFERENCES = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
_PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_")
_SHAPE = (getattr, "size", "dim")
# copies, moves and averages of values: linear, and no coefficient is negative
_MOVES: tuple[Any, ...] = (torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.mean, F.avg_pool2d)
_MOVES += (F.adaptive_avg_pool2d, "flatten", "view", "reshape", "permute", "transpose", "contiguous", "clone", "mean")
_MOVERS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d, NoiseSource)


class NotAffine(ValueError):
    """No affine map of the image leads there, as far as can be shown; one line that says what is in the way."""


def trace(net: nn.Module) -> Graph:
    """The graph of the net's forward pass. Raises NotAffine where torch.fx cannot follow it."""
    try:
        return Tracer().trace(net)
    except Exception as error:  # tracing runs the network's own code with symbols, so anything may come out
        raise NotAffine(f"cannot trace {type(net).__name__}, so nothing is known of its layers ({error})") from error


class AffineMap:
    """From the image to what enters `layer` ("input") or what it puts out ("output"), in the net's eval mode.

    Called, it is the linear part of that map. Raises NotAffine when made, by the structure of the net's graph.
    """

    def __init__(self, net: nn.Module, layer: nn.Module, kind: Literal["input", "output"]) -> None:
        self.net, self.layer, self.kind = net, layer, kind
        graph = trace(net)
        self._image = next(node for node in graph.nodes if node.op == "placeholder")
        self._end = self._image if layer is net and kind == "input" else self._find(graph)
        reached, needed = {self._image}, {self._end}
        for node in graph.nodes:
            if node.target not in _SHAPE and any(source in reached for source in node.all_input_nodes):
                reached.add(node)
        for node in reversed(graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        self._order = [node for node in graph.nodes if node in needed and node is not self._image]
        self._rules = {node: self._rule(node, reached) for node in self._order if node in reached}
        if self._end not in reached:
            raise NotAffine(f"{self._where()} does not depend on the image")

    def _find(self, graph: Graph) -> Node:
        calls = [n for n in graph.nodes if n.op == "call_module" and self._module(n) is self.layer]
        if len(calls) != 1:
            raise NotAffine(f"{self._where()} stands at {len(calls)} places of {type(self.net).__name__}; expected one")
        return calls[0] if self.kind == "output" else calls[0].all_input_nodes[0]

    def _module(self, node: Node) -> nn.Module:
        return self.net.get_submodule(str(node.target))

    def _where(self) -> str:
        name = next((name for name, module in self.net.named_modules() if module is self.layer), "?")
        return f"the noise on the {self.kind} of {name or 'the net'}"

    def _rule(self, node: Node, reached: set[Node]) -> Callable[..., Tensor]:
        """The linear part of a node whose value depends on the image."""
        own = [source in reached for source in _arguments(node)]
        target: Any = self._module(node) if node.op == "call_module" else node.target
        if isinstance(target, nn.Conv2d):
            return lambda a, x: target._conv_forward(x, _entries(target.weight, x, a), None)
        if isinstance(target, nn.Linear):
            return lambda a, x: F.linear(x, _entries(target.weight, x, a))
        if isinstance(target, _BatchNorm) and not target.training and target.running_var is not None:
            return lambda a, x: x * _entries(_slope(target), x, a).view(1, -1, *[1] * (x.dim() - 2))
        if isinstance(target, _DropoutNd) and not target.training:
            return lambda a, x: x
        if isinstance(target, _MOVERS):
            return lambda a, x: x if isinstance(target, NoiseSource) else target(x)
        if (target in _SUMS or target in _DIFFERENCES) and not node.kwargs:
            sign = -1.0 if target in _DIFFERENCES else 1.0
            # a constant goes, but not the shape that it spreads the other term to
            return lambda a, *xs: _term(xs[0], own[0]) + (1.0 if a else sign) * _term(xs[1], own[1])
        if target in _PRODUCTS and own.count(True) == 1 and not node.kwargs:
            return lambda a, *xs: xs[own.index(True)] * _entries(xs[own.index(False)], xs[own.index(True)], a)
        if target in _QUOTIENTS and own == [True, False] and not node.kwargs:
            return lambda a, x, by: x / _entries(by, x, a)
        if target in _MOVES and own[0] and own.count(True) == 1:
            return lambda a, *xs, **options: _call(node, *xs, **options)
        raise NotAffine(f"{self._where()} stands behind {_said(target)}; expected only affine steps from the image")

    def __call__(self, x: Tensor, absolute: bool = False) -> Tensor:
        """A x, images first (b ...); with `absolute` M x for a matrix M >= |A|, entry by entry."""
        values: dict[Node, Any] = {self._image: x}
        for node in self._order:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node in self._rules:
                values[node] = self._rules[node](absolute, *args, **kwargs)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(self.net)
            else:
                values[node] = _call(node, *args, **kwargs) if node.op != "call_module" else self._module(node)(*args)
        found: Tensor = values[self._end]
        return found

    def transposed(self, u: Tensor, x: Tensor, absolute: bool = False) -> Tensor:
        """A^T u, for images shaped like `x`."""
        with torch.enable_grad():
            at = x.new_zeros(len(u), *x.shape[1:], dtype=u.dtype).requires_grad_()
            return torch.autograd.grad(self(at, absolute), at, u)[0]

    def norm(self, x: Tensor) -> float:
        """||A||_2 for images shaped like `x` (b c h w), or an upper bound where both sides are large.

        Raises NotAffine where the net itself does not do what its graph says.
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
        """Hold A against the net itself, in float64: the difference of two images must move it by A times that."""
        name = next(name for name, module in self.net.named_modules() if module is self.layer)
        twin = copy.deepcopy(self.net).double().eval()
        layer, seen = twin.get_submodule(name), list[Tensor]()
        if self.kind == "output":
            layer.register_forward_hook(lambda module, args, out: seen.append(out))
        else:
            layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        random = torch.Generator().manual_seed(0)
        pair = torch.rand(2, *x.shape[1:], generator=random, dtype=torch.float64).to(x.device)
        with torch.no_grad(), noise_off(twin):
            twin(pair)
            moved, expected = seen[0][0] - seen[0][1], self(pair[:1] - pair[1:])[0]
        if not float((moved - expected).norm()) <= ROUNDING * max(float(expected.norm()), 1e-300):
            raise NotAffine(f"{self._where()}: {type(self.net).__name__} does there not what its graph says")


def _arguments(node: Node) -> list[Any]:
    """Positional arguments, keywords behind them."""
    return [*node.args, *node.kwargs.values()]


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


def _call(node: Node, *args: Any, **kwargs: Any) -> Any:
    call: Any = getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target
    return call(*args, **kwargs)


def _said(target: Any) -> str:
    if isinstance(target, nn.Module):
        return f"a {type(target).__name__}"
    return str(target) if isinstance(target, str) else str(getattr(target, "__name__", target))
