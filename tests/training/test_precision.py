"""`train.precision=auto`: a probe of the device decides, leaves no trace, and is asked once in a training."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import data_of, jobs_of, run, training_job
from torch import Tensor, nn

from bench.core import precision
from bench.training.precision import probe
from bench.training.resume import Checkpointer
from bench.training.train import train

ALWAYS, NEVER = 0.0, math.inf  # speedups from which on bf16 is taken
RESNET: dict[str, Any] = {"model": "preact_resnet18", "epochs": 1, "train": 48}


class Slow(nn.Module):
    """A net with BatchNorm and dropout that takes longer in one precision."""

    def __init__(self, slow: str) -> None:
        super().__init__()
        self.conv, self.norm, self.drop, self.head = (
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.Dropout(),
            nn.Linear(144, 4),
        )
        self.slow = slow

    def forward(self, x: Tensor) -> Tensor:
        if ("bf16" if torch.is_autocast_enabled("cpu") else "fp32") == self.slow:
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
        return self.head(self.drop(self.norm(self.conv(x))).flatten(1))


@pytest.mark.parametrize(("slow", "expected"), [("fp32", "bf16"), ("bf16", "fp32"), ("neither", "fp32")])
def test_the_probe_finds_the_faster_precision_and_leaves_no_trace(
    slow: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a difference fp32 is kept: a net of this size gains nothing."""
    monkeypatch.setattr(precision, "SECONDS", 0.3)
    net = Slow(slow).train()
    before, stream = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert probe(net, torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(2)) == expected
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(p.grad is None for p in net.parameters())
    assert "forward" not in vars(net)


@pytest.mark.parametrize("defense", ["fast_at", {"name": "pgd_at", "set": {"steps": 2, "rel_step_size": 0.5}}])
@pytest.mark.parametrize(("speedup", "chosen"), [(ALWAYS, "bf16"), (NEVER, "fp32")])
def test_auto_trains_bit_for_bit_as_the_precision_that_it_chose(
    defense: Any, speedup: float, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A residual net with BatchNorm; the record names the precision in both cases, and 16-bit steps are counted."""
    monkeypatch.setattr(precision, "SPEEDUP", speedup)
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    auto, fixed = (training_job(defense, **RESNET, precision=each) for each in ("auto", chosen))
    found, expected = (run(job, data_of(job), tmp_path) for job in (auto, fixed))
    for name, value in expected.model.net.state_dict().items():
        assert torch.equal(found.model.net.state_dict()[name], value), name
        assert value.dtype in (torch.float32, torch.int64)
    assert found.metrics.precision == expected.metrics.precision == chosen
    assert found.metrics.active_steps == ({"bf16": found.metrics.steps} if chosen == "bf16" else {})


def test_a_resumed_training_keeps_the_precision_of_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a second machine where the probe would choose otherwise."""
    monkeypatch.setattr(precision, "SPEEDUP", ALWAYS)
    monkeypatch.setattr(precision, "SECONDS", 0.0)
    job = training_job("fast_at", **RESNET, precision="auto")
    data, whole = data_of(job), run(training_job("fast_at", **RESNET, precision="bf16"), data_of(job), tmp_path)

    def stop(values: dict[str, Any]) -> None:
        if values.get("step", 0) >= 2:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoints" / "one"
    with pytest.raises(KeyboardInterrupt):
        train(job, data, tmp_path / "train.jsonl", stop, Checkpointer(path, lambda: "me", every=0.0, share=math.inf))
    monkeypatch.setattr(precision, "SPEEDUP", NEVER)
    again = run(job, data, tmp_path, Checkpointer(path, lambda: "me", share=math.inf))
    assert (again.metrics.resumed, again.metrics.precision) == (1, "bf16")
    for name, value in whole.model.net.state_dict().items():
        assert torch.equal(again.model.net.state_dict()[name], value), name


def test_the_key_tells_auto_from_what_it_may_choose() -> None:
    keys = [jobs_of(precision=each)[0].key for each in ("fp32", "bf16", "fp16", "auto")]
    assert len(set(keys)) == 4
    assert keys[0] == jobs_of()[0].key
