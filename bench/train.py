"""The training loop. It knows interfaces only, no method by name."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench import plugins
from bench.core.classifier import Classifier, keep_buffers
from bench.core.defense import Batch, Defense, Terms
from bench.core.rng import scope, seed
from bench.data import Data, batches
from bench.models.common import Inputs

Report = Callable[[dict[str, Any]], None]


class Diverged(RuntimeError):
    """The loss stopped being a finite number: the run is stopped, marked and never ranked."""


@dataclass
class Optimisation:
    """The defense's Updater: one optimiser step on the sum of the terms, then one tick of the schedule."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: int = 0

    def descend(self, terms: Terms) -> None:
        """Minimise the sum of the terms by one step."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.stack(list(terms.values())).sum()
        total.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.steps += 1


def build(what: dict[str, Any], data: Data) -> tuple[Defense, nn.Module]:
    """Defense and wrapped, untrained net of a training job, on the data's device.

    The initial weights depend on the seed and the architecture only, never on the defense, so runs are paired.
    """
    defense: Defense = plugins.make("defenses", what["defense"]["name"], what["defense"]["set"], what["threat"])
    facts = data.facts
    inputs = Inputs(facts.channels, facts.size, facts.classes, facts.mean, facts.std)
    with scope(seed(what["seed"], "init", what["model"]["name"])):
        net = plugins.build_model(what["model"]["name"], what["model"]["set"], inputs)
        net = defense.wrap(net)
    net = net.to(data.train.x.device)
    if any(isinstance(m, nn.Conv2d) for m in net.modules()):
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return defense, net


def train(what: dict[str, Any], data: Data, log: Path, report: Report) -> tuple[Classifier, dict[str, Any]]:
    """Train from scratch and give the deployed model and the metrics of the run.

    One line of train.jsonl an epoch: terms (mean over its steps), metrics of the defense, seconds.
    Raises Diverged when an epoch's loss is not finite.
    """
    loop = _Loop(what, data, report)
    epochs, seconds = what["train"]["epochs"], []
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as lines, scope(seed(what["seed"], "inner")):
        for epoch in range(epochs):
            started = time.perf_counter()
            terms = loop.epoch(epoch)
            seconds.append(time.perf_counter() - started)
            own = {name: float(value) for name, value in loop.defense.metrics(loop.net).items()}
            line = {"epoch": epoch + 1, "seconds": round(seconds[-1], 4), **terms, **own}
            lines.write(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
            lines.flush()
            if not all(math.isfinite(value) for value in terms.values()):
                raise Diverged(f"loss is not finite in epoch {epoch + 1} of {epochs}: {terms}")
            share = (epoch + 1) / epochs
            report({"epoch": epoch + 1, "epochs": epochs, "share": share, "loss": sum(terms.values())})
    elapsed = time.perf_counter() - began
    model = loop.defense.deploy(loop.net.eval())
    return model, {
        "train_seconds": elapsed,
        "seconds_per_epoch": sum(seconds) / len(seconds),
        "epochs": epochs,
        "steps": loop.updater.steps,
        "final_terms": terms,
        "defense": {name: value for name, value in own.items() if math.isfinite(value)},
        "parameters": sum(p.numel() for p in loop.net.parameters()),
        "inference_ms_per_image": inference_ms(model, data),
        "deploys": loop.defense.deploys,
        **loop.cost,
    }


class _Loop:
    """One training: the defense, its net and optimiser, and the pass through an epoch."""

    def __init__(self, what: dict[str, Any], data: Data, report: Report) -> None:
        self.defense, self.net = build(what, data)
        self.settings, self.seed, self.data, self.report = what["train"], what["seed"], data, report
        self.steps_per_epoch = max(len(data.train.x) // self.settings["batch_size"], 1)
        self.updater = _optimisation(self.defense, self.net, self.settings, self.steps_per_epoch)
        self.threat = self.defense.threat
        self.cost: dict[str, float] = {}
        self.net.train()

    def epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training images; the mean of each term. The only host sync is at its end."""
        settings, sums = self.settings, dict[str, Tensor]()
        loader = batches(
            self.data.train,
            min(settings["batch_size"], len(self.data.train.x)),
            shuffle_seed=seed(self.seed, "order", epoch),
            augment=settings["augment"],
            drop_last=True,
        )
        for place, (x, y, index) in enumerate(loader):
            progress = (epoch + place / self.steps_per_epoch) / settings["epochs"]
            if settings["eps_warmup"]:
                self.defense.threat = self.threat.scaled(progress / settings["eps_warmup"])
            batch = Batch(_layout(x), y, index, epoch, progress)
            if not self.cost:
                terms, self.cost = _counted_step(self.defense, self.net, self.updater, batch)
            else:
                terms = self.defense.step(self.net, self.updater, batch)
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value.detach()
            if place % 50 == 0:
                self.report({"epoch": epoch + 1, "epochs": settings["epochs"], "share": progress})
        self.defense.threat = self.threat
        return {name: float(value) / self.steps_per_epoch for name, value in sums.items()}


