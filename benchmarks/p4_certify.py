"""Certification: our stream of draws against a loop over images as it is commonly written.

python benchmarks/p4_certify.py               measures (a minute on one core), writes benchmarks/results/p4_certify.json
python benchmarks/p4_certify.py --write-docs  writes docs/performance.md again from the stored records
python benchmarks/p4_certify.py --device cuda --output p4_certify_cuda.json

The loop follows the paper's pseudocode (Cohen et al. 2019, arXiv 1902.02918): image by image, copies of it in batches
of 1000, fresh noise for each, predictions read back and counted in Python. Same weights, images and numbers of draws,
fp32 on both sides. A gate comes first: for every image the same class has the most votes, our counts lie in the 99.9 %
band around the loop's (both are random; the band is of all counts together), and identical counts give the identical
bound. The votes must be split, as unanimous votes would test nothing. A case that fails the gate has no ratio.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from typing import Any

import torch
from paired import CPU, Record, alternate, bar, bar_table, conditions, heading, ranged, store, table, write_docs
from scipy.stats import beta, norm
from torch import Tensor, nn

from bench import plugins
from bench.core.smoothing import CPU_ROWS, Smoothed
from bench.core.stats import clopper_pearson_lower
from bench.models.common import Inputs

SIGMA, N0, ALPHA, BATCH, CLASSES = 0.25, 100, 0.001, 1000, 10
# architecture -> draws that count, over all images; images; on a GPU ten times the draws
STEPS, MIXED = 150, 0.2  # training steps; share of another pattern in an image
CASES = {"lenet5": (20_000, 10), "small_cnn": (4_000, 4)}


def loop(net: nn.Module, x: Tensor, n: int) -> list[tuple[int, list[int]]]:
    """For each image the class that leads among N0 draws, and how many of n further draws gave each class."""
    found = []
    with torch.no_grad():
        for image in x:
            first = sample(net, image, N0)
            found.append((first.index(max(first)), sample(net, image, n)))
    return found


def sample(net: nn.Module, image: Tensor, n: int) -> list[int]:
    """Counts of n draws for one image."""
    counts, left = [0] * CLASSES, n
    while left > 0:
        size = min(BATCH, left)
        left -= size
        batch = image.repeat((size, 1, 1, 1))
        noise = torch.randn_like(batch) * SIGMA
        for label in net(batch + noise).argmax(1).cpu().numpy():
            counts[label] += 1
    return counts


def trained(arch: str, device: torch.device, count: int) -> tuple[nn.Module, Tensor]:
    """A net that classifies ten random patterns under the noise, and images with some of another pattern in them, so
    that the votes are split: where all draws agree, equal counts prove nothing."""
    grey = arch == "lenet5"
    facts = Inputs(1, 28, CLASSES, (0.0,), (1.0,)) if grey else Inputs(3, 32, CLASSES, (0.0,) * 3, (1.0,) * 3)
    torch.manual_seed(0)
    net = plugins.build_model(arch, {}, facts).to(device).train()
    patterns = 0.25 + 0.5 * torch.rand(CLASSES, facts.channels, facts.size, facts.size).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(STEPS):
        y = torch.randint(0, CLASSES, (64,), device=device)
        x = patterns[y] + SIGMA * torch.randn_like(patterns[y])
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), torch.lerp(patterns, patterns.roll(1, 0), MIXED)[:count]


def gate(ours: Smoothed, net: nn.Module, x: Tensor, n: int) -> Record:
    """Do both sides say the same, up to the luck of their draws?"""
    torch.manual_seed(1)
    plain = loop(net, x, n)
    torch.manual_seed(2)
    counts = ours.counts(x, N0, n, BATCH).cpu()
    top = [int(c) for c in counts[:, 0].argmax(1)]
    off = 0.0
    for (_, theirs), mine in zip(plain, counts[:, 1].tolist(), strict=True):
        for a, b in zip(theirs, mine, strict=True):
            p = (a + b) / (2 * n)
            off = max(off, abs(a - b) / math.sqrt(max(2 * n * p * (1 - p), 1.0)))
    # 99.9 % for all counts together: the loop against itself fails once in a thousand runs
    widest = float(norm.isf(0.0005 / (len(x) * CLASSES)))
    hits = [theirs[label] for label, theirs in plain]
    same_bound = all(
        math.isclose(clopper_pearson_lower(k, n, ALPHA), beta.ppf(ALPHA, k, n - k + 1), rel_tol=1e-9) for k in hits if k
    )
    same_top = [label for label, _ in plain] == top
    split = max(hits) < n  # else the comparison would say nothing
    passed = same_top and off <= widest and same_bound and split
    return {
        "same_top": same_top,
        "counts_off": off,
        "band": widest,
        "same_bound": same_bound,
        "leaders": [k / n for k in hits],
        "passed": passed,
    }


def case(arch: str, total: int, images: int, device: torch.device, pairs: int) -> list[Record]:
    """One row for the loop in its usual layout, one for the loop with all that a caller can give it: channels_last."""
    (net, x), n = trained(arch, device, images), total // images
    laid = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ours, rows = Smoothed(laid, SIGMA), []
    for layout, peer in (("contiguous", net), ("channels_last", laid)):
        found = gate(ours, peer, x, n)
        timed = (
            alternate(
                lambda peer=peer: loop(peer, x, n),  # type: ignore[misc]
                lambda: ours.certify(x, n0=N0, n=n, alpha=ALPHA, batch_size=BATCH),
                device,
                pairs,
            )
            if found["passed"]
            else {"ratio": None}
        )
        rows.append({"arch": arch, "images": images, "n": n, "peer_layout": layout, "gate": found, **timed})
        print(json.dumps({k: v for k, v in rows[-1].items() if k not in ("gate", "pairs")}), flush=True)
    return rows


def measure(args: argparse.Namespace) -> Record:
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # as the worker judges
    began, used, scale = time.perf_counter(), time.process_time(), 10 if device.type == "cuda" else 1
    rows = [
        row for arch, (total, images) in CASES.items() for row in case(arch, total * scale, images, device, args.pairs)
    ]
    took = {"wall": time.perf_counter() - began, "cpu": time.process_time() - used}
    record = {**conditions("p4_certify", args.device), "sigma": SIGMA, "n0": N0, "alpha": ALPHA, "batch": BATCH}
    record["rows_in_a_pass"] = min(BATCH, CPU_ROWS) if device == CPU else BATCH
    return {**record, "cases": rows, "took_s": took}


def bars(record: Record) -> list[Record]:
    """1.5 times the loop in its usual layout, for each net."""
    return [
        bar(f"certify {row['arch']} at least 1.5 times as fast as the loop", row["ratio"], 1.5)
        for row in record["cases"]
        if row["peer_layout"] == "contiguous"
    ]


def written(record: Record) -> str:
    """The generated part of the document for one record."""
    text = heading(record) + bar_table(bars(record))
    text += (
        f"\nsigma {record['sigma']:g}, n0 {record['n0']}, the loop in batches of {record['batch']}, ours in passes of "
        f"at most {record['rows_in_a_pass']} draws:\n\n"
    )
    header = ["net", "images", "draws an image", "loop's layout", "leaders' shares", "counts off by (band), deviations",
              "ms loop", "ms ours", "loop / ours"]  # fmt: skip
    lines = []
    for row in record["cases"]:
        found: dict[str, Any] = row["gate"]
        ms = [f"{row[side]:.0f}" if side in row else "-" for side in ("peer_ms", "ours_ms")]
        lines.append([
            row["arch"], str(row["images"]), str(record["n0"] + row["n"]), row["peer_layout"],
            f"{min(found['leaders']):.2f} to {max(found['leaders']):.2f}",
            f"{found['counts_off']:.1f} ({found['band']:.1f})", *ms, ranged(row),
        ])  # fmt: skip
    return text + table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--pairs", type=int, default=5, help="timed pairs a case")
    parser.add_argument("--output", default="p4_certify.json", help="file name in benchmarks/results")
    parser.add_argument("--write-docs", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.write_docs:
        for one in bars(store(measure(args), args.output)):
            print(json.dumps(one))
    write_docs("p4_certify", written)


if __name__ == "__main__":
    main()
