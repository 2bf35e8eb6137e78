"""A results folder of synthetic evaluations, written by the real store: the input of `p9_tables.py`.

`python benchmarks/synthetic.py FOLDER [EVALUATIONS] [IMAGES]`. Half of MNIST, half of CIFAR-10; four models, five
seeds, one configuration in ten stochastic; for each training clean accuracy, three attacks at three budgets and an
audit. Per-sample columns have the types that evaluations write; outcomes are random, so the numbers have no meaning.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.atomic import file_hash, write_atomic
from bench.planning.evaluations import RANDOMISED_REVISION
from bench.planning.job import Job
from bench.planning.job_json import job_of
from bench.records.record import AuditMetrics, EvaluationMetrics, Metrics, PeakMemory, Provenance, Record, TrainMetrics
from bench.records.store import SAMPLES, Store
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import Finding

Array = np.ndarray[Any, Any]
SEEDS, EPS = 5, ("0.1", "0.2", "0.3")
MODELS = ("lenet5", "small_cnn", "mlp", "preact_resnet18")
ATTACKS: dict[str, dict[str, Any]] = {
    "pgd": {"steps": 20},
    "square": {},
    "autoattack": {"version": "standard"},
}
EACH = 1 + len(ATTACKS) * len(EPS)  # evaluations of a training
WHERE = Provenance(commit="0" * 12, dirty=False, device="CPU x", workers=1, versions={})


def trainings(count: int) -> Iterator[Job]:
    """Configurations by seed: one defense with many values of a setting, one in ten stochastic."""
    for number in range(count):
        config, seed = divmod(number, SEEDS)
        name, place = ("mnist", "cifar10")[config % 2], config // 2
        what: dict[str, Any] = {
            "engine": 1,
            "data": {"name": name, "train": 50000, "validation": 0, "size": None},
            "model": {"name": MODELS[place % 4], "set": {}, "revision": 1},
            "defense": {"name": "pni" if config % 10 == 9 else "trades", "set": {"beta": place / 4}, "revision": 1},
            "threat": {"norm": "Linf", "eps": "0.1"},
            "recipe": "shared",
            "train": {"epochs": 2, "lr": 0.1},
            "seed": seed,
        }
        yield job_of("train", what)


def evaluations(train: Job, n: int) -> Iterator[tuple[Job, float]]:
    """The evaluations of a training, and the share of images that withstand each."""
    base = {"engine": RANDOMISED_REVISION, "n": n, "seed": train.seed, "weights": "last"}
    yield job_of("evaluate", {**base, "attack": _attack("clean", {}), "threat": None}, (train.key,)), 0.95
    for eps in EPS:
        for place, (name, settings) in enumerate(ATTACKS.items()):
            what = {**base, "attack": _attack(name, settings), "threat": {"norm": "Linf", "eps": eps}}
            yield job_of("evaluate", what, (train.key,)), 0.9 - 2 * float(eps) - 0.05 * place


def _attack(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "set": settings, "revision": 1}


def columns(rng: np.random.Generator, labels: Array, attack: str, share: float, draws: bool) -> dict[str, Array]:
    """What an evaluation of these images stores."""
    n = len(labels)
    right = rng.random(n) < share
    found = {"index": np.arange(n), "label": labels, "correct": right}
    if attack != "clean":
        found |= {"clean": right | (rng.random(n) < 0.8), "size": np.full(n, 0.1, np.float32)}
        found |= {name: rng.integers(20, 24, n).astype(np.float32) for name in ("forwards", "backwards")}
    if attack == "autoattack":
        found["stage"] = np.where(right, -1, 1).astype(np.int8)
    if draws:
        for name in ("select", "share"):
            found[name] = (rng.binomial(100, np.where(right, 0.95, 0.1)) / 100).astype(np.float32)
    return found


def write(root: Path, count: int, n: int) -> Store:
    """A folder of `count` evaluations of `n` images each, their trainings and audits."""
    store, rng = Store(root), np.random.default_rng(0)
    store.prepare()
    labels = {name: rng.integers(0, 10, n) for name in ("mnist", "cifar10")}
    for train in trainings(-(-count // EACH)):
        draws = train.defense.name == "pni"
        metrics = TrainMetrics(
            train_seconds=60.0 + 40 * rng.random(),
            seconds_per_epoch=30.0,
            work_per_image_f=20.0,
            predictor="randomised" if draws else "deterministic",
            inference_ms_per_image=0.5,
        )
        _put(store, train, {}, metrics)
        for job, share in list(evaluations(train, n))[:count]:
            count -= 1
            name = job.attack.name
            strength = share * (0.7 + 0.3 * rng.random())
            spent = EvaluationMetrics(
                n=n,
                test_hash=f"{train.data.name}{n}",
                attack_seconds=2.0,
                forwards_per_image=21.5,
                backwards_per_image=21.5,
            )
            _put(store, job, columns(rng, labels[train.data.name], name, strength, draws), spent)
        threats = [{"norm": "Linf", "eps": eps} for eps in EPS]
        about = {"part": "model", "level": "quick", "threats": threats, "weights": "last", "n": 256}
        fine = [Finding(check.code, "ok") for check in CHECKS.values() if check.source == "model"]
        audit = job_of("audit", {**about, "seed": train.seed}, (train.key,))
        _put(store, audit, {"index": np.arange(256)}, AuditMetrics(findings=tuple(fine)))
    return store


def _put(store: Store, job: Job, arrays: dict[str, Array], metrics: Metrics) -> None:
    store.add(job)
    path, files = store.folder(job.key) / SAMPLES, {}
    if arrays:
        write_atomic(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
        files = {SAMPLES: file_hash(path)}
    store.put(job, Record("done", metrics, files=files, provenance=WHERE, peak_memory_mb=PeakMemory(rss=300.0)))


if __name__ == "__main__":
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # no power fails here
    folder, *sizes = sys.argv[1:]
    write(Path(folder), *([int(size) for size in sizes] or [10_000, 10_000]))
