"""AutoAttack: `autoattack` (our loop over the package's attacks) and `autoattack_fast` (our own code) against
`pyautoattack` itself, on the same weights, images and eps.

BENCH_DATA=FOLDER python benchmarks/p3_autoattack.py    trains, measures (half an hour of one core), stores, writes
python benchmarks/p3_autoattack.py --write-docs         writes docs/performance.md again from the stored records

lenet5 and small_cnn are trained in the run (2-step adversarial training at eps 0.15 on the first 8500 images of MNIST),
resnet_cifar of depth 8 and width 16 on synthetic color images at 4/255 (those of `p2_pgd`). `--net` measures one.
A gate comes first for each of our programs: the package runs from three seeds; ours may disagree with its first run on
no more images than two of its runs disagree on (at least 1 image), and may leave no more images robust than its weakest
run. Then both sides run the standard suite, A-B-B-A, one thread, CPU time (on a GPU: wall clock between two
synchronizations). Ours runs through `Attack.evaluate`: clean prediction, checks of ball and box, scoring, and its state
stored on disk after each part. The package has its net in channels_last, its best layout, but for the last row of each
net, and color images contiguous, as it fails on others. `--audited N` measures one pair over N images for the screen
with an audit, and nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from p2_pgd import HELD, MADE_INPUTS, TRAIN, Case, apart, case_of, lenet_weights, made, mnist, trained
from paired import Record, alternate, bar, bar_table, conditions, heading, ranged, store, table, write_docs
from torch import Tensor

from attacks.autoattack import AutoAttack
from attacks.autoattack_fast import AutoAttackFast
from bench.core.attack import Attack, Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.data import images as datasets
from bench.training import checkpoint

SEEDS, EPS, BATCH, PAIRS = (0, 1, 2), "0.15", 128, 3
IMAGES = {"lenet5": 48, "small_cnn": 16, "resnet_cifar": 16}
MADE_EPS, RESNET = "4/255", {"depth": 8, "width": 16}
PROGRAMS: dict[str, Callable[[Threat], Attack]] = {
    "autoattack": partial(AutoAttack, batch_size=BATCH),
    "full": AutoAttackFast,
    "quick": partial(AutoAttackFast, mode="quick"),
    "audited": partial(AutoAttackFast, audit=100),
}
BARS = {
    ("autoattack", "lenet5"): 0.98, ("autoattack", "small_cnn"): 0.98, ("full", "lenet5"): 1.9,
    ("full", "small_cnn"): 1.7, ("quick", "lenet5"): 6.0, ("quick", "small_cnn"): 6.0, ("audited", "lenet5"): 12.0,
    ("audited", "small_cnn"): 18.0, ("autoattack", "resnet_cifar"): 0.98, ("full", "resnet_cifar"): 1.6,
    ("quick", "resnet_cifar"): 6.0, ("audited", "resnet_cifar"): 12.0,
}  # fmt: skip


def theirs(case: Case, layout: torch.memory_format, seed: int = 0) -> Tensor:
    """The package's own run: for each image whether it is robust, by the net's prediction after the last attack."""
    from pyautoattack import AutoAttack as Suite

    net, x = laid_out(case, layout)
    x = x.contiguous() if x.shape[1] > 1 else x
    suite = Suite(net, eps=float(Epsilon(case.eps)), norm="Linf", seed=seed, device=str(x.device))
    suite.logger.disabled = True
    x_adv, _ = suite.run_standard_evaluation(x, case.y, batch_size=BATCH)
    with torch.no_grad():
        return net(x_adv).argmax(1) == case.y


def ours(case: Case, folder: Path, program: str) -> Tensor:
    """The evaluation as a worker runs it, with its state on disk."""
    net, x = laid_out(case, torch.channels_last)
    context = Context(0, save=lambda tensors: checkpoint.write(folder / "state.safetensors", tensors, {}))
    attack = PROGRAMS[program](Threat("Linf", Epsilon(case.eps)))
    return attack.evaluate(Classifier(net).eval(), x, case.y, context).columns["correct"]


def laid_out(case: Case, layout: torch.memory_format) -> tuple[Any, Tensor]:
    """Net and images in a memory layout."""
    net = copy.deepcopy(case.net).to(memory_format=layout)  # type: ignore[call-overload]
    return net, case.x.contiguous(memory_format=layout)


def gate(peer: list[Tensor], mine: Tensor) -> Record:
    """Verdicts of ours against the package's own noise."""
    noise = max(int((a != b).sum()) for a in peer for b in peer)
    off, robust_count = int((mine != peer[0]).sum()), int(mine.sum())
    robust = [int(one.sum()) for one in peer]
    return {"disagree": off, "peer_seeds_disagree": noise, "robust": robust_count, "peer_robust": robust,
            "passed": off <= max(noise, 1) and robust_count <= max(robust)}  # fmt: skip


def small_cnn_weights(root: Path, device: str) -> dict[str, Tensor]:
    loaded = datasets.load("mnist", root=root, device=torch.device(device), train=TRAIN, test=1)
    return trained("small_cnn", mnist(loaded), EPS, datasets.to_float(loaded.train.x), loaded.train.y, 2)


