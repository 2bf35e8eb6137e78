"""Seconds of a forward pass of an architecture on this device, measured in a child process: it needs torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench import plugins
from bench.data.datasets import Facts
from bench.data.images import to_channels_last
from bench.jobs import user_model
from bench.models.common import Inputs
from bench.planning.job import ImportJob
from bench.training.cost import synchronize

Times = dict[str, float]

SMALL, LARGE = 16, 256  # images of the two batches that are timed
SECONDS = 0.4  # time spent on each batch; at least one pass is timed
LONGEST = 0.05  # seconds that a large batch may take: a slow model is timed with a smaller one


def measure(name: str, settings: dict[str, Any], facts: Facts, device: str, environment: dict[str, str]) -> Times:
    """Times of an architecture of bench on a data set's images. Raises ValueError if it cannot be built."""
    inputs = Inputs(facts.channels, facts.size, facts.classes, facts.mean, facts.std)
    return _timed(lambda: plugins.build_model(name, settings, inputs), facts, device, environment)


def measure_user_model(job: ImportJob, facts: Facts, device: str, environment: dict[str, str]) -> Times:
    """Times of the net that a user's model file builds. Raises ValueError if it cannot be built."""
    return _timed(lambda: user_model.build(job, facts), facts, device, environment)


def _timed(build: Callable[[], nn.Module], facts: Facts, device: str, environment: dict[str, str]) -> Times:
    """Seconds of one pass F of `b` images as call + image * b, and seconds of one optimizer update.

    F is half of a forward pass with the backward pass to the images, since attacks and inner maximizations repeat that.
    """
    os.environ.update(environment)
    where = torch.device(device)
    if where.type == "cpu":
        torch.set_num_threads(1)
    net = build().to(where).eval()
    x = to_channels_last(torch.rand(LARGE, facts.channels, facts.size, facts.size, device=where))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    F.cross_entropy(net(x[:SMALL]), torch.zeros(SMALL, dtype=torch.int64, device=where)).backward()
    update = _seconds(optimizer.step, where)
    for parameter in net.parameters():
        parameter.requires_grad_(False)

    def both(images: torch.Tensor) -> None:
        images = images.detach().requires_grad_(True)
        torch.autograd.grad(net(images).sum(), images)

    small = _seconds(lambda: both(x[:SMALL]), where) / 2
    count = max(min(LARGE, int(SMALL * LONGEST * 8 / max(small, 1e-9))), 2 * SMALL)
    large = _seconds(lambda: both(x[:count]), where) / 2
    image = max((large - small) / (count - SMALL), 0.0)
    return {"call": max(small - image * SMALL, 0.0), "image": image, "update": update}


def _seconds(work: Any, device: torch.device) -> float:
    """Median time of a call, after two calls for warm-up."""
    times, began = list[float](), time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < SECONDS and len(times) < 1000):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    rest = sorted(times[2:])
    return rest[len(rest) // 2]
