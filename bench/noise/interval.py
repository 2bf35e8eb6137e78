"""z_y - z_j >= min {A z : low <= z <= high},  a lower bound of each margin of a net over an Linf ball of images

Interval bounds (Gowal et al. 2018, arXiv 1810.12715): a box of images goes through the layers one by one, and the last
linear layers are merged with the rows e_y - e_j of the margins. CROWN-IBP (Zhang et al. 2020, arXiv 1906.06316): the
rows are carried back to the image, through linear bounds of the activations over these boxes.

Both are bounds in exact arithmetic. `proved` also covers the rounding of the net that is attacked.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from bench.core.classifier import Classifier
from bench.core.epsilon import ROUNDING
from bench.core.threat import Threat
from bench.noise import box_rules as rules
from bench.noise import graph as ops
from bench.noise.box_rules import Box, Hull, least
from bench.noise.graph import arguments, evaluate, module_of, pools_first
from bench.noise.layer_moments import pair

Method = Literal["interval", "crown"]
METHODS: tuple[Method, ...] = ("interval", "crown")
# 8 times the rounding error of float32: sums of products in Winograd's order err more than by the worst case of a plain
# sum, and the bounds themselves are rounded, in float64
UNIT = 2.0**-21
_RISING = (torch.tanh, torch.sigmoid, F.softplus, F.relu6, F.hardtanh, torch.clamp, "tanh", "sigmoid", "clamp")
_MOVES = (torch.permute, torch.transpose, "permute", "transpose", "contiguous", "clone")


class Run(NamedTuple):
    """A box in front of the first layer, and of each node behind it that depends on the image its sources and hull."""

    image: Node
    box: Box
    hulls: dict[Node, tuple[list[Node], Hull]]
    exit: Node


def ball(x: Tensor, radius: float, slack: float = 0.0) -> Box:
    """The images (b c h w, in [0,1]) within `radius` of each `x` under Linf, both sets widened by `slack`."""
    reach = radius + slack
    return Box((x - reach).clamp(-slack, 1 + slack), (x + reach).clamp(-slack, 1 + slack))


def run(net: nn.Module, box: Box, unit: float = 0.0) -> Run:
    """Carry a box of images through the net's graph, in the precision of the box; no buffer moves.

    Differentiable in the weights. Raises ValueError in one line, naming the layer for which there is no rule, and where
    the net cannot be traced.
    """
    graph, values, hulls = pools_first(net), dict[Node, Any](), dict[Node, tuple[list[Node], Hull]]()
    with torch.autocast(box.low.device.type, enabled=False):
        for node in graph.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            sources = [source for source in arguments(node) if isinstance(values[source], Box)]
            if node.op == "placeholder":
                values[node], image = box, node
            elif node.op == "output":
                if not isinstance(args[0], Box) or args[0].low.dim() != 2:
                    raise ValueError(f"bounds need logits of shape b k from {type(net).__name__}")
                return Run(image, box, hulls, node.args[0])
            elif not sources or node.target in ops.SHAPE_QUERIES:
                own = [part.low if isinstance(part, Box) else part for part in args]
                values[node] = evaluate(node, net, own, kwargs)
            else:
                hull = _hull(node, net, args, kwargs, unit)
                values[node], hulls[node] = hull.out, (sources, hull)
    raise AssertionError("a traced graph ends in an output node")


def logit_box(found: Run) -> Box:
    """Bounds of the logits, both b k."""
    return found.hulls[found.exit][1].out if found.exit in found.hulls else found.box


def margins(found: Run, y: Tensor, method: Method) -> Tensor:
    """Lower bounds of z_y - z_j for each class j, shape b k; 0 for j = y."""
    low = logit_box(found).low
    classes = low.shape[1]
    others = torch.arange(classes - 1, device=y.device)[:, None]
    others = others + (others >= y)  # k-1 b: the classes other than y
    rows = (F.one_hot(y, classes) - F.one_hot(others, classes)).to(low.dtype)
    with torch.autocast(low.device.type, enabled=False):
        bounds = _merged(found, rows) if method == "interval" else _carried_back(found, rows)
    return torch.zeros_like(low).scatter(1, others.T, bounds.T)


def _merged(found: Run, rows: Tensor) -> Tensor:
    """The rows through the linear layers at the end, and their minimum over the box in front of these."""
    node, constant = found.exit, rows.new_zeros(rows.shape[:2])
    while node in found.hulls and found.hulls[node][1].linear and len(found.hulls[node][0]) == 1:
        ((node,), hull) = found.hulls[node]
        (before,), added = hull.back(rows)
        assert before is not None  # of a linear layer
        rows, constant = before, constant + added
    return constant + least(rows, found.hulls[node][1].out if node in found.hulls else found.box)


def _carried_back(found: Run, rows: Tensor) -> Tensor:
    """The rows through all layers, and their minimum over the box of images."""
    waiting, constant = {found.exit: rows}, rows.new_zeros(rows.shape[:2])
    for node, (sources, hull) in reversed(found.hulls.items()):
        if node not in waiting:
            continue  # does not reach the logits, or only through constants
        parts, added = hull.back(waiting.pop(node))
        constant = constant + added
        for source, part in zip(sources, parts, strict=True):
            if part is not None:
                waiting[source] = waiting[source] + part if source in waiting else part
    return constant + least(waiting[found.image], found.box) if found.image in waiting else constant


def _hull(node: Node, net: nn.Module, args: Any, kwargs: Any, unit: float) -> Hull:
    """The rule of a node whose value depends on the image. `args` hold a Box where the value does."""
    layer, x = module_of(node, net), args[0]
    try:
        match layer:
            case nn.Linear() | nn.Conv2d():
                return rules.weighted(x, layer, unit)
            case _BatchNorm():
                return rules.batch_norm(x, layer, unit)
            case _DropoutNd():
                return rules.scaled(x, layer(torch.ones_like(x.low)), unit)  # given the mask
            case nn.LeakyReLU() if layer.negative_slope >= 0:
                return rules.rising(x, lambda t: F.leaky_relu(t, layer.negative_slope), unit)
            case nn.ReLU6():
                return rules.rising(x, F.relu6, unit)
            case None:
                hull = _functional(node.target, x, args[1:], kwargs, unit)
                if hull is not None:
                    return hull
    except ValueError as error:
        raise ValueError(f"{error} ({node.name} of {type(net).__name__})") from error
    known = layer if layer is not None else getattr(node.target, "__name__", node.target)
    raise ValueError(f"no interval bounds for {node.name} of {type(net).__name__} ({known})")


def _functional(target: Any, x: Any, rest: tuple[Any, ...], kwargs: Any, unit: float) -> Hull | None:
    """The rule of a function or tensor method of `x` and `rest`; None for one that is unknown or has options that
    are."""
    options = {n: v for n, v in kwargs.items() if v is not None and v is not False and n != "inplace"}
    boxes = [isinstance(part, Box) for part in (x, *rest)]
    if target in (*ops.SUMS, *ops.DIFFERENCES) and not options:
        return rules.total((x, rest[0]), -1.0 if target in ops.DIFFERENCES else 1.0, unit)
    if target in ops.PRODUCTS and boxes in ([True, False], [False, True]) and not options:
        return rules.scaled(x, rest[0], unit) if boxes[0] else rules.scaled(rest[0], x, unit)
    if target in ops.QUOTIENTS and boxes == [True, False] and not options:
        return rules.scaled(x, 1 / (rest[0].to(x.low) if isinstance(rest[0], Tensor) else rest[0]), unit)
    if sum(boxes) != 1 or not boxes[0]:
        return None
    call: Any = getattr(torch.Tensor, target) if isinstance(target, str) else target
    if target in ops.RELUS:
        return rules.relu(x)
    if target in _RISING or (target is F.elu and options.get("alpha", (*rest, 1.0)[0]) > 0):
        own = () if target in (F.relu6, F.elu) else rest  # without their flag `inplace`
        own = rest[:1] if target is F.elu else rest[:2] if target is F.hardtanh else own
        return rules.rising(x, lambda t: call(t, *own, **options), unit)
    if target is F.leaky_relu and (slope := options.get("negative_slope", (*rest, 0.01)[0])) >= 0:
        return rules.rising(x, lambda t: F.leaky_relu(t, slope), unit)
    if target is F.silu:
        return rules.dipping(x, F.silu, rules.MINIMUM_OF_SILU, unit)
    if target is F.gelu:
        exact = options.get("approximate", "none") == "none"
        at = rules.MINIMUM_OF_GELU if exact else rules.MINIMUM_OF_GELU_TANH
        return rules.dipping(x, lambda t: F.gelu(t, **options), at, unit)
    if target in ops.MAX_POOLS and not {"ceil_mode", "return_indices"} & options.keys():
        return rules.max_pool2d(x, *rest, **options)
    if target in (F.avg_pool2d, F.adaptive_avg_pool2d):
        kernel = options.get("kernel_size", (*rest, None)[0]) if target is F.avg_pool2d else x.low.shape[2:]
        return rules.average(x, lambda t: call(t, *rest, **options), unit, math.prod(pair(kernel)))
    if target in ops.MEANS and options.keys() <= {"dim", "keepdim"}:
        return rules.average(x, lambda t: call(t, *rest, **options), unit)
    if target in ops.RESHAPES:
        return rules.reshaped(x, call(x.low, *rest, **options))
    if target in _MOVES or (target is F.pad and not options.get("value", (*rest, 0, 0)[2])):
        return rules.moved(x, lambda t: call(t, *rest, **options))
    return None


def obstacle(model: nn.Module, x: Tensor) -> str | None:
    """Why bounds prove nothing of a deployed model, or None: it must predict by the largest logit of one net, in
    float32 or better, and the net must compute what its graph says. `x`: images (b c h w) to compare on."""
    net = model.decisive() if isinstance(model, Classifier) else None
    if net is None:
        return "interval bounds need a deterministic net that predicts by its largest logit"
    if any(module._forward_hooks or module._forward_pre_hooks for module in net.modules()):
        return f"interval bounds need {type(net).__name__} without hooks, which may change what a layer computes"
    if any(t.is_floating_point() and t.dtype not in (torch.float32, torch.float64) for t in model.parameters()):
        return "interval bounds need weights in float32 or float64"
    if x.device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        return "interval bounds cover the rounding of float32, and this process computes in TF32"
    try:
        with torch.no_grad():
            logits = model(x).double()
            out = logit_box(run(net, Box(x.double(), x.double()), UNIT))
    except ValueError as error:
        return str(error)
    inside = (out.low <= logits) & (logits <= out.high)
    return None if bool(inside.all()) else f"{type(net).__name__} does not compute what its graph says"


def proved(model: Classifier, x: Tensor, y: Tensor, threat: Threat, method: Method) -> Tensor:
    """Lower bounds (b, float64) of the smallest margin z_y - z_j of images `x` (b c h w) over the Linf ball of the
    threat and the pixel box, as the model computes it in float32.

    Above 0 no image that an attack may return (up to the tolerance of its check) is classified other than as `y`. The
    model must have no `obstacle`; the size of its passes does not matter.
    """
    box = ball(x.double(), threat.radius * (1 + ROUNDING), ROUNDING)
    with torch.no_grad():
        bounds = margins(run(model.net, box, UNIT), y, method)
    return bounds.scatter(1, y[:, None], math.inf).amin(1)
