"""Do the limits of `autoattack_fast mode=quick` lose an image? `quick` against `full` on nets that did not set them.

BENCH_DATA=FOLDER python benchmarks/autoattack_limits.py    trains, measures, stores each run, writes the page
python benchmarks/autoattack_limits.py --write-docs         writes docs/performance.md again from the stored record

Five lenet5 nets, each trained in a different way for minutes on the first 8500 images of MNIST, are attacked at two
budgets from three seeds by both modes, on test images that were never used to set a limit. An image is lost if `full`
breaks it from at least two of the seeds and `quick` from fewer; a difference between two single runs can be luck, as
images at the edge break from some starts only. The record is written after each run, and a run that is stored is not
made again: stop it and start it again at will. `--net NAME` measures one net alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from p2_pgd import TRAIN, mnist, trained
from paired import RESULTS, Record, bar_table, conditions, heading, store, table, write_docs
from torch import Tensor, nn

from attacks.autoattack_fast import LEAVE, AutoAttackFast
from bench import plugins
from bench.core.attack import Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.data import images as datasets
from bench.planning.job_fields import PluginChoice

NAME, SEEDS, MODES, FIRST = "autoattack_limits", (0, 1, 2), ("quick", "full"), 1000  # FIRST: index of the first image
AT, INPUT = {"steps": 3, "rel_step_size": 0.5}, {"site": "input", "sigma": 1.5, "w_mse": 0.0, "probes": 0}
# name: defense, settings, eps of the training, passes over the images, budgets of the evaluation
NETS: dict[str, tuple[str, dict[str, Any], str, int, tuple[str, str]]] = {
    "standard": ("standard", {}, "0.15", 6, ("0.03", "0.06")),
    "trades": ("trades", AT, "0.15", 4, ("0.1", "0.15")),
    "noisy, preset input": ("noisy", INPUT, "0.15", 6, ("0.05", "0.1")),
    "rat": ("rat", AT, "0.15", 4, ("0.1", "0.15")),
    "fast_at without guard": ("fast_at", {"guard": False}, "0.3", 8, ("0.1", "0.2")),
}  # fmt: skip


def weights(name: str, root: Path) -> dict[str, Tensor]:
    """Of a net of NETS, trained anew; the same each time on one machine."""
    defense, settings, eps, rounds, _ = NETS[name]
    loaded = datasets.load("mnist", root=root, device=torch.device("cpu"), train=TRAIN, test=1)
    x, y = datasets.to_float(loaded.train.x), loaded.train.y
    return trained("lenet5", mnist(loaded), eps, x, y, rounds, PluginChoice(defense, settings))


def digest(state: dict[str, Tensor]) -> str:
    """Twelve digits that tell whether two trainings gave the same net."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(state[name].numpy().tobytes())
    return found.hexdigest()[:12]


def run(net: nn.Module, x: Tensor, y: Tensor, eps: str, mode: Any, seed: int) -> Record:
    """One evaluation: images right before, images broken, passes an image."""
    attack = AutoAttackFast(Threat("Linf", Epsilon(eps)), mode=mode)
    started = time.process_time()
    found = attack.evaluate(Classifier(net).eval(), x, y, Context(seed)).columns
    broken = (found["clean"] & ~found["correct"]).nonzero().squeeze(1)
    passes = float(found["forwards"][0])
    return {"eps": eps, "mode": mode, "seed": seed, "clean": int(found["clean"].sum()), "broken": broken.tolist(),
            "forwards": passes, "cpu_s": time.process_time() - started}  # fmt: skip


