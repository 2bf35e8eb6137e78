"""The traced graph of a network (torch.fx), with its noise sources as nodes of their own."""

from __future__ import annotations

import operator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node, Tracer
from torch.fx.node import map_arg

from bench.core.stochastic import NoiseSource

SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
DIFFERENCES = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
QUOTIENTS = (operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div", "div_")
MEANS = (torch.mean, "mean")
MAX_POOLS = (F.max_pool2d, torch.max_pool2d)
RELUS = (F.relu, torch.relu, "relu", "relu_")
RESHAPES = (torch.flatten, torch.reshape, "flatten", "view", "reshape", "unflatten")
SHAPE_QUERIES = (getattr, "size", "dim")
_GRAPHS: WeakKeyDictionary[nn.Module, dict[bool, Graph]] = WeakKeyDictionary()
# layers without weights: traced as the function that they call
_FUNCTIONS = (
    *(nn.Identity, nn.Flatten, nn.Unflatten, nn.ZeroPad2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.ReLU, nn.Hardtanh, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU),
)


class _Tracer(Tracer):
    """Also traces the noise sources that are attached to layers by hooks (bench.core.stochastic)."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        standard = super().is_leaf_module(m, module_qualified_name) and not isinstance(m, _FUNCTIONS)
        return standard or isinstance(m, NoiseSource)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)  # its hooks are traced as they run
        args = (*(_noisy(m, "input", z) for z in args[:1]), *args[1:])
        return _noisy(m, "output", super().call_module(m, forward, args, kwargs))


def _noisy(layer: nn.Module, kind: str, z: Any) -> Any:
    """`z` with the noise that is attached to the input or output of `layer`, if any."""
    source = getattr(layer, f"noise_{kind}", None)
    return source(z) if isinstance(source, NoiseSource) else z


def trace(net: nn.Module) -> Graph:
    """The graph of the net's forward pass. Raises ValueError where torch.fx cannot follow it."""
    try:
        graph = _Tracer().trace(net)
    except Exception as error:  # tracing runs the network's own code with symbols, so anything may come out
        raise ValueError(f"cannot trace {type(net).__name__} ({error})") from error
    if isinstance(getattr(net, "noise_input", None), NoiseSource):
        image = next(node for node in graph.nodes if node.op == "placeholder")
        with graph.inserting_after(image):
            noisy = graph.call_module("noise_input", (image,))
        image.replace_all_uses_with(noisy, lambda user: user is not noisy)
    return graph


def pools_first(net: nn.Module) -> Graph:
    """The net's graph, cached while the net lives, in which a max-pool behind a ReLU is moved before it.

    Both orders compute the same. What is true of the values before a ReLU only, such as that they are Gaussian or that
    their bounds are linear, then holds at the pool too. Raises ValueError as `trace`.
    """
    cached = _GRAPHS.setdefault(net, {})
    if net.training not in cached:
        graph = trace(net)
        for node in list(graph.nodes):
            users = list(node.users)
            if node.target in RELUS and len(users) == 1 and users[0].target in MAX_POOLS:
                pool, before = users[0], node.args[0]
                pool.replace_all_uses_with(node)
                pool.replace_input_with(node, before)
                node.replace_input_with(before, pool)
                pool.append(node)
        graph.lint()
        cached[net.training] = graph
    return cached[net.training]


def arguments(node: Node) -> list[Node]:
    """Arguments in order; one that occurs twice (x + x) comes twice, unlike in `all_input_nodes`."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def module_of(node: Node, net: nn.Module) -> nn.Module | None:
    """The module of `net` that the node calls; None for functions and methods."""
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def evaluate(node: Node, net: nn.Module, args: Any, kwargs: Any) -> Any:
    """The node's value as the network itself computes it; a noise source adds nothing."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(net)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    module = module_of(node, net)
    if isinstance(module, NoiseSource):
        return args[0]
    call: Any = node.target if module is None else module
    return call(*args, **kwargs)
