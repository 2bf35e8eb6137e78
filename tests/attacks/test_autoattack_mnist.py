"""AutoAttack against the package itself, as its users call it, on a trained net and real images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Bench

from bench.data.images import load, to_channels_last, to_float
from bench.jobs.model_files import load_model
from bench.records.store import Store


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_verdicts_on_mnist_are_those_of_the_package(mnist_root: Path, bench: Bench) -> None:
    from pyautoattack import AutoAttack as Suite

    words = ["--dataset", "mnist", "--data-dir", mnist_root, "--defense", "pgd_at", "--no-baseline", "--eps", 0.3]
    small = ["--train-n", 10000, "--epochs", 3, "--set", "pgd_at.steps=5", "--set", "pgd_at.rel_step_size=0.3"]
    more = ["--attack", "autoattack", "--n", 100, "--checks", "off", "--device", "cpu", "--executor", "debug"]
    done = bench("run", *words, *small, *more, "--set", "train.eps_warmup=0.5")
    assert done.code == 0, done.err
    store = Store(Path("results"))
    jobs = store.jobs()
    evaluated = next(job for job in jobs.values() if job.kind == "evaluate")
    ours = torch.from_numpy(store.samples(evaluated.key)["correct"])
    data = load("mnist", root=mnist_root, device=torch.device("cpu"), test=100)
    model = load_model(store, jobs[evaluated.needs[0]], data).eval()
    x, y = to_channels_last(to_float(data.test.x)), data.test.y
    suite = Suite(model, eps=0.3, norm="Linf", seed=0, version="standard")
    suite.logger.disabled = True
    x_adv, _ = suite.run_standard_evaluation(x, y, batch_size=100)
    with torch.no_grad():
        theirs = model(x_adv).argmax(1) == y
    assert 5 <= int(ours.sum()) <= 95  # a net that is broken, or holds, everywhere would show nothing
    assert int((ours != theirs).sum()) <= 1
