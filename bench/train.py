"""A training job from the first weights to the deployed model and the metrics of its record."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import plugins
from bench.choice import content_hash
from bench.core.classifier import Classifier
from bench.core.defense import Defense
from bench.core.rng import scope, seed
from bench.cost import inference_ms
from bench.data import Data, layout, to_float
from bench.loop import Loop
from bench.models.common import Inputs

Report = Callable[[dict[str, Any]], None]


class Trained(NamedTuple):
    """The deployed model with the last weights (averaged ones where the recipe averages), the state of the net that
    validation chose (None where it chooses none), and the metrics of the run."""

    model: Classifier
    best: dict[str, Tensor] | None
    metrics: dict[str, Any]


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


def train(what: dict[str, Any], data: Data, log: Path, report: Report) -> Trained:
    """Train from scratch.

    One line of train.jsonl an epoch: terms (mean over its steps), metrics of the defense, seconds, validation accuracy
    where it is taken. `train_seconds` leaves out what guards, validation and the defense's own metrics took
    (`check_seconds`).
    Raises Diverged when an epoch's loss or weights are not finite, Collapsed when the net fell to chance.
    """
    loop = Loop(*build(what, data), what, data, report)
    epochs, seconds = loop.settings["epochs"], []
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as lines, scope(seed(what["seed"], "inner")):
        for epoch in range(epochs):
            started = time.perf_counter()
            terms = loop.epoch(epoch)
            seconds.append(time.perf_counter() - started)
            looking = time.perf_counter()
            own = {name: float(value) for name, value in loop.defense.metrics(loop.net).items()}
            loop.check_seconds += time.perf_counter() - looking
            found, problem = loop.check(epoch, terms)
            line = {"epoch": epoch + 1, "seconds": round(seconds[-1], 4), **terms, **own, **found}
            lines.write(json.dumps({k: v if math.isfinite(v) else None for k, v in line.items()}) + "\n")
            lines.flush()
            if problem is not None:
                raise problem
            share = (epoch + 1) / epochs
            report({"epoch": epoch + 1, "epochs": epochs, "share": share, "loss": sum(terms.values())})
    model = loop.deploy()
    elapsed = time.perf_counter() - began - loop.check_seconds
    return Trained(
        model,
        loop.choice.state or None,
        {
            "train_seconds": elapsed,
            "check_seconds": loop.check_seconds,
            "seconds_per_epoch": sum(seconds) / len(seconds),
            "epochs": epochs,
            "steps": loop.updater.steps,
            "active_steps": loop.active(),
            "final_terms": terms,
            "defense": {name: value for name, value in own.items() if math.isfinite(value)},
            "parameters": sum(p.numel() for p in loop.net.parameters()),
            "inference_ms_per_image": inference_ms(model, layout(to_float(data.test.x[:64]))),
            "deploys": loop.defense.deploys,
            **loop.cost,
            **(loop.choice.metrics() if loop.choice.state else {}),
            **({"validation_hash": content_hash(data.validation)} if loop.choice.state else {}),
        },
    )
