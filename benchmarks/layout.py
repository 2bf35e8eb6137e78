"""The effect of channels_last on lenet5 in one process: a training step of each defense, process time, A-B-B-A.

python benchmarks/layout.py prints one JSON line per defense: median and range of the paired ratios
contiguous / channels_last.
"""

from __future__ import annotations

import json
import statistics
import time

import torch
from torch import nn

from bench import plugins
from bench.core.defense import Batch, Losses
from bench.models.common import Inputs
from bench.planning.job_fields import JobThreat, PluginChoice

BATCH, STEPS, REPEATS = 256, 4, 5
THREAT = JobThreat("Linf", "0.1")


class Plain:
    def __init__(self, net: nn.Module) -> None:
        self.optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def descend(self, terms: Losses) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()


def seconds(name: str, layout: torch.memory_format) -> float:
    torch.manual_seed(0)
    defense = plugins.make("defenses", PluginChoice(name, {}), THREAT)
    net = defense.wrap(plugins.build_model("lenet5", {}, Inputs(1, 28, 10, (0.0,), (1.0,)))).to(memory_format=layout)
    updater, batch = (
        Plain(net),
        Batch(torch.rand(BATCH, 1, 28, 28), torch.arange(BATCH) % 10, torch.arange(BATCH), 0, 0.5),
    )
    defense.step(net, updater, batch)
    started = time.process_time()
    for _ in range(STEPS):
        defense.step(net, updater, batch)
    return time.process_time() - started


def main() -> None:
    torch.set_num_threads(1)
    for name in ("standard", "noisy", "pgd_at", "trades"):
        ratios = []
        for _ in range(REPEATS):
            a, b = seconds(name, torch.contiguous_format), seconds(name, torch.channels_last)
            b += seconds(name, torch.channels_last)
            a += seconds(name, torch.contiguous_format)
            ratios.append(a / b)
        spread = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        print(json.dumps({"defense": name, **{key: round(value, 2) for key, value in spread.items()}}), flush=True)


if __name__ == "__main__":
    main()
