"""Checkpoints by their name on the Hugging Face Hub, from a cache that the tests write; no network is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nets
import pytest
import torch
from harness import Outcome
from safetensors.torch import save_file

from bench.atomic import file_hash
from bench.planning.checkpoints import find
from bench.records.record import train_metrics
from bench.records.store import Store

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ARCH = ("--arch", "mlp", "--arch-set", "width=64", "--arch-set", "depth=1")


class Hub:
    """A cache as huggingface_hub lays it out, with one repository, and `bench` where no network is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.repo = folder, folder / "models--someone--digits.v2"
        (self.repo / "refs").mkdir(parents=True)
        (self.repo / "refs" / "main").write_text(COMMIT)
        self.snapshot = self.repo / "snapshots" / COMMIT
        self.snapshot.mkdir(parents=True)

    def bench(self, *words: object) -> Outcome:
        environment = os.environ | {"HF_HUB_CACHE": str(self.folder), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "bench", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        return Outcome(done.returncode, done.stdout, done.stderr)

    def eval(self, name: str, *words: object) -> Outcome:
        fast = ("--attack", "clean", "--n", 20, "--checks", "off", "--device", "cpu")
        return self.bench("eval", name, *ARCH, *fast, *words)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    made = Hub(tmp_path / "hub")
    (made.snapshot / "README.md").write_text("a card")
    (made.snapshot / "weights").mkdir()
    save_file(nets.weights(), made.snapshot / "weights" / "model.safetensors")
    torch.save(nets.weights(), made.snapshot / "model.pt")
    return made


def test_the_only_safetensors_file_is_taken_and_the_record_names_its_commit(hub: Hub) -> None:
    done = hub.eval("hf:someone/digits.v2")
    assert done.code == 0, done.err
    assert "digits.v2" in done.out
    record = next(record for job, record in Store(Path("results")).records() if job.kind == "import")
    assert train_metrics(record).origin == f"hf:someone/digits.v2/weights/model.safetensors@{COMMIT}"
    job = next(job for job in Store(Path("results")).jobs().values() if job.kind == "import")
    assert job.checkpoint == file_hash(hub.snapshot / "weights" / "model.safetensors")
    again = hub.eval(f"hf:someone/digits.v2/weights/model.safetensors@{COMMIT}")
    assert "already done" in again.out + again.err
    assert not list(Path("results").glob("*/blocks"))


def test_weights_of_a_hub_for_a_model_file(hub: Hub) -> None:
    Path("mine.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    save_file({"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}, hub.snapshot / "linear.safetensors")
    named = "hf:someone/digits.v2/linear.safetensors"
    done = hub.bench("doctor", "mine.py:build", "--checkpoint", named, "--dataset", "digits")
    assert "OK    loading: linear.safetensors; " in done.out, done.out + done.err


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("hf:someone", "'hf:someone'; expected hf:OWNER/REPO, hf:OWNER/REPO/FILE or either with @REVISION"),
        ("hf:someone/other", "hf:someone/other is not in the cache of huggingface_hub"),
        ("hf:someone/digits.v2/missing.pt", "where it can: hf download someone/digits.v2 missing.pt, then"),
        ("hf:someone/digits.v2@v3", "hf:someone/digits.v2@v3 is not in the cache"),
    ],
)
def test_a_name_that_gives_nothing_is_one_line(hub: Hub, name: str, told: str) -> None:
    done = hub.eval(name)
    assert done.code in (1, 2)
    assert told in done.err
    assert done.err.count("\n") == 1, done.err
    assert not Path("results").exists()


def test_a_repository_of_several_checkpoints_or_of_none_lists_its_files(hub: Hub) -> None:
    save_file(nets.weights(), hub.snapshot / "ema.safetensors")
    told = "has 2 checkpoints; add one: ema.safetensors, weights/model.safetensors"
    assert told in hub.eval("hf:someone/digits.v2").err
    for file in (hub.snapshot / "ema.safetensors", hub.snapshot / "weights" / "model.safetensors"):
        file.unlink()
    assert hub.eval("hf:someone/digits.v2").code == 0  # model.pt
    (hub.snapshot / "model.pt").unlink()
    assert "has no checkpoint (.safetensors, .pt," in hub.eval("hf:someone/digits.v2").err


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LookupError, match=r'needs huggingface_hub: pip install "defense-bench\[zoo\]"'):
        find("hf:someone/digits.v2")