def measure(args: argparse.Namespace) -> Record:
    """All runs that the stored record lacks. Raises ValueError where it was made under other conditions."""
    torch.set_num_threads(1)
    path = RESULTS / args.output
    limits = {name: {str(made): limit for made, limit in each.items()} for name, each in LEAVE.items()}
    fixed = {"images": args.images, "first": FIRST, "limits": limits}
    record = json.loads(path.read_text()) if path.exists() else {**conditions(NAME), **fixed, "nets": {}}
    if any(record[key] != value for key, value in fixed.items()):
        raise ValueError(f"{path.name} was made with other images or limits; use another --output, or remove it")
    loaded = datasets.load("mnist", root=args.data_dir, device=torch.device("cpu"), train=1, test=FIRST + args.images)
    x, y = datasets.test_block(loaded, FIRST, FIRST + args.images)
    for name in NETS if args.net is None else [args.net]:
        kept = record["nets"].setdefault(name, {"runs": []})
        done = {(each["eps"], each["mode"], each["seed"]) for each in kept["runs"]}
        wanted = [(eps, mode, seed) for eps in NETS[name][-1] for mode in MODES for seed in SEEDS]
        if done >= set(wanted):
            continue
        state = weights(name, args.data_dir)
        if kept.setdefault("weights", digest(state)) != digest(state):
            raise ValueError(f"the training of {name} gives another net than in {path.name}; remove that record")
        net = plugins.build_model("lenet5", {}, mnist(loaded))
        net.load_state_dict(state)
        net = net.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        for each in wanted:
            if each not in done:
                kept["runs"].append(run(net, x, y, *each))
                store(record, args.output)
                print(json.dumps({"net": name, **kept["runs"][-1]}), flush=True)
    return record


def rows(record: Record) -> list[Record]:
    """Each net and budget with all its runs: how many images survive, and which are lost."""
    found = []
    for name, kept in record["nets"].items():
        for eps in NETS[name][-1]:
            runs = {mode: [r for r in kept["runs"] if (r["eps"], r["mode"]) == (eps, mode)] for mode in MODES}
            if any(len(each) < len(SEEDS) for each in runs.values()):
                continue
            times = {mode: [sum(i in r["broken"] for r in each) for i in range(record["images"])]
                     for mode, each in runs.items()}  # fmt: skip
            pairs = list(zip(times["full"], times["quick"], strict=True))
            found.append({
                "net": name, "eps": eps, "clean": runs["full"][0]["clean"],
                "robust": {mode: [r["clean"] - len(r["broken"]) for r in each] for mode, each in runs.items()},
                "lost": sum(full >= 2 > quick for full, quick in pairs),
                "won": sum(quick >= 2 > full for full, quick in pairs),
                "passes": sum(r["forwards"] for r in runs["full"]) / sum(r["forwards"] for r in runs["quick"]),
            })  # fmt: skip
    return found


def written(record: Record) -> str:
    """The generated part of the page for one record."""
    lines, found = [], rows(record)
    for row in found:
        robust = [", ".join(map(str, row["robust"][mode])) for mode in ("full", "quick")]
        lines.append([row["net"], row["eps"], str(row["clean"]), *robust, str(row["lost"]), str(row["won"]),
                      f"{row['passes']:.1f}"])  # fmt: skip
    header = ["net", "eps", "right", "robust, full", "robust, quick", "lost", "won", "passes, full / quick"]
    text = f"images that quick loses, of {record['images']}, over {len(found)} nets and budgets: none"
    lost = sum(row["lost"] for row in found)
    bars = [{"bar": text, "value": lost, "met": bool(found) and lost == 0}]
    return heading(record) + bar_table(bars) + "\n" + table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("BENCH_DATA"), help="folder with MNIST")
    parser.add_argument("--images", type=int, default=100, help="test images, from number 1000 on")
    parser.add_argument("--net", choices=list(NETS), help="one net alone")
    parser.add_argument("--output", default=f"{NAME}.json", help="file name in benchmarks/results")
    parser.add_argument("--write-docs", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.write_docs:
        if args.data_dir is None:
            parser.error("no folder with MNIST: set BENCH_DATA or pass --data-dir")
        measure(args)
    write_docs(NAME, written)


if __name__ == "__main__":
    main()
