"""Element-wise moments through a whole network: the rules of `bench.noise.layer_moments` along its traced graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bench.core.stochastic import NoiseSource, OwnNoise
from bench.noise import graph as ops
from bench.noise import layer_moments as rules
from bench.noise.graph import arguments, evaluate, module_of, pools_first
from bench.noise.injection import Site, no_first_layer, on_weight
from bench.noise.layer_moments import Moments, ReluRule, Step
from bench.noise.max_pooling import max_pool2d
from bench.noise.weight_noise import weight_step

SiteVariance = Callable[[Tensor], Tensor]  # quantity (weights) at the site -> its noise variance, broadcastable to it
_SMOOTH = (F.gelu, F.silu, F.softplus, F.elu, torch.tanh, torch.sigmoid, "tanh", "sigmoid")


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
    nodes = zip((site_node(graph, net, site) for site in sites), sites, variances, strict=True)
    noise_at, spreads = dict[Node, SiteVariance](), dict[Node, Tensor]()
    for node, site, variance in nodes:
        if on_weight(site):
            spreads[node] = variance(site.weight).expand_as(site.weight)
        else:
            noise_at[node] = variance
    noisy: dict[Node, tuple[Tensor, Tensor]] = {}
    with torch.autocast(x.device.type, enabled=False):
        for node in graph.nodes:
            sources = [source for source in arguments(node) if isinstance(values[source], Moments)]
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = x if x.dtype == torch.float64 else x.float()
            elif node.op == "output":
                return Propagation(args[0], {site: noisy[site] for site in noise_at}, node.args[0], steps)
            elif (not sources and node not in spreads) or node.target in ops.SHAPE_QUERIES:
                values[node] = _noise_free(node, net, args, kwargs)
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


def site_node(graph: Graph, net: nn.Module, site: Site) -> Node:
    """The graph's node for a site: of an image, a layer or a noise source. Raises ValueError where the network lacks
    it, or where its own noise has several nodes, whose draws differ."""
    modules = [(node, module_of(node, net)) for node in graph.nodes]
    if isinstance(site, OwnNoise):
        wanted = site.layer if on_weight(site) else site.source
        nodes = [node for node, module in modules if module is wanted]
        if len(nodes) != 1:
            layer = type(site.layer).__name__
            raise ValueError(f"the {site.kind} noise of a {layer} occurs {len(nodes)} times in the graph; expected 1")
        return nodes[0]
    for node, module in modules:
        if node.op == "placeholder" if site == "input" else isinstance(module, (nn.Conv2d, nn.Linear)):
            return node
    raise no_first_layer(net)


def _step(node: Node, net: nn.Module, args: Any, kwargs: Any, rule: ReluRule) -> Step:
    """The rule for a node with random input. `args` hold Moments where the input is random."""
    layer, x = module_of(node, net), args[0]
    match layer:
        case nn.Linear() | nn.Conv2d():
            return rules.weighted(x, layer)
        case _BatchNorm():
            return rules.batch_norm(x, layer)
        case _DropoutNd():
            return rules.scale(x, layer(torch.ones_like(x.mean)))  # moments given the mask
        case NoiseSource():  # its noise is added where it is a site
            return rules.scale(x, 1.0)
        case None:
            step = _functional_step(node.target, x, args[1:], kwargs, rule)
            if step is not None:
                return step
    raise ValueError(f"no moment rule for {node.op} {node.name} ({layer or node.target}); use structure=jacobian")


def _functional_step(target: Any, x: Any, rest: tuple[Any, ...], kwargs: Any, rule: ReluRule) -> Step | None:
    """The rule for a function or tensor method of `x` and `rest`; None for one that is unknown or has options that
    are."""
    options = {n: v for n, v in kwargs.items() if v is not None and v is not False and n != "inplace"}
    random = [isinstance(part, Moments) for part in (x, *rest)]
    if target in ops.RELUS:
        return rules.relu(x, rule)
    if target is F.relu6 or target is F.hardtanh:
        low, high = (0.0, 6.0) if target is F.relu6 else (*rest, *[-1.0, 1.0][len(rest) :])[:2]
        return rules.clip(x, options.get("min_val", low), options.get("max_val", high), rule)
    if target in _SMOOTH:
        call: Any = getattr(torch, target) if isinstance(target, str) else target
        return rules.smooth(x, lambda t: call(t, *rest, **options), rule)
    if target in ops.MAX_POOLS and not {"ceil_mode", "return_indices"} & options.keys():
        return max_pool2d(x, *rest, **options, rule=rule)
    if target is F.avg_pool2d:
        return rules.avg_pool2d(x, *rest, **options)
    if target is F.adaptive_avg_pool2d:
        return rules.adaptive_avg_pool2d(x, *rest, **options)
    if target in ops.MEANS and options.keys() <= {"dim", "keepdim"}:
        return rules.mean(x, *rest, **options)
    if target in ops.RESHAPES:
        call = getattr(Tensor, target if isinstance(target, str) else target.__name__)
        return rules.reshape(x, call(x.mean, *rest, **options))
    if target in (*ops.SUMS, *ops.DIFFERENCES) and not options:
        return rules.add(x, rest[0], -1.0 if target in ops.DIFFERENCES else 1.0)
    if target in ops.PRODUCTS and sum(random) == 1:
        return rules.scale(x, rest[0]) if random[0] else rules.scale(rest[0], x)
    if target in ops.QUOTIENTS and random == [True, False] and not options:
        return rules.scale(x, 1 / rest[0])
    return None


def _noise_free(node: Node, net: nn.Module, args: Any, kwargs: Any) -> Any:
    """The value of a node without random input, or of one that only asks for a shape. Buffers do not move."""
    layer = module_of(node, net)
    if isinstance(layer, _BatchNorm):
        return rules.batch_norm(Moments(args[0], torch.zeros_like(args[0])), layer).out.mean
    args = [part.mean if isinstance(part, Moments) else part for part in args]
    return evaluate(node, net, args, kwargs)


def _graph(net: nn.Module) -> Graph:
    """The network's graph, with max-pools before ReLUs: moments of the pooled pre-activations, which are Gaussian, are
    nearer to the truth than those of rectified ones."""
    try:
        return pools_first(net)
    except ValueError as error:
        raise ValueError(f"{error}; use structure=jacobian") from error
