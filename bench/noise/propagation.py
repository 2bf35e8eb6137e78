"""Element-wise moments through a whole network: the rules of `bench.noise.layer_moments` along its traced graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node, Tracer
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bench.core.stochastic import NoiseSource, OwnNoise
from bench.noise.injection import InjectionSite, Site, no_first_layer
from bench.noise.layer_moments import (
    Moments,
    ReluRule,
    Step,
    _pair,
    add,
    average,
    batch_norm,
    clip,
    conv2d,
    linear,
    max_pool2d,
    relu,
    reshape,
    scale,
    smooth,
)
from bench.noise.test_time_noise import insert_sources, on_weight, weight_step

SiteVariance = Callable[[Tensor], Tensor]  # quantity (weights) at the site -> its noise variance, broadcastable to it
_MEANS = (torch.mean, "mean")
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_DIFFERENCES = (operator.sub, torch.sub, "sub")
_PRODUCTS = (operator.mul, torch.mul, "mul")
_QUOTIENTS = (operator.truediv, torch.div, "div")
_POOLS = (F.max_pool2d, torch.max_pool2d)
_RELUS = (F.relu, torch.relu, "relu", "relu_")
_SMOOTH = (F.gelu, F.silu, F.softplus, F.elu, torch.tanh, torch.sigmoid, "tanh", "sigmoid")
_SHAPE = (getattr, "size", "dim")
_RESHAPES = (torch.flatten, torch.reshape, "flatten", "view", "reshape")
_GRAPHS: WeakKeyDictionary[nn.Module, dict[bool, Graph]] = WeakKeyDictionary()


class Propagation(NamedTuple):
    """A run through a network: moments of the logits; for each site on activations its node, the mean there and the
    variance of the noise put on it; and the steps from the first site to the logits, each with the nodes it came
    from."""

    logits: Moments
    sites: dict[Node, tuple[Tensor, Tensor]]
    exit: Node
    steps: list[tuple[Node, list[Node], Step]]


def propagate(
    net: nn.Module,
    x: Tensor,
    variances: Sequence[SiteVariance],
    sites: Sequence[Site] = ("first",),
    rule: ReluRule = "laplace",
) -> Propagation:
    """Run images `x` through the network's torch.fx graph, deterministic before the first site and random behind it.

    Buffers do not move. Moments are at least float32, also under autocast. Raises ValueError naming the layer for which
    there is no rule, and where the network cannot be traced or lacks a site.
    """
    graph, values, steps = _graph(net), dict[Node, Any](), list[tuple[Node, list[Node], Step]]()
    places = list(zip(site_nodes(graph, net, sites), sites, variances, strict=True))
    noise_at = {node: variance for node, site, variance in places if not on_weight(site)}
    spreads = {node: variance(site.weight).expand_as(site.weight) for node, site, variance in places if on_weight(site)}
    noisy: dict[Node, tuple[Tensor, Tensor]] = {}
    with torch.autocast(x.device.type, enabled=False):
        for node in graph.nodes:
            sources = [source for source in _inputs(node) if isinstance(values[source], Moments)]
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = x if x.dtype == torch.float64 else x.float()
            elif node.op == "output":
                return Propagation(args[0], {site: noisy[site] for site in noise_at}, node.args[0], steps)
            elif (not sources and node not in spreads) or node.target in _SHAPE:
                values[node] = _evaluate(node, net, args, kwargs)
            else:
                if node in spreads:
                    step = weight_step(args[0], net.get_submodule(str(node.target)), spreads[node])
                else:
                    step = _step(node, net, args, kwargs, rule)
                values[node] = step.out
                steps.append((node, sources, step))
            if node in noise_at:
                before = values[node]
                mean = before.mean if isinstance(before, Moments) else before
                var = noise_at[node](mean).expand_as(mean)
                noisy[node] = mean, var
                values[node] = Moments(mean, before.var + var if isinstance(before, Moments) else var)
    raise AssertionError("a traced graph ends in an output node")


def site_nodes(graph: Graph, net: nn.Module, sites: Sequence[Site]) -> list[Node]:
    """The graph's node for each site. Raises ValueError for one that the network lacks."""
    found = []
    for site in sites:
        if isinstance(site, OwnNoise):
            found.append(_own_node(graph, net, site))
            continue
        node = next((node for node in graph.nodes if _is_injection_site(node, net, site)), None)
        if node is None:
            raise no_first_layer(net)
        found.append(node)
    return found


