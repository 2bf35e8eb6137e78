"""AutoAttack: our loop over its attacks against `pyautoattack` itself, on the same weights, images, eps and batch.

BENCH_DATA=FOLDER python benchmarks/p3_autoattack.py    trains, measures (about ten minutes of one core), stores, writes
python benchmarks/p3_autoattack.py --write-docs         writes docs/performance.md again from the stored records

lenet5 is trained in the run (2-step adversarial training at eps 0.15 on the first 8500 images of MNIST). A gate comes
first: the package runs from three seeds; ours may disagree with its first run on no more images than two of its runs
disagree on (at least 1 image), and may leave no more images robust than its weakest run. Then both sides run the
standard suite, A-B-B-A, one thread, CPU time (on a GPU: wall clock between two synchronizations). Ours runs through
`AutoAttack.evaluate`: clean prediction, checks of ball and box, scoring, and its state stored on disk after each batch
of each attack.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from p2_pgd import Case, apart, case_of, lenet_weights, mnist
from paired import Record, alternate, bar, bar_table, conditions, heading, ranged, store, table, write_docs
from torch import Tensor

from attacks.autoattack import AutoAttack
from bench.core.attack import Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.data import images as datasets
from bench.training import checkpoint

SEEDS, BAR, EPS, IMAGES, BATCH, PAIRS = (0, 1, 2), 0.98, "0.15", 48, 128, 2


def theirs(case: Case, layout: torch.memory_format, seed: int = 0) -> Tensor:
    """The package's own run: for each image whether it is robust, by the net's prediction after the last attack."""
    from pyautoattack import AutoAttack as Suite

    net, x = laid_out(case, layout)
    suite = Suite(net, eps=float(Epsilon(case.eps)), norm="Linf", seed=seed, device=str(x.device))
    suite.logger.disabled = True
    x_adv, _ = suite.run_standard_evaluation(x, case.y, batch_size=BATCH)
    with torch.no_grad():
        return net(x_adv).argmax(1) == case.y


def ours(case: Case, folder: Path, layout: torch.memory_format) -> Tensor:
    """The evaluation as a worker runs it, with its state on disk."""
    net, x = laid_out(case, layout)
    attack = AutoAttack(Threat("Linf", Epsilon(case.eps)), batch_size=BATCH)
    context = Context(0, save=lambda tensors: checkpoint.write(folder / "state.safetensors", tensors, {}))
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


def measure(args: argparse.Namespace) -> Record:
    torch.set_num_threads(1)
    device = torch.device(args.device)
    began, used = time.perf_counter(), time.process_time()
    record = {**conditions("p3_autoattack", args.device), "batch": BATCH, "rows": []}
    loaded = datasets.load("mnist", root=args.data_dir, device=device, train=1, test=args.images)
    weights = apart(lenet_weights, args.data_dir, args.device)
    images = datasets.test_block(loaded, 0, args.images)
    case = case_of("lenet5", "MNIST", EPS, mnist(loaded), weights, *images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = torch.channels_last
        found = gate([theirs(case, torch.contiguous_format, seed) for seed in SEEDS], ours(case, folder, engine))
        print(json.dumps(found), flush=True)
        # the package at its default layout, then at ours: what our loop itself costs
        for layout in (torch.contiguous_format, engine):
            row = {
                "peer_layout": "channels_last" if layout is engine else "contiguous",
                "images": args.images,
                "gate": found,
            }
            timed: Record = {"ratio": None}
            if found["passed"]:
                timed = alternate(
                    lambda at=layout: theirs(case, at), lambda: ours(case, folder, engine), device, args.pairs
                )  # type: ignore[misc]
            record["rows"].append({**row, **timed})
            print(json.dumps(record["rows"][-1]), flush=True)
    record["took_s"] = {"cpu": time.process_time() - used, "wall": time.perf_counter() - began}
    return record


def bars(record: Record) -> list[Record]:
    text = "AutoAttack at least 0.98 times as fast as the package, the package's net {}"
    return [bar(text.format(row["peer_layout"]), row["ratio"], BAR) for row in record["rows"]]


def written(record: Record) -> str:
    """The generated part of the page for one record."""
    header = ["images", "eps", "peer's layout", "robust ours / peer's three seeds", "verdicts that differ",
              "between peer's seeds", "s ours", "s peer", "peer / ours"]  # fmt: skip
    lines = []
    for row in record["rows"]:
        seen, timed = row["gate"], row["ratio"] is not None
        peer = ", ".join(map(str, seen["peer_robust"]))
        lines.append([
            str(row["images"]), EPS, row["peer_layout"], f"{seen['robust']} / {peer}",
            str(seen["disagree"]), str(seen["peer_seeds_disagree"]), f"{row['ours_ms'] / 1000:.1f}" if timed else "-",
            f"{row['peer_ms'] / 1000:.1f}" if timed else "-", ranged(row),
        ])  # fmt: skip
    return heading(record) + bar_table(bars(record)) + "\n" + table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("BENCH_DATA"), help="folder with MNIST")
    parser.add_argument("--images", type=int, default=IMAGES)
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
