"""`train.precision=auto`: whether training passes in bf16 are worth it on this device, by a probe of a second."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.core.classifier import keep_buffers
from bench.core.rng import scope
from bench.training.cost import synchronize
from bench.training.optimizer import autocast_forward

SPEEDUP = 1.5  # below it fp32 is kept, whose results are those of every other machine
SECONDS = 1.0
PRECISIONS = ("fp32", "bf16")


def probe(net: nn.Module, x: Tensor, y: Tensor) -> str:
    """`bf16` if a forward and backward pass of a batch (`x` b c h w, labels `y`) is 1.5 times as fast in it, else
    `fp32`. Weights, gradients, buffers and random generators are left as they were.

    Both are timed in turn for a second, at least twice, after one pass that is not counted. The shortest times decide,
    on a CPU those of the process: other work on the machine lengthens them least.
    """
    times = {precision: list[float]() for precision in PRECISIONS}
    with keep_buffers(net), scope(0):
        for precision in PRECISIONS:
            _seconds(net, x, y, precision)
        started = time.perf_counter()
        while len(times["bf16"]) < 2 or time.perf_counter() - started < SECONDS:
            for precision, found in times.items():
                found.append(_seconds(net, x, y, precision))
    return "bf16" if min(times["fp32"]) >= SPEEDUP * min(times["bf16"]) else "fp32"


def _seconds(net: nn.Module, x: Tensor, y: Tensor, precision: str) -> float:
    """Seconds of one forward and backward pass to the weights."""
    weights = [p for p in net.parameters() if p.requires_grad]
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    synchronize(x.device)
    started = clock()
    with autocast_forward(net, precision):
        torch.autograd.grad(F.cross_entropy(net(x), y), weights, allow_unused=True)
    synchronize(x.device)
    return clock() - started
