"""A killed evaluation goes on where it stood, and says in the end what an uninterrupted one says."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import toy_job
from harness import Bench, outcomes, tiny
from torch import Tensor, nn
from worker_process import WorkerProcess

from attacks.pgd import PGD
from bench.atomic import file_hash
from bench.core.classifier import Classifier
from bench.core.stochastic import Randomized
from bench.data.images import Data, Images, load, to_float
from bench.jobs.block_cache import BlockCache
from bench.jobs.evaluate import evaluate
from bench.jobs.worker import work
from bench.planning.job import EvaluateJob
from bench.records.record import JobError, Record
from bench.records.store import Store
from bench.training import checkpoint

RESULTS, ROOT = Path("results"), Path("no-data-here")


class Killed(Exception):
    """Stands for a kill between two saves."""


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits", root=ROOT, device=torch.device("cpu"), test=60)


class _Noisy(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x + 0.3 * torch.randn_like(x))
        return out


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).eval()


SUITE = ["apgd-ce", "apgd-dlr"]
CASCADE = {"version": "custom", "attacks_to_run": SUITE, "batch_size": 20, "block_size": 40}
EOT = {"base": {"name": "pgd", "set": {"steps": 3, "rel_step_size": 0.5}}, "draws": [1, 2, 4], "tolerance": 0.0}


def _job(name: str, settings: dict[str, Any]) -> EvaluateJob:
    return toy_job("evaluate", {"attack": {"name": name, "set": settings}, "n": 60})


def _run(job: EvaluateJob, model: Classifier, data: Data, kept: BlockCache | None = None) -> dict[str, Tensor]:
    columns, images, metrics = evaluate(job, model, data, lambda values: None, kept)
    assert images is not None
    assert metrics.n == 60
    return {**columns, "images": images}


@pytest.mark.parametrize(
    ("name", "settings", "noisy"),
    [
        ("autoattack", CASCADE, False),
        ("autoattack", {**CASCADE, "eot": 2}, True),
        ("eot", EOT, True),
    ],
    ids=["cascade", "gather", "eot"],
)
def test_a_kill_at_any_save_changes_no_bit(
    name: str, settings: dict[str, Any], noisy: bool, digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Randomized(_Noisy(_net()), 3) if noisy else Classifier(_net())
    job = _job(name, settings)
    if not noisy:  # every image is attacked, in two batches of a block: which are left is known before the first
        x = digits.test.x
        digits = replace(digits, test=Images(x, model.predict(to_float(x))))
    whole = _run(job, model, digits)
    assert 0 < whole["correct"].float().mean() < 1
    write, saves = checkpoint.write, 0

    def count(*args: Any) -> None:
        nonlocal saves
        saves += 1
        write(*args)

    monkeypatch.setattr(checkpoint, "write", count)
    assert _same(_run(job, model, digits, BlockCache(tmp_path / "counted", "me")), whole)
    assert saves >= 4
    for fatal in range(1, saves):
        kept, seen = BlockCache(tmp_path / f"kill-{fatal}", "me"), 0

        def bomb(*args: Any, at: int = fatal) -> None:
            nonlocal seen
            seen += 1
            write(*args)
            if seen == at:
                raise Killed

        monkeypatch.setattr(checkpoint, "write", bomb)
        with pytest.raises(Killed):
            _run(job, model, digits, kept)
        monkeypatch.setattr(checkpoint, "write", write)
        assert _same(_run(job, model, digits, kept), whole)  # passes and all


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].nan_to_num(-7), expected[name].nan_to_num(-7)) for name in found
    )


def test_what_was_kept_is_used_and_that_of_other_code_or_damaged_is_not(digits: Data, tmp_path: Path) -> None:
    model, job = Classifier(_net()), _job("pgd", {"steps": 2, "rel_step_size": 0.5})
    honest = _run(job, model, digits)
    path = tmp_path / "block-000000.safetensors"
    tensors = {name: values for name, values in honest.items() if name not in ("index", "images")}
    tensors |= {"x_adv": honest["images"], "correct": torch.zeros(60, dtype=torch.bool)}
    checkpoint.write(path, tensors, {"origin": "me", "seconds": "3.0"})
    assert not _run(job, model, digits, BlockCache(tmp_path, "me"))["correct"].any()  # taken as it is
    assert _same(_run(job, model, digits, BlockCache(tmp_path, "another")), honest)
    checkpoint.write(path, tensors, {"origin": "me", "seconds": "3.0"})
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert checkpoint.read(path) is None
    path.write_bytes(whole[: len(whole) // 2])
    assert _same(_run(job, model, digits, BlockCache(tmp_path, "me")), honest)


def test_seconds_of_all_attempts_count(digits: Data, tmp_path: Path) -> None:
    model, job = Classifier(_net()), _job("pgd", {"steps": 2, "rel_step_size": 0.5})
    kept = BlockCache(tmp_path, "me")
    kept.write("block-000000-state", {"x": torch.zeros(1)}, 100.0)
    _, _, metrics = evaluate(job, model, digits, lambda values: None, kept)
    assert metrics.attack_seconds > 100
    assert [path.name for path in tmp_path.iterdir()] == ["block-000000.safetensors"]


def test_shards_put_together_are_the_whole(bench: Bench) -> None:
    Path("s.yaml").write_text(
        "data: {name: digits, test: 60, train: 300}\nthreat: {eps: 0.05}\ntrain: {epochs: 2}\ndefenses: [standard]\n"
        "checks: 'off'\nattacks:\n  - {name: autoattack, shards: SHARDS, set: {version: custom, attacks_to_run: "
        "[apgd-ce, apgd-dlr], block_size: 20, batch_size: 10}}\n"
    )
    text = Path("s.yaml").read_text()
    for shards in (1, 3):
        Path("s.yaml").write_text(text.replace("SHARDS", str(shards)))
        assert bench("run", "s.yaml", "--results-dir", f"r{shards}", "--executor", "debug").code == 0
    one, three = outcomes(Path("r1")), outcomes(Path("r3"))
    assert set(one) < set(three)  # the same keys, and those of the shards
    assert len(three) == len(one) + 3
    whole = next(job.key for job in Store(Path("r1")).jobs().values() if job.kind == "evaluate")
    assert one[whole] == three[whole]
    records = [Store(Path(folder)).record(whole) for folder in ("r1", "r3")]
    assert records[0].files == records[1].files  # adversarial images included
    assert [len(record.metrics.shards or ()) for record in records] == [0, 3]
    assert records[0].metrics.test_hash == records[1].metrics.test_hash
    again = bench("run", "s.yaml", "--results-dir", "r1", "--executor", "debug")
    assert "0 jobs run" in again.out  # what stands needs no shards
    store = Store(Path("r3"))
    whole_job = store.job(whole)
    (store.folder(whole) / "record.json").unlink()
    store.put(store.job(whole_job.parts[1]), Record("error", error=JobError("RuntimeError", "lost")))
    assert work(store.root, whole, ROOT) == "error"
    assert "ended as error" in store.record(whole).error.message
    Path("s.yaml").write_text(text.replace("SHARDS", "4"))
    refused = bench("run", "s.yaml")
    assert refused.code == 2
    assert "shards is 4, but its 60 images are in 3 blocks of at most 20" in refused.err


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_autoattack_killed_at_random_moments_gives_the_verdicts_of_an_uninterrupted_run(bench: Bench) -> None:
    words = ["--n", 100, "--attack", "autoattack", "--set", "autoattack.batch_size=20", "--eps", 0.05, "--epochs", 4]
    for folder in ("whole", "killed"):
        done = bench(
            *tiny("--results-dir", folder, "--executor", "debug", defense="standard", attack="clean"), *words[6:]
        )
        assert done.code == 0
    plan = bench("run", "--defense", "standard", "--no-baseline", "--model", "mlp", "--train-n", 64, "--checks", "off",
                 "--device", "cpu", "--executor", "debug", "--results-dir", "whole", *words)  # fmt: skip
    assert plan.code == 0
    jobs = Store(Path("whole")).jobs().values()
    job = next(job for job in jobs if job.kind == "evaluate" and job.attack.name == "autoattack")
    store = Store(Path("killed"))
    store.add(job)
    for name in ("record.json", "weights-last.safetensors"):
        source = Store(Path("whole")).folder(job.needs[0]) / name
        (store.folder(job.needs[0])).mkdir(exist_ok=True)
        (store.folder(job.needs[0]) / name).write_bytes(source.read_bytes())
    store.add(Store(Path("whole")).job(job.needs[0]))
    expected = outcomes(Path("whole"))[job.key]
    kills, dice = 0, random.Random(0)
    state = store.folder(job.key) / "blocks" / "block-000000-state.safetensors"
    while kills < 20:
        before = file_hash(state)
        process = WorkerProcess(store, job.key, ROOT)
        while process.alive() and file_hash(state) == before:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.2))
        kills += process.kill()
        if store.done(job.key):  # between two kills there was time for the rest: once more from the start
            assert outcomes(Path("killed"))[job.key] == expected
            (store.folder(job.key) / "record.json").unlink()
    assert work(store.root, job.key, ROOT) == "done"
    assert outcomes(Path("killed"))[job.key] == expected
    assert not state.parent.exists()


def test_each_block_has_draws_of_its_own(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PGD, "block", 30)
    x = digits.test.x[:1].repeat(60, 1, 1, 1)
    y = Classifier(_net()).predict(to_float(x))
    data = replace(digits, test=Images(x, y))
    _, images, _ = evaluate(
        _job("pgd", {"steps": 1, "rel_step_size": 1.0}), Classifier(_net()), data, lambda values: None
    )
    assert images is not None
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[:30], images[30:])