def _is_injection_site(node: Node, net: nn.Module, site: InjectionSite) -> bool:
    if site == "input":
        return node.op == "placeholder"
    return node.op == "call_module" and _is(node, net, (nn.Conv2d, nn.Linear))


def _own_node(graph: Graph, net: nn.Module, site: OwnNoise) -> Node:
    """The one node of the net's own noise. Raises ValueError where it has none or several, whose draws differ."""
    module = site.layer if on_weight(site) else site.source
    nodes = [n for n in graph.nodes if n.op == "call_module" and net.get_submodule(str(n.target)) is module]
    if len(nodes) != 1:
        name = type(site.layer).__name__
        raise ValueError(f"{site.kind} noise of a {name} stands at {len(nodes)} places of the graph; expected 1")
    return nodes[0]


def _step(node: Node, net: nn.Module, args: Any, kwargs: Any, rule: ReluRule) -> Step:
    """The rule for a node with random input. `args` hold Moments where the input is random."""
    target: Any = net.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    x = args[0]
    match target:
        case nn.Linear():
            return linear(x, target.weight, target.bias)
        case nn.Conv2d():
            return conv2d(x, target)
        case _BatchNorm():
            return batch_norm(x, target)
        case _DropoutNd():
            return scale(x, target(torch.ones_like(x.mean)))  # moments given the mask
        case nn.Identity() | NoiseSource():  # whose noise is added where it is a site
            return scale(x, 1.0)
        case nn.ReLU():
            return relu(x, rule)
        case nn.Hardtanh():  # ReLU6 among them
            return clip(x, target.min_val, target.max_val, rule)
        case nn.GELU() | nn.SiLU() | nn.Tanh() | nn.Sigmoid() | nn.Softplus() | nn.ELU():
            return smooth(x, target, rule)
        case nn.MaxPool2d(ceil_mode=False, return_indices=False):
            return max_pool2d(x, target.kernel_size, target.stride, target.padding, target.dilation, rule=rule)
        case nn.AvgPool2d(padding=0 | (0, 0), ceil_mode=False, divisor_override=None):
            return _avg_pool(x, target.kernel_size, target.stride)
        case nn.AdaptiveAvgPool2d():
            return _adaptive(x, target.output_size)
        case nn.Flatten():
            return reshape(x, target(x.mean))
    return _functional_step(node, target, args, kwargs, rule)


def _functional_step(node: Node, target: Any, args: Any, kwargs: Any, rule: ReluRule) -> Step:
    """The rule for a function or tensor method; options it does not know make it unknown."""
    x, rest, random = args[0], args[1:], [isinstance(part, Moments) for part in args]
    options = {name: value for name, value in kwargs.items() if value is not None and value is not False}
    if target in _RELUS:
        return relu(x, rule)
    if target is F.relu6 or target is F.hardtanh:
        low, high = (0.0, 6.0) if target is F.relu6 else (*rest, *[-1.0, 1.0][len(rest) :])[:2]
        return clip(x, options.pop("min_val", low), options.pop("max_val", high), rule)
    if target in _SMOOTH:
        call: Any = getattr(torch, target) if isinstance(target, str) else target
        return smooth(x, lambda t: call(t, *rest, **options), rule)
    if target in _POOLS and not {"ceil_mode", "return_indices"} & options.keys():
        return max_pool2d(x, *rest, **options, rule=rule)
    if target is F.avg_pool2d and len(rest) < 3 and options.keys() <= {"kernel_size", "stride"}:
        return _avg_pool(x, *rest, **options)
    if target is F.adaptive_avg_pool2d:
        return _adaptive(x, *rest, **options)
    if target in _MEANS and options.keys() <= {"dim", "keepdim"}:
        return _mean(x, *rest, **options)
    if target in _RESHAPES:
        call = getattr(Tensor, target if isinstance(target, str) else target.__name__)
        return reshape(x, call(x.mean, *rest, **options))
    if target in _SUMS and not options:
        return add(x, rest[0])
    if target in _DIFFERENCES and not options:
        return add(x, rest[0], -1.0)
    if target in _PRODUCTS and sum(random) == 1:
        return scale(x, rest[0]) if random[0] else scale(rest[0], x)
    if target in _QUOTIENTS and random == [True, False] and not options:
        return scale(x, 1 / rest[0])
    raise ValueError(f"no moment rule for {node.op} {node.name} ({target}); use structure=jacobian")


