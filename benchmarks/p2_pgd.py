"""PGD-20 as an evaluation: ours against `torchattacks.PGD(steps=20)` on the same weights, images, eps and step size.

BENCH_DATA=FOLDER python benchmarks/p2_pgd.py    trains, measures (some minutes on one core), stores, writes the page
python benchmarks/p2_pgd.py --write-docs         writes docs/performance.md again from the stored records

lenet5 is trained in the run: 2-step adversarial training at eps 0.15 on the first 8500 images of MNIST. small_cnn is
trained as briefly on synthetic images of ten classes, 3 x 32 x 32, at 4/255. A gate comes first, per image: the peer
runs from three seeds; ours may disagree with the peer's first run on no more images than two of its runs disagree on
(at least 1 image), and may leave no more images robust than its weakest run. Then both sides are timed on the whole
set, A-B-B-A, one thread, CPU time (on a GPU: wall clock between two synchronizations). Each side ends with a verdict
for every image: the peer's in the usual way (attack the batch, then predict), ours by `PGD.evaluate`, which also
predicts the clean images, skips those that are misclassified already, returns the strongest iterate and checks ball and
box. Each side uses its own memory layout, ours channels_last as the engine does; a further row gives the peer that
layout too. Training happens in separate processes; the last row is measured after this process has trained as well,
when the peer's large buffers no longer cost page faults.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from paired import Record, alternate, bar, bar_table, conditions, heading, ranged, store, table, write_docs
from torch import Tensor, nn

from attacks.pgd import PGD
from bench import plugins
from bench.core.attack import Context
from bench.core.classifier import Classifier
from bench.core.defense import Batch
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.data import images as datasets
from bench.models.common import Inputs
from bench.planning.job_fields import JobThreat, PluginChoice
from bench.training.optimizer import build_updater
from bench.training.recipe import Recipe

STEPS, REL_STEP_SIZE, SEEDS, PAIRS = 20, 0.1, (0, 1, 2), 8
TRAIN, ROUNDS, BATCH = 8500, 6, 128
ADAM = {
    **{"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"},
    **{"epochs": 1, "batch_size": BATCH, "augment": False},
}
MADE, HELD, STRENGTH = 1024, 64, 0.5  # synthetic images to train on and to attack, and the strength of their pattern
MADE_INPUTS = Inputs(3, 32, 10, (0.0,) * 3, (1.0,) * 3)
PGD_AT = PluginChoice("pgd_at", {"steps": 2, "rel_step_size": 0.5})
BAR, DEFAULT = 1.5, ("contiguous", "evaluates")


class Case(NamedTuple):
    """A trained net in the default layout, and what it is attacked on."""

    arch: str
    what: str
    eps: str
    net: nn.Module
    x: Tensor
    y: Tensor


def trained(
    arch: str,
    inputs: Inputs,
    eps: str,
    x: Tensor,
    y: Tensor,
    rounds: int,
    choice: PluginChoice = PGD_AT,
    options: dict[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Weights after `rounds` passes of a training, 2-step adversarial training unless another is chosen."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    defense = plugins.make("defenses", choice, JobThreat("Linf", eps))
    net = defense.wrap(plugins.build_model(arch, options or {}, inputs)).to(x.device)
    net = net.to(memory_format=torch.channels_last).train()
    parts = [rows for _ in range(rounds) for rows in torch.randperm(len(x)).split(BATCH)]
    updater = build_updater(defense, net, Recipe.model_validate(ADAM), len(parts))
    for k, rows in enumerate(parts):
        index = rows.to(x.device)
        batch = Batch(datasets.to_channels_last(x[index]), y[index], index, 0, k / len(parts))
        defense.step(net, updater, batch)
    return {name: value.cpu() for name, value in net.state_dict().items()}


def lenet_weights(root: Path, device: str, rounds: int = ROUNDS) -> dict[str, Tensor]:
    loaded = datasets.load("mnist", root=root, device=torch.device(device), train=TRAIN, test=1)
    x, y = datasets.to_float(loaded.train.x), loaded.train.y
    return trained("lenet5", mnist(loaded), "0.15", x, y, rounds)


def mnist(loaded: datasets.Data) -> Inputs:
    facts = loaded.facts
    return Inputs(facts.channels, facts.size, facts.classes, facts.mean, facts.std)


def made(device: str) -> tuple[Tensor, Tensor]:
    """Images of ten classes: a colored pattern each under noise, so weak that an attack breaks a part of them."""
    random = torch.Generator().manual_seed(1)
    y = torch.arange(MADE + HELD) % MADE_INPUTS.classes
    pattern = torch.rand(MADE_INPUTS.classes, 3, 4, 4, generator=random) - 0.5
    pattern = torch.nn.functional.interpolate(pattern, (32, 32))
    x = 0.5 + STRENGTH * pattern[y] + 0.25 * torch.randn(len(y), 3, 32, 32, generator=random)
    return x.clamp(0, 1).to(device), y.to(device)


def cnn_weights(device: str) -> dict[str, Tensor]:
    x, y = made(device)
    return trained("small_cnn", MADE_INPUTS, "4/255", x[HELD:], y[HELD:], 2)


def apart(train: Callable[..., dict[str, Tensor]], *args: Any) -> dict[str, Tensor]:
    """Weights trained in a process of its own, so that this one is as one that evaluates: a process that has trained
    keeps the memory of its tensors, which spares the peer's larger buffers their page faults."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(train, *args).result()


