"""C6: test-time optimization: automatic differentiation and repeated layers inside one prediction."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from bench.core.classifier import frozen
from bench.core.rng import scope, seed
from bench.soundness.audit import Audit
from bench.soundness.catalog import LAYER_RUNS
from bench.soundness.checks import Check, Finding, Level, NotMeasured
from bench.terminal import counted

IMAGES = 8
# every reverse pass goes through the engine's entry, torch.func and Tensor.backward included; `make_dual` starts every
# forward-mode derivative
_ENTRIES = ((torch.autograd, "_engine_run_backward"), (forward_ad, "make_dual"))


def no_test_time_optimization(check: Check, audit: Audit) -> Iterator[Finding]:
    """C6: a forward pass without gradients takes no derivative and repeats no layer often."""
    x = audit.x[:IMAGES]
    with frozen(audit.model), scope(seed(audit.seed, "inner")), torch.no_grad():
        with autograd_calls() as calls:
            audit.model(x)
        if calls[0]:
            note = f"{calls[0]} calls of automatic differentiation in one forward pass without gradients"
            yield check.finding(float(calls[0]), note)
            return
        if any(isinstance(module, torch.jit.ScriptModule) for module in audit.model.modules()):
            raise NotMeasured("TorchScript hides its layers and derivatives; give the model as Python code")
        if audit.model.stochastic:
            yield check.finding(0.0, "draws of a stochastic model are not counted as repeated layers")
            return
        with layer_runs(audit.model) as runs:
            audit.model.predict(x[:1])  # of one image: a model may call its layers for one after the other
    if (found := repeats(runs)) is None:
        raise NotMeasured("no layer with weights of its own was seen to run")
    typical, most = found
    level: Level = "U" if typical > LAYER_RUNS else "F" if most > LAYER_RUNS else "ok"
    note = f"layers run {counted(typical, 'time')} in one prediction, the busiest {counted(most, 'time')}"
    yield Finding(check.code, level, float(max(typical, most)), float(LAYER_RUNS), note)


@contextmanager
def autograd_calls() -> Iterator[list[int]]:
    """Count calls of automatic differentiation inside; the functions are restored afterwards."""
    calls = [0]

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return function(*args, **kwargs)

        return call

    saved = [(module, name, getattr(module, name)) for module, name in _ENTRIES]
    try:
        for module, name, function in saved:
            setattr(module, name, counting(function))
        yield calls
    finally:
        for module, name, function in saved:
            setattr(module, name, function)


@contextmanager
def layer_runs(model: nn.Module) -> Iterator[dict[nn.Module, int]]:
    """Count how often each layer with weights of its own runs inside, other than those of TorchScript."""
    shown = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    runs = {module: 0 for module in shown if next(module.parameters(recurse=False), None) is not None}

    def count(layer: nn.Module, args: Any) -> None:
        runs[layer] += 1

    with ExitStack() as hooks:
        for layer in runs:
            hooks.enter_context(layer.register_forward_pre_hook(count))
        yield runs


def repeats(runs: dict[nn.Module, int]) -> tuple[float, int] | None:
    """Runs of the median layer and of the busiest one among those that ran; None where none did."""
    ran = [count for count in runs.values() if count]
    return (statistics.median(ran), max(ran)) if ran else None
