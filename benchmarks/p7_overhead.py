"""P7: the overhead of the harness: a whole job of a worker against the same work in a plain loop.

BENCH_DATA=FOLDER python benchmarks/p7_overhead.py   passes the gate, measures (some minutes), stores, writes the page
BENCH_DATA=FOLDER python benchmarks/p7_overhead.py --direct   repeats the direct measurement only, in the stored record
python benchmarks/p7_overhead.py --write-docs        writes docs/performance.md again from the stored record

Training: PGD-10 on lenet5, three epochs of 50 steps of 128 MNIST images. Evaluation: PGD-20 on 1000 test images, in
blocks. Ours is `bench.jobs.worker.work`: log, train.jsonl, the checkpoint for a resume, the guards, the profiled step,
weights, samples, adversarial images, checksums and the record. The plain loop loads the same data, builds the same net,
calls the same step, or the same attack on the same blocks, and holds the results in memory. A gate comes first: final
weights and verdicts must be equal bit for bit. Then A-B-B-A, one thread, CPU time of the process; the overhead is the
median over pairs of ours / plain - 1, so it may be below 0.

On a busy machine the steps themselves vary by more than the overhead. So the training is also measured directly: the
CPU time outside the defense's steps, plus the excess of the profiled step over the median step, ours minus plain, over
a plain training of the full length. Checkpoints for a resume come on top; the record has their share.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from paired import RESULTS, Record, alternate, conditions, heading, store, table, write_docs
from safetensors.torch import load_file
from torch import Tensor

from bench import plugins
from bench.core.attack import Context
from bench.core.defense import Batch, Defense
from bench.core.rng import scope, seed
from bench.data import images as datasets
from bench.jobs.model_files import load_model
from bench.jobs.provenance import git
from bench.jobs.worker import work
from bench.planning.job import EvaluateJob, ModelJob, TrainJob
from bench.planning.options import to_spec
from bench.planning.plan import plan
from bench.planning.typed import Options
from bench.records.store import Store, weights_file
from bench.training.optimizer import build_updater
from bench.training.recipe import Recipe
from bench.training.train import build

EPOCHS, STEPS, BATCH, IMAGES, PAIRS = 3, 50, 128, 1000, 4
SHORT, MOST, KEEP = 10, 0.02, 0.01


class Case(NamedTuple):
    """One kind of job and its two sides. `equal`: whether their outcomes are; `first`: results folder of our first
    run."""

    name: str
    first: Path
    plain: Callable[[], Any]
    ours: Callable[[], Any]
    equal: Callable[[Any, Any], bool]


def jobs(root: Path, steps: int = STEPS) -> tuple[TrainJob, EvaluateJob]:
    """A training and an evaluation of it."""
    options = Options(
        dataset="mnist", model=["lenet5"], defense=["pgd_at"], attack=["pgd"], baseline=False, checks="off",
        train_n=steps * BATCH, epochs=EPOCHS, n=IMAGES, set=[f"train.batch_size={BATCH}"],
    )  # fmt: skip
    training, evaluation = plan(to_spec(options, root)[0], root)
    return training, evaluation


def load(job: ModelJob, root: Path, test: int | None) -> datasets.Data:
    name, train, device = job.data.name, job.data.train, torch.device("cpu")
    return datasets.load(name, root=root, device=device, train=train, test=test, seed=job.seed)


def plain_training(job: TrainJob, root: Path) -> dict[str, Tensor]:
    """The weights after the same steps."""
    data = load(job, root, None)
    defense, net = build(job, data)
    recipe = Recipe.model_validate(job.training)
    steps = len(data.train.x) // recipe.batch_size
    updater = build_updater(defense, net, recipe, steps)
    net.train()
    with scope(seed(job.seed, "inner")):
        for epoch in range(recipe.epochs):
            order = seed(job.seed, "order", epoch)
            loader = datasets.batches(
                data.train, recipe.batch_size, shuffle_seed=order, augment=recipe.augment, drop_last=True
            )
            for place, (x, y, index) in enumerate(loader):
                progress = (epoch + place / steps) / recipe.epochs
                defense.step(net, updater, Batch(datasets.to_channels_last(x), y, index, epoch, progress))
                updater.flush_to_average()
    return net.state_dict()


def plain_evaluation(job: EvaluateJob, trained: ModelJob, results: Path, root: Path) -> Tensor:
    """The verdicts of the same attack on the same blocks."""
    data = load(trained, root, job.n)
    model = load_model(Store(results), trained, data)
    attack = plugins.make("attacks", job.attack, job.threat)
    found = []
    for start in range(0, job.n, attack.block):
        own, clean = (seed(job.seed, part, start) for part in (job.attack.name, "clean"))
        x, y = datasets.test_block(data, start, min(start + attack.block, job.n))
        found.append(attack.evaluate(model, x, y, Context(own, clean_seed=clean)).columns["correct"])
    return torch.cat(found)


def harness(job: TrainJob | EvaluateJob, root: Path, results: Path) -> Path:
    """The folder of results in which a worker did the job, from nothing."""
    kept = Store(results)
    shutil.rmtree(results / job.key, ignore_errors=True)
    results.mkdir(exist_ok=True)
    kept.add(job)
    if work(results, job.key, root) != "done":
        raise SystemExit((kept.folder(job.key) / "log.txt").read_text())
    return results


def cases(root: Path, base: Path) -> list[Case]:
    training, evaluation = jobs(root)
    # the evaluation's own model stays as it is while trainings come and go
    models = harness(training, root, base / "models")
    harness(evaluation, root, models)

    def same_weights(plain: dict[str, Tensor], folder: Path) -> bool:
        ours = load_file(folder / training.key / weights_file("last"))
        return set(ours) == set(plain) and all(torch.equal(ours[name], plain[name]) for name in ours)

    def same_verdicts(plain: Tensor, folder: Path) -> bool:
        return bool(Store(folder).samples(evaluation.key)["correct"].tolist() == plain.tolist())

    return [
        Case(
            f"train pgd_at, {EPOCHS} epochs of {STEPS} steps of {BATCH}",
            models,
            lambda: plain_training(training, root),
            lambda: harness(training, root, base / "trained"),
            same_weights,
        ),
        Case(
            f"evaluate pgd on {IMAGES} images",
            models,
            lambda: plain_evaluation(evaluation, training, models, root),
            lambda: harness(evaluation, root, models),
            same_verdicts,
        ),
    ]


def measure(root: Path, pairs: int) -> Record:
    torch.set_num_threads(1)
    used = time.process_time()
    record: Record = {**conditions("p7_overhead"), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(root, Path(folder)):
            passed = case.equal(case.plain(), case.first)
            row: Record = {"job": case.name, "equal": passed, "overhead": None}
            if passed:
                timed = alternate(case.plain, case.ours, pairs=pairs)
                over = [1 / ratio - 1 for ratio in timed["pairs"]]
                row |= {"overhead": statistics.median(over), "low": min(over), "high": max(over), "pairs": over}
                row |= {"plain_ms": timed["peer_ms"], "ours_ms": timed["ours_ms"], "warm_up_s": timed["warm_up_s"]}
            row |= beside(case.first)
            record["rows"].append(row)
            print(json.dumps(row), flush=True)
    record["direct"] = direct(root)
    record["took_s"] = {"cpu": time.process_time() - used}
    return record


def beside(results: Path) -> Record:
    """Time spent on checkpoints and on measurements, from the record of a training."""
    kept = Store(results)
    found = [record.metrics for job, record in kept.records() if job.kind == "train"]
    return {"keep_share": found[0].checkpoint_seconds / found[0].train_seconds} if found else {}


def direct(root: Path, repeats: int = 3) -> Record:
    """Seconds of the harness around a training, by the steps' own clock; a training of few steps, as none of it grows
    with them."""
    spent, step = list[float](), Defense.step

    def timed(self: Defense, net: Any, updater: Any, batch: Batch) -> Any:
        began = time.process_time()
        try:
            return step(self, net, updater, batch)
        finally:
            spent.append(time.process_time() - began)

    def outside(run: Callable[[], Any]) -> tuple[float, float]:
        spent.clear()
        began = time.process_time()
        run()
        median = statistics.median(spent)
        return time.process_time() - began - sum(spent) + spent[-1] - median, median

    training, found = jobs(root, SHORT)[0], list[Record]()
    with tempfile.TemporaryDirectory() as folder:
        sides = (lambda: harness(training, root, Path(folder) / "r"), lambda: plain_training(training, root))
        for side in sides:
            side()
        with unittest.mock.patch.object(Defense, "step", timed):
            for _ in range(repeats):
                (ours, _), (plain, median) = (outside(side) for side in sides)
                length = EPOCHS * STEPS * median + plain
                found.append({"ours_s": ours, "plain_s": plain, "overhead": (ours - plain) / length})
    over = [one["overhead"] for one in found]
    commit, dirty = git()
    return {
        "commit": commit,
        "dirty": dirty,
        "repeats": found,
        "overhead": statistics.median(over),
        "low": min(over),
        "high": max(over),
    }


def bars(record: Record) -> list[Record]:
    found = [(f"harness overhead of `{row['job']}` at most 2 %", row["overhead"], MOST) for row in record["rows"]]
    found.append(("the same training, measured directly, at most 2 %", record["direct"]["overhead"], MOST))
    found.append(("keeping a training against a kill at most 1 % of it", record["rows"][0]["keep_share"], KEEP))
    return [{"bar": text, "value": value, "met": value is not None and value <= most} for text, value, most in found]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def written(record: Record) -> str:
    lines = [[bar["bar"], percent(bar["value"]), "yes" if bar["met"] else "no"] for bar in bars(record)]
    text = heading(record) + table(["bar", "measured", "met"], lines) + "\n"
    lines = [
        [row["job"], "yes" if row["equal"] else "no", f"{percent(row['overhead'])} ({percent(row['low'])} to "
         f"{percent(row['high'])})", f"{row['ours_ms']:.0f}", f"{row['plain_ms']:.0f}"]
        for row in record["rows"] if row["equal"]
    ]  # fmt: skip
    one = record["direct"]
    text += (
        f"Directly, of the training, without what is kept for a resume: {percent(one['overhead'])} "
        f"({percent(one['low'])} to {percent(one['high'])} in {len(one['repeats'])} repeats).\n\n"
    )
    return text + table(["job", "outcomes equal bit for bit", "overhead", "ms ours", "ms plain"], lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data-dir", type=Path, default=os.environ.get("BENCH_DATA"), help="folder with MNIST")
    options.add_argument("--pairs", type=int, default=PAIRS, help="timed pairs")
    options.add_argument("--direct", action="store_true", help="the direct measurement alone")
    options.add_argument("--write-docs", action="store_true", help="measure nothing")
    args = options.parse_args()
    if args.direct:
        kept = json.loads((RESULTS / "p7_overhead.json").read_text())
        torch.set_num_threads(1)
        store({**kept, "direct": direct(args.data_dir)}, "p7_overhead.json")
    elif not args.write_docs:
        if args.data_dir is None:
            options.error("no folder with MNIST: set BENCH_DATA or pass --data-dir")
        for one in bars(store(measure(args.data_dir, args.pairs), "p7_overhead.json")):
            print(json.dumps(one))
    write_docs("p7_overhead", written)


if __name__ == "__main__":
    main()