def case_of(
    arch: str,
    what: str,
    eps: str,
    inputs: Inputs,
    weights: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    options: dict[str, Any] | None = None,
) -> Case:
    """Net and images of the default layout, made anew: what has one channel can look like channels_last."""
    net = plugins.build_model(arch, options or {}, inputs).to(x.device).eval()
    net.load_state_dict(weights)
    return Case(arch, what, eps, net, torch.empty(x.shape, device=x.device).copy_(x), y)


def sides(case: Case, peer_layout: torch.memory_format) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The peer (from a seed) and ours: for every image whether its adversarial one is classified correctly."""
    import torchattacks

    threat = Threat("Linf", Epsilon(case.eps))
    x = case.x.contiguous(memory_format=peer_layout)
    net = copy.deepcopy(case.net).to(memory_format=peer_layout)  # type: ignore[call-overload]
    library = torchattacks.PGD(net, eps=threat.radius, alpha=REL_STEP_SIZE * threat.radius, steps=STEPS)
    attack = PGD(threat, steps=STEPS, rel_step_size=REL_STEP_SIZE)
    model = Classifier(copy.deepcopy(case.net).to(memory_format=torch.channels_last)).eval()
    own_x = datasets.to_channels_last(case.x)

    def peer(seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        x_adv = library(x, case.y)
        with torch.no_grad():
            return net(x_adv).argmax(1) == case.y

    def ours() -> Tensor:
        return attack.evaluate(model, own_x, case.y, Context(0)).columns["correct"]

    return peer, ours


def gate(peer: Callable[..., Tensor], ours: Callable[..., Tensor]) -> Record:
    """Verdicts of ours against the peer's own noise."""
    theirs, mine = [peer(seed) for seed in SEEDS], ours()
    noise = max(int((a != b).sum()) for a in theirs for b in theirs)
    off, robust = int((mine != theirs[0]).sum()), int(mine.sum())
    worst = max(int(one.sum()) for one in theirs)
    passed = off <= max(noise, 1) and robust <= worst
    return {"disagree": off, "peer_seeds_disagree": noise, "robust": robust,
            "peer_robust": [int(one.sum()) for one in theirs], "passed": passed}  # fmt: skip


def compare(case: Case, peer_layout: torch.memory_format, pairs: int, process: str) -> Record:
    peer, ours = sides(case, peer_layout)
    found = gate(peer, ours)
    timed = alternate(peer, ours, case.x.device, pairs) if found["passed"] else {"ratio": None}
    name = "contiguous" if peer_layout == torch.contiguous_format else "channels_last"
    row = {"arch": case.arch, "data": case.what, "eps": case.eps, "images": len(case.x), "peer_layout": name,
           "process": process}  # fmt: skip
    print(json.dumps({**row, "gate": found, **timed}), flush=True)
    return {**row, "gate": found, **timed}


def measure(args: argparse.Namespace) -> Record:
    torch.set_num_threads(1)
    device = torch.device(args.device)
    began, used = time.perf_counter(), time.process_time()
    record = {**conditions("p2_pgd", args.device), "steps": STEPS, "rel_step_size": REL_STEP_SIZE, "rows": []}
    loaded = datasets.load("mnist", root=args.data_dir, device=device, train=1, test=500)
    weights = apart(lenet_weights, args.data_dir, args.device)
    lenet = case_of("lenet5", "MNIST", "0.15", mnist(loaded), weights, *datasets.test_block(loaded, 0, 500))
    x, y = made(args.device)
    weights = apart(cnn_weights, args.device)
    cnn = case_of("small_cnn", "made", "4/255", MADE_INPUTS, weights, x[:HELD], y[:HELD])
    for case in (lenet, cnn):
        for peer_layout in (torch.contiguous_format, torch.channels_last):
            record["rows"].append(compare(case, peer_layout, args.pairs, "evaluates"))
    lenet_weights(args.data_dir, args.device, rounds=1)
    record["rows"].append(compare(lenet, torch.contiguous_format, args.pairs, "has trained"))
    record["took_s"] = {"cpu": time.process_time() - used, "wall": time.perf_counter() - began}
    return record


def bars(record: Record) -> list[Record]:
    rows = {row["arch"]: row for row in record["rows"] if (row["peer_layout"], row["process"]) == DEFAULT}
    text = "PGD-20 on {} at least 1.5 times as fast as torchattacks"
    return [bar(text.format(arch), row["ratio"], BAR) for arch, row in rows.items()]


def written(record: Record) -> str:
    """The generated part of the page for one record."""
    header = ["net", "images", "eps", "peer's layout", "process", "robust ours / peer's three seeds",
              "verdicts that differ", "between peer's seeds", "ms ours", "ms peer", "peer / ours"]  # fmt: skip
    lines = []
    for row in record["rows"]:
        seen, timed = row["gate"], row["ratio"] is not None
        lines.append([
            row["arch"], f"{row['images']} ({row['data']})", row["eps"], row["peer_layout"], row["process"],
            f"{seen['robust']} / {', '.join(map(str, seen['peer_robust']))}", str(seen["disagree"]),
            str(seen["peer_seeds_disagree"]), f"{row['ours_ms']:.0f}" if timed else "-",
            f"{row['peer_ms']:.0f}" if timed else "-", ranged(row),
        ])  # fmt: skip
    return heading(record) + bar_table(bars(record)) + "\n" + table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("BENCH_DATA"), help="folder with MNIST")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="timed pairs")
    parser.add_argument("--output", default="p2_pgd.json", help="file name in benchmarks/results")
    parser.add_argument("--write-docs", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.write_docs:
        if args.data_dir is None:
            parser.error("no folder with MNIST: set BENCH_DATA or pass --data-dir")
        for one in bars(store(measure(args), args.output)):
            print(json.dumps(one))
    write_docs("p2_pgd", written)


if __name__ == "__main__":
    main()