def resnet_weights(device: str) -> dict[str, Tensor]:
    x, y = made(device)
    return trained("resnet_cifar", MADE_INPUTS, MADE_EPS, x[HELD:], y[HELD:], 4, options=RESNET)


def cases(args: argparse.Namespace, images: dict[str, int]) -> list[Case]:
    """The nets with the first images that they were not trained on."""
    device, found = torch.device(args.device), []
    for arch, count in images.items():
        if arch == "resnet_cifar":
            (x, y), weights = made(args.device), apart(resnet_weights, args.device)
            x, y = x[: min(count, HELD)], y[: min(count, HELD)]
            found.append(case_of(arch, "made", MADE_EPS, MADE_INPUTS, weights, x, y, RESNET))
            continue
        train = {"lenet5": lenet_weights, "small_cnn": small_cnn_weights}[arch]
        loaded = datasets.load("mnist", root=args.data_dir, device=device, train=1, test=count)
        weights = apart(train, args.data_dir, args.device)
        found.append(case_of(arch, "MNIST", EPS, mnist(loaded), weights, *datasets.test_block(loaded, 0, count)))
    return found


def measure(args: argparse.Namespace) -> Record:
    torch.set_num_threads(1)
    began, used = time.perf_counter(), time.process_time()
    record = {**conditions("p3_autoattack", args.device), "batch": BATCH, "rows": []}
    best, default = torch.channels_last, torch.contiguous_format
    nets = {arch: args.audited or count for arch, count in IMAGES.items() if args.net in (None, arch)}
    for case in cases(args, nets):
        if args.audited:
            record["rows"].append(compared(args, case, "audited", best, [theirs(case, best)], 1))
            continue
        peer = [theirs(case, best, seed) for seed in SEEDS]
        for program in ("autoattack", "full", "quick"):
            record["rows"].append(compared(args, case, program, best, peer, args.pairs))
        record["rows"].append(compared(args, case, "autoattack", default, peer, args.pairs))
    record["took_s"] = {"cpu": time.process_time() - used, "wall": time.perf_counter() - began}
    return record


def compared(
    args: argparse.Namespace, case: Case, program: str, layout: torch.memory_format, peer: list[Tensor], pairs: int
) -> Record:
    """One row: the gate, then both sides in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = gate(peer, ours(case, folder, program))
        row = {
            "net": case.arch, "program": program, "images": len(case.x), "eps": case.eps, "gate": found,
            "peer_layout": "channels_last" if layout is torch.channels_last else "contiguous", "ratio": None,
        }  # fmt: skip
        if found["passed"]:
            device = torch.device(args.device)
            row |= alternate(lambda: theirs(case, layout), lambda: ours(case, folder, program), device, pairs)
    print(json.dumps(row), flush=True)
    return row


def bars(record: Record) -> list[Record]:
    """The target of each program on each net against the package's best layout."""
    rows = [row for row in record["rows"] if row["peer_layout"] == "channels_last"]
    text = "{program}, {net}, {images} images: at least {limit:g} times as fast as the package"
    limits = {(row["program"], row["net"]): BARS[row["program"], row["net"]] for row in rows}
    return [
        bar(
            text.format(limit=limits[row["program"], row["net"]], **row),
            row["ratio"],
            limits[row["program"], row["net"]],
        )
        for row in rows
        if row["program"] != "audited" or row["images"] >= 1000  # the screen has nothing to spare on few
    ]


def written(record: Record) -> str:
    """The generated part of the page for one record."""
    header = ["net", "images", "program", "peer's layout", "robust ours / peer's seeds", "verdicts that differ",
              "between peer's seeds", "s ours", "s peer", "peer / ours"]  # fmt: skip
    lines = []
    for row in record["rows"]:
        seen, timed = row["gate"], row["ratio"] is not None
        peer = ", ".join(map(str, seen["peer_robust"]))
        lines.append([
            row["net"], str(row["images"]), row["program"], row["peer_layout"], f"{seen['robust']} / {peer}",
            str(seen["disagree"]), str(seen["peer_seeds_disagree"]), f"{row['ours_ms'] / 1000:.1f}" if timed else "-",
            f"{row['peer_ms'] / 1000:.1f}" if timed else "-", ranged(row),
        ])  # fmt: skip
    return heading(record) + bar_table(bars(record)) + "\n" + table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("BENCH_DATA"), help="folder with MNIST")
    parser.add_argument("--audited", type=int, help="measure the screen with an audit alone, over so many images")
    parser.add_argument("--net", choices=list(IMAGES), help="one net alone")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="timed pairs")
    parser.add_argument("--output", default="p3_autoattack.json", help="file name in benchmarks/results")
    parser.add_argument("--write-docs", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.write_docs:
        if args.data_dir is None:
            parser.error("no folder with MNIST: set BENCH_DATA or pass --data-dir")
        for one in bars(store(measure(args), args.output)):
            print(json.dumps(one))
    write_docs("p3_autoattack", written)


if __name__ == "__main__":
    main()
