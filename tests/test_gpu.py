"""What only a GPU can show: training and judging end to end, 16-bit passes, steps that never wait for the host.

Not part of CI, which has no GPU: `pytest -m gpu`, or `bash benchmarks/gpu.sh tests`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fake_jobs
import pytest
import torch
from fake_jobs import measured, says, starts
from harness import Bench

from bench import plugins
from bench.core.defense import Batch
from bench.executors.devices import query, slots
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.models.common import Inputs
from bench.planning import catalog
from bench.planning.job_fields import JobThreat, PluginChoice
from bench.records.store import Store
from bench.training.optimizer import build_updater
from bench.training.recipe import Recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

THREAT = JobThreat("Linf", "8/255")
# fast_at and free_at are left out: a guard that counts on the host, and images kept between batches
SYNC_FREE = ["standard", "pgd_at", "trades", "mart", "rat", "awp", "noisy", "noisy_sampled", "smoothing", "pni", "rse"]
INPUTS = Inputs(channels=3, size=32, classes=10, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
SETTINGS = {
    **{"epochs": 1, "batch_size": 64, "augment": False},
    **{"optimizer": "sgd", "lr": 0.01, "weight_decay": 5e-4, "schedule": "constant"},
}


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SYNC_FREE)
def test_a_training_step_never_waits_for_the_device(name: str, waiting_is_an_error: None) -> None:
    plugin = catalog.get("defenses", name)
    threat = THREAT if plugin.uses_threat else None
    defense = plugins.make("defenses", PluginChoice(name, plugin.resolve({})), threat)
    net = defense.wrap(plugins.build_model("preact_resnet18", {"width": 8}, INPUTS)).cuda().train()
    net = net.to(memory_format=torch.channels_last)
    updater = build_updater(defense, net, Recipe.model_validate(SETTINGS), 10)
    x = torch.rand(64, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    y = torch.arange(64, device="cuda") % 10
    batch = Batch(x, y, torch.arange(64, device="cuda"), 0, 0.5)
    defense.step(net, updater, batch)  # caches and lazy initialization may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    terms = defense.step(net, updater, batch)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value).all() for value in terms.values())


def test_a_run_on_the_gpu_agrees_with_one_on_the_cpu(bench: Bench, tmp_path: Path) -> None:
    """Same spec, same seeds; other kernels may round otherwise, so accuracies agree to a few points."""
    found = {}
    for device in ("cpu", "cuda"):
        words = ["run", "--defense", "standard,noisy,pgd_at", "--attack", "clean,pgd", "--epochs", "8", "--eps", "0.1"]
        outcome = bench(*words, "--device", device, "--results-dir", tmp_path / device, "-q")
        assert outcome.code == 0, outcome.err
        store = Store(tmp_path / device)
        found[device] = {key: store.samples(key)["correct"].mean() for key, j in store.jobs().items() if j.needs}
        assert all(store.record(key).state == "done" for key in store.jobs())
    for key, accuracy in found["cpu"].items():
        assert found["cuda"][key] == pytest.approx(accuracy, abs=0.08), key


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_training_learns_there(precision: str, bench: Bench, tmp_path: Path) -> None:
    words = [
        "run",
        "--model",
        "small_cnn",
        "--defense",
        "pgd_at",
        "--attack",
        "clean",
        "--epochs",
        "8",
        "--eps",
        "0.05",
    ]
    outcome = bench(
        *words, "--set", f"train.precision={precision}", "--device", "cuda", "--results-dir", tmp_path, "-q"
    )
    assert outcome.code == 0, outcome.err
    store = Store(tmp_path)
    accuracies = [store.samples(key)["correct"].mean() for key, job in store.jobs().items() if job.needs]
    assert min(accuracies) > 0.6


def test_the_scheduler_finds_the_true_devices_and_packs_them(tmp_path: Path) -> None:
    there = query()
    assert sorted(gpu.name for gpu in there) == sorted(
        torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())
    )
    store = Store(tmp_path / "results")
    store.prepare()
    where = slots("cuda", None, named=[gpu.index for gpu in there])
    measured(store, fake_jobs.train(99), 1.0, cuda=1000.0)  # so small that two share any card
    jobs = [fake_jobs.train(seed) for seed in range(2 * len(there))]
    for job in jobs:
        says(tmp_path, job, "ok 1")
    list(drive(Local(tmp_path, where, work=fake_jobs.work), jobs, store))
    told = [starts(tmp_path, job)[0] for job in jobs]
    assert sorted(start["shown"]["CUDA_VISIBLE_DEVICES"] for start in told) == sorted(2 * [gpu.index for gpu in there])
    assert {start["device"] for start in told} == {"cuda"}