def inference_ms(model: Classifier, data: Data, images: int = 64, repeats: int = 5) -> float:
    """Milliseconds an image of the deployed prediction (all its draws), best of several passes over one batch."""
    x = _layout(data.test.x[:images].float() / 255)
    times = []
    with torch.no_grad():
        for _ in range(repeats):
            _synchronise(x.device)
            started = time.perf_counter()
            model.predict(x)
            _synchronise(x.device)
            times.append(time.perf_counter() - started)
    return min(times) * 1000 / len(x)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _layout(x: Tensor) -> Tensor:
    """channels_last images where there is more than one channel to interleave (the nets' weights are already so)."""
    return x.contiguous(memory_format=torch.channels_last) if x.shape[1] > 1 else x


def _optimisation(defense: Defense, net: nn.Module, settings: dict[str, Any], steps_per_epoch: int) -> Optimisation:
    """Optimiser and schedule of the recipe over the defense's groups; `lr_scale` of a group multiplies the rate."""
    groups = []
    for group in defense.param_groups(net):
        own = {name: value for name, value in group.items() if name != "lr_scale"}
        groups.append(
            {"weight_decay": settings["weight_decay"], **own, "lr": settings["lr"] * group.get("lr_scale", 1)}
        )
    optimizer: torch.optim.Optimizer
    if settings["optimizer"] == "sgd":
        optimizer = torch.optim.SGD(groups, lr=settings["lr"], momentum=settings["momentum"])
    else:
        optimizer = torch.optim.Adam(groups, lr=settings["lr"])
    total = steps_per_epoch * settings["epochs"] * defense.updates_per_batch
    factor = _SCHEDULES[settings["schedule"]]
    # progress counts optimiser steps, so a defense that replays a batch advances the schedule too
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(min(step / total, 1.0)))
    return Optimisation(optimizer, scheduler)


_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "step": lambda p: 1.0 if p < 0.5 else 0.1 if p < 0.75 else 0.01,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "one_cycle": lambda p: max(p / 0.3, 1e-3) if p < 0.3 else max((1 - p) / 0.7, 1e-3),
}


class _Flops(TorchDispatchMode):
    """Counts the work of convolutions and matrix products.

    torch's FlopCounterMode does it by module too, with hooks that refuse autograd.grad at a leaf (every attack step).
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and add what the registry of torch says it costs."""
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def _counted_step(
    defense: Defense, net: nn.Module, updater: Optimisation, batch: Batch
) -> tuple[Terms, dict[str, float]]:
    """A training step with its cost counted: passes through the net, and work in units of one forward pass F.

    F counts every convolution and matrix product, so methods that bypass the net's forward are counted alike.
    """
    counts = {"forwards": 0, "backwards": 0}

    def backward(grad: Tensor) -> None:
        counts["backwards"] += len(batch.x)

    def forward(module: nn.Module, args: Any, logits: Any) -> None:
        counts["forwards"] += len(args[0])
        if isinstance(logits, Tensor) and logits.requires_grad:
            logits.register_hook(backward)

    handle = net.register_forward_hook(forward)
    with _Flops() as step:
        terms = defense.step(net, updater, batch)
    handle.remove()
    with _Flops() as single, torch.no_grad(), keep_buffers(net):
        net(batch.x)
    n = len(batch.x)
    return terms, {
        "forwards_per_image": counts["forwards"] / n,
        "backwards_per_image": counts["backwards"] / n,
        "work_per_image_f": step.total / max(single.total, 1),
    }
