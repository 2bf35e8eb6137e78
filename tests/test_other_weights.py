"""Work and results of other weights, code or images are never mixed with those of the present ones."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Bench, write_plugins

from bench.data.images import Data, load
from bench.jobs.judge import origin_of
from bench.jobs.worker import work
from bench.planning import catalog
from bench.planning.job import Job
from bench.records.store import Store, weights_file
from bench.training import checkpoint, resume

ROOT = Path("no-data-here")
BLOCKS = 4
CODE_FILES = (
    *("core/classifier.py", "models/mlp.py", "data/images.py", "planning/spec.py", "plugins.py"),
    *("jobs/evaluate.py", "training/guards.py", "../defenses/standard.py", "../attacks/pgd.py"),
)
CASCADE = f"{{version: custom, attacks_to_run: [apgd-ce], block_size: {40 // BLOCKS}, batch_size: {40 // BLOCKS}}}"
SPEC = f"""
data: {{name: digits, test: 40, train: 300}}
threat: {{eps: 0.05}}
train: {{epochs: 2}}
seeds: [0, 1]
defenses: [standard]
checks: 'off'
attacks: [{{name: autoattack, set: {CASCADE}}}]
"""


class Killed(Exception):
    """Stands for a kill behind a block."""


def after(blocks: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kill an evaluation once it has kept so many blocks; names of those that were kept."""
    write, kept = checkpoint.write, list[str]()

    def bomb(path: Path, *rest: Any) -> None:
        write(path, *rest)
        if not path.stem.endswith("-state"):
            kept.append(path.stem)
            if len(kept) == blocks:
                raise Killed

    monkeypatch.setattr(checkpoint, "write", bomb)
    return kept


@pytest.mark.parametrize("swapped", [False, True])
def test_blocks_of_other_weights_are_judged_again(swapped: bool, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("s.yaml").write_text(SPEC)
    assert bench("run", "s.yaml", "--executor", "debug", "--device", "cpu").code == 0
    store = Store(Path("results"))
    jobs = [job for job in store.jobs().values() if job.kind == "evaluate"]
    job, other = sorted(jobs, key=lambda each: each.what["seed"])
    honest, record = store.samples(job.key), store.folder(job.key) / "record.json"
    record.unlink()
    with monkeypatch.context() as patch:
        after(2, patch)
        assert work(store.root, job.key, ROOT) == "error"
    assert len(list((store.folder(job.key) / "blocks").glob("block-*[0-9].safetensors"))) == 2
    if swapped:  # as a training that was done again on another machine leaves it
        mine, theirs = (store.folder(each.needs[0]) for each in (job, other))
        shutil.copy(theirs / weights_file("last"), mine)
        store.put(store.job(job.needs[0]), "done", {**(store.record(other.needs[0]) or {}), "key": job.needs[0]})
    with monkeypatch.context() as patch:
        resumed = after(-1, patch)
        assert work(store.root, job.key, ROOT) == "done"
    assert len(resumed) == (BLOCKS if swapped else 2)
    found = store.samples(job.key)
    record.unlink()
    assert not record.with_name("blocks").exists()
    assert work(store.root, job.key, ROOT) == "done"  # without a kill
    assert all(np.array_equal(values, store.samples(job.key)[name]) for name, values in found.items())
    assert np.array_equal(found["correct"], honest["correct"]) != swapped


def put(store: Store, job: Job, **files: str) -> Job:
    """A finished job whose record names these files."""
    store.add(job)
    store.put(job, "done", {"metrics": {}, "files": {name.replace("_", "."): sha for name, sha in files.items()}})
    return job


def test_the_origin_of_a_block_names_all_it_depends_on(
    fresh_catalog: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {Path(str(path)).stem: Path(str(path)) for path in write_plugins(tmp_path) if path != "--plugin"}
    monkeypatch.setenv("BENCH_PLUGINS", os.pathsep.join(map(str, files.values())))
    data, store = load("digits", root=ROOT, device=torch.device("cpu"), test=16), Store(tmp_path / "results")
    store.prepare()
    defense = {"name": "fragile", "set": {"base": {"name": "plain", "set": {}}}}
    attack = {"name": "picky", "set": {"base": {"name": "wobble", "set": {}}}}
    train = Job("train", {"defense": defense})
    sources = [put(store, Job("evaluate", {"n": n}, ("0" * 12,))) for n in (1, 2)]
    keys = [source.key for source in sources]
    job = Job("evaluate", {"attack": attack, "weights": "best"}, (train.key, *keys))

    def origin(last: str = "a", best: str = "b", images: str = "c", seen: Data = data, own: Job = job) -> str:
        catalog.get.cache_clear()
        put(store, train, **{"weights-last_safetensors": last, "weights-best_safetensors": best})
        put(store, sources[0], adversarial_safetensors=images)
        return origin_of(store, own, seen, keys)

    honest = origin()
    assert origin(last="other") == honest  # these are not judged
    others = [origin(best="other"), origin(images="other"), origin(seen=replace(data, test_hash="other"))]
    others.append(origin(seen=replace(data, test=data.test._replace(x=data.test.x.to("meta")))))  # another device
    for path in files.values():  # attack, defense and the base of each, none of which lies in the tree
        text = path.read_text()
        path.write_text(text + "\n# another\n")
        others.append(origin())
        path.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "another")
        others.append(origin())
    here = Path(resume.__file__).parents[1]
    copy = tmp_path / "copy" / "bench"
    for folder in (here, here.parent / "defenses", here.parent / "attacks"):
        shutil.copytree(folder, copy.parent / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(resume, "__file__", str(copy / "training" / "resume.py"))
    assert origin() == honest  # wherever it lies
    (copy / "progress" / "live.py").write_text("# says nothing of numbers\n")
    assert origin() == honest
    for name in CODE_FILES:
        text = (copy / name).read_text()
        (copy / name).write_text(text + "\n# another\n")
        others.append(origin())
        (copy / name).write_text(text)
    assert origin() == honest
    assert len({honest, *others}) == 1 + len(others) == 1 + 4 + len(files) + 1 + len(CODE_FILES)
