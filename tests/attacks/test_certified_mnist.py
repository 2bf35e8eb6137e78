"""Certificates against attacks on real MNIST: from the command line to the records."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Bench
from safetensors.torch import load_file

from bench.core.rng import scope
from bench.core.stats import wilson
from bench.data.images import load
from bench.jobs.model_files import load_model
from bench.planning.job import Job
from bench.records.store import IMAGES, Store
from bench.results.evaluations import evaluations
from bench.results.rows import rows


def _judged_by(job: Job, attack: str) -> bool:
    return job.kind == "evaluate" and job.attack.name == attack


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # what noisy logs; in-process here
@pytest.mark.parametrize(
    ("chosen", "radii"), [("smoothing.sigma=0.5", "0.5,1,2"), ("noisy_vote.sigma=0.6", "0.25,0.5,1")]
)
def test_no_certificate_is_broken(chosen: str, radii: str, mnist_root: Path, bench: Bench, tmp_path: Path) -> None:
    """Certified accuracy at r is never above accuracy under PGD at the same r, and no certified image gets another
    answer. A radius twice too large, or without the norm of the first layer, does not pass."""
    name = chosen.partition(".")[0]
    words = f"run --dataset mnist --model lenet5 --defense {name} --no-baseline --train-n 10000 --epochs 3 --n 60"
    words += f" --norm L2 --eps {radii} --attack clean,pgd,certify --executor debug -q --set {chosen}"
    words += " --set train.batch_size=64 --set pgd.steps=10 --set pgd.rel_step_size=0.25 --set certify.n=1000"
    outcome = bench(*words.split(), "--data-dir", mnist_root, "--results-dir", tmp_path)
    assert outcome.code == 0, outcome.err
    store = Store(tmp_path)
    jobs = store.jobs()
    (certify,) = (key for key, job in jobs.items() if _judged_by(job, "certify"))
    columns = store.samples(certify)
    right, radius = torch.tensor(columns["correct"]).bool(), torch.tensor(columns["radius"])
    assert float((right & (radius > 0.05)).float().mean()) > 0.4  # there is something to break
    found = {row.eps: row for row in rows(store, evaluations(store).readable)}
    assert set(found) == set(radii.split(","))
    fell = []
    for eps, row in found.items():
        ((_, attacked),) = row.accuracy.attacks.items()
        certified = row.accuracy.certified[float(eps)]
        assert certified.n == attacked.n == 60
        low, _ = wilson(round(certified.mean * 60), 60)
        _, high = wilson(round(attacked.mean * 60), 60)
        assert low <= high, eps
        fell.append(attacked.mean)
    assert min(fell) < 0.8 * max(fell)  # the attack does something
    data = load("mnist", root=mnist_root, device=torch.device("cpu"), train=100, test=60)
    for key, job in jobs.items():
        if _judged_by(job, "pgd"):
            images = load_file(store.folder(key) / IMAGES)["x_adv"]
            model = load_model(store, jobs[job.needs[0]], data)
            with scope(3):
                answer = model.predict(images)
            held = right & (radius >= float(job.threat.eps))
            label = torch.tensor(columns["label"])
            assert not (held & (answer != label) & (answer != -1)).any()