def _evaluate(node: Node, net: nn.Module, args: Any, kwargs: Any) -> Any:
    """A node of noise-free value (or one that only asks for a shape)."""
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(net)
    if node.op == "call_module":
        layer = net.get_submodule(str(node.target))
        if isinstance(layer, _BatchNorm):
            return batch_norm(Moments(args[0], torch.zeros_like(args[0])), layer).out.mean
        if isinstance(layer, NoiseSource):
            return args[0]
        return layer(*args, **kwargs)
    args = [part.mean if isinstance(part, Moments) else part for part in args]
    call: Any = getattr(type(args[0]), str(node.target)) if node.op == "call_method" else node.target
    return call(*args, **kwargs)


def _graph(net: nn.Module) -> Graph:
    """The network's traced graph, kept while the network lives; a max-pool behind a ReLU is moved before it.

    Both orders compute the same, but the pre-activations are Gaussian and the rectified ones are not, so the moments of
    the pooled ones are nearer to the truth.
    """
    kept = _GRAPHS.setdefault(net, {})
    if net.training not in kept:
        try:
            graph = Tracer().trace(net)
        except Exception as error:  # tracing runs the network's own code with symbols, so anything may come out
            raise ValueError(f"cannot trace {type(net).__name__} ({error}); use structure=jacobian") from error
        for node in list(graph.nodes):
            users = list(node.users)
            if _is(node, net, nn.ReLU, _RELUS) and len(users) == 1 and _is(users[0], net, nn.MaxPool2d, _POOLS):
                pool, before = users[0], node.args[0]
                pool.replace_all_uses_with(node)
                pool.replace_input_with(node, before)
                node.replace_input_with(before, pool)
                pool.append(node)
        insert_sources(graph, net)
        graph.lint()
        kept[net.training] = graph
    return kept[net.training]


def _inputs(node: Node) -> list[Node]:
    """Arguments in order; one that stands twice (x + x) comes twice, unlike in `all_input_nodes`."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _is(node: Node, net: nn.Module, kind: Any, functions: tuple[Any, ...] = ()) -> bool:
    if node.op == "call_module":
        return isinstance(net.get_submodule(str(node.target)), kind)
    return node.target in functions


def _avg_pool(x: Moments, kernel_size: Any, stride: Any = None) -> Step:
    return average(x, lambda t: F.avg_pool2d(t, kernel_size, stride), math.prod(_pair(kernel_size)))


def _adaptive(x: Moments, output_size: Any) -> Step:
    size, (high, wide) = x.mean.shape[2:], _pair(output_size)
    if size[0] % high or size[1] % wide:
        raise ValueError(f"adaptive pooling of {tuple(size)} to {output_size} has unequal windows; no moment rule")
    return average(x, lambda t: F.adaptive_avg_pool2d(t, output_size), size[0] * size[1] // (high * wide))


def _mean(x: Moments, dim: Any, keepdim: bool = False) -> Step:
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    return average(x, lambda t: t.mean(dims, keepdim=keepdim), math.prod(x.mean.shape[d] for d in dims))
