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
from factories import evaluated, only, toy_job, trained
from harness import Bench, states, tiny, write_plugins, written

from bench.data.images import Data, load
from bench.executors.base import todo
from bench.jobs.evaluation_job import origin_of
from bench.jobs.worker import work
from bench.planning import catalog
from bench.planning.job import Job
from bench.planning.plan import plan
from bench.planning.spec import build
from bench.records.record import JobError, Record
from bench.records.store import Store, weights_file
from bench.soundness.verdicts import with_verdicts
from bench.tables.leaderboard import markdown
from bench.training import checkpoint, resume

FIELD = "weights_sha256"
ROOT = Path("no-data-here")
BLOCKS = 4
CODE_FILES = (
    *("core/classifier.py", "models/mlp.py", "data/images.py", "planning/spec.py", "plugins.py"),
    *("jobs/evaluate.py", "training/divergence.py", "../defenses/standard.py", "../attacks/pgd.py"),
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
    job, other = sorted(jobs, key=lambda each: each.seed)
    honest, record = store.samples(job.key), store.folder(job.key) / "record.json"
    record.unlink()
    with monkeypatch.context() as patch:
        after(2, patch)
        assert work(store.root, job.key, ROOT) == "error"
    assert len(list((store.folder(job.key) / "blocks").glob("block-*[0-9].safetensors"))) == 2
    if swapped:  # as a training that was done again on another machine leaves it
        mine, theirs = (store.folder(each.needs[0]) for each in (job, other))
        shutil.copy(theirs / weights_file("last"), mine)
        store.put(store.job(job.needs[0]), store.record(other.needs[0]))
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
    store.put(job, Record("done", files={name.replace("_", "."): sha for name, sha in files.items()}))
    return job


def test_the_origin_of_a_block_names_all_it_depends_on(
    fresh_catalog: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = {Path(str(path)).stem: Path(str(path)) for path in write_plugins(tmp_path) if path != "--plugin"}
    monkeypatch.setenv("BENCH_PLUGINS", os.pathsep.join(map(str, files.values())))
    data, store = load("digits", root=ROOT, device=torch.device("cpu"), test=16), Store(tmp_path / "results")
    store.prepare()
    defense = {"name": "fragile", "set": {"base": {"name": "plain", "set": {}, "revision": 1}}}
    attack = {"name": "picky", "set": {"base": {"name": "wobble", "set": {}, "revision": 1}}}
    train = toy_job("train", {"defense": defense})
    sources = [put(store, toy_job("evaluate", {"n": n}, ("0" * 12,))) for n in (1, 2)]
    keys = [source.key for source in sources]
    job = toy_job("evaluate", {"attack": attack, "weights": "best"}, (train.key, *keys))

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


def names(store: Store, key: str, sha: str | None) -> None:
    """Let a record name weights, or none, as those do that are older than the field."""
    store.put(store.job(key), replace(store.record(key), weights_sha256=sha))


@pytest.mark.parametrize("other", [False, True])
def test_evaluations_of_a_training_that_was_done_again_stand_only_if_its_weights_are_the_same(
    other: bool, bench: Bench, tmp_path: Path
) -> None:
    """As after a git clone, which brings no weights: one attack is added, so the training is done again."""
    plugins = [*write_plugins(tmp_path), "--executor", "debug"]
    assert bench(*tiny(*plugins, defense="fragile", attack="clean,wobble,picky")).code == 0
    found = Store(Path("results"))
    jobs = found.jobs()
    (train,) = [key for key, job in jobs.items() if job.kind == "train"]
    weights = found.folder(train) / weights_file("last")
    sha = found.record(train).files[weights.name]
    assert found.record(train).weights_sha256 is None
    assert {found.record(key).weights_sha256 for key in jobs if key != train} == {sha}  # also the unsupported one
    weights.unlink()
    (tmp_path / "fragile.todo").write_text("other" if other else "")
    before = written(found.root)
    more = tiny(*plugins, defense="fragile", attack="clean,wobble,picky,fgsm")
    first = bench(*more)
    assert first.code == 0
    assert "2 jobs run, 3 already done" in first.err + first.out
    changed = {key for key, stat in written(found.root).items() if before.get(key) != stat}
    assert changed & before.keys() == {train}  # what stands is not known to be outdated before the training has ended
    new = found.record(train).files[weights.name]
    assert (new != sha) == other
    assert ("mixed weights" in first.out) == other
    checked = bench("verify", "--sample", 0)
    assert checked.code == (4 if other else 0)
    assert checked.out.count("it used other weights than its training has now") == (3 if other else 0)
    before = written(found.root)
    second = bench(*more)
    assert ("3 jobs run, 2 already done" if other else "0 jobs run, 5 already done") in second.err + second.out
    assert "mixed weights" not in second.out
    after_all = written(found.root)
    assert {key for key in before if before[key] != after_all[key]} == (
        {key for key in jobs if key != train} if other else set()
    )
    assert {found.record(key).weights_sha256 for key in found.jobs() if key != train} == {new}
    assert states(found.root)["fragile/picky"] == "unsupported"
    assert bench("verify", "--sample", 0).code == 0


def test_only_what_names_other_weights_is_done_again(tmp_path: Path) -> None:
    found = Store(tmp_path / "results")
    found.prepare()
    weights = {weights_file("last"): "last", weights_file("best"): "best"}
    train = toy_job("train", {"seed": 0})
    last, best = (toy_job("evaluate", {"n": 1, "weights": which}, (train.key,)) for which in ("last", "best"))
    parts = [toy_job("shard", {"n": 2, "weights": "last", "images": [k, k + 1]}, (train.key,)) for k in (0, 1)]
    whole = toy_job("evaluate", {"n": 2, "weights": "last"}, (train.key,), tuple(part.key for part in parts))
    audit = toy_job("audit", {"n": 1, "weights": "last"}, (train.key, last.key))
    jobs = [train, last, best, *parts, whole, audit]
    for job in jobs:
        found.add(job)
        found.put(job, Record("done", files=weights if job is train else {}))
    for job in jobs:
        if job is train:
            continue
        for name in (None, "best" if job is best else "last"):
            names(found, job.key, name)
            assert todo(jobs, found) == []
    names(found, best.key, "last")
    assert todo([train, last, best], found) == [train, best]  # its weights are not there to be judged
    names(found, best.key, "best")
    names(found, parts[0].key, "other")
    assert todo(jobs, found) == []  # of an evaluation that stands
    names(found, whole.key, "other")
    assert todo(jobs, found) == [train, parts[0], whole]
    names(found, parts[0].key, "last")
    names(found, whole.key, "last")
    names(found, audit.key, "other")
    assert todo(jobs, found) == [train, audit]
    found.put(last, Record("diverged", error=JobError("Diverged", ""), weights_sha256="x"))
    assert todo([train, last, best], found) == [train, last]
    found.put(train, Record("diverged"))  # nothing could judge it
    assert todo(jobs, found) == []


def test_shards_and_audits_of_other_weights_are_not_put_together(fresh_catalog: None, tmp_path: Path) -> None:
    import yaml

    spec = yaml.safe_load(SPEC) | {"seeds": [0], "checks": "quick"}
    spec["attacks"][0]["shards"] = 2
    jobs = plan(build(spec), tmp_path)
    found = Store(tmp_path / "results")
    found.prepare()
    for job in jobs:
        found.add(job)
    train, one, two, whole, _, audit = jobs
    assert [job.kind for job in jobs] == ["train", "shard", "shard", "evaluate", "audit", "audit"]
    assert [work(found.root, job.key, ROOT) for job in (train, one, two, whole, audit)] == ["done"] * 5
    sha = found.record(train.key).files[weights_file("last")]
    assert {found.record(job.key).weights_sha256 for job in (one, two, whole, audit)} == {sha}

    names(found, two.key, "other")
    assert work(found.root, whole.key, ROOT) == "error"
    assert "the shards used different weights" in found.record(whole.key).error.message
    assert found.record(whole.key).weights_sha256 is None
    names(found, two.key, None)  # older than the field: nothing is known of it, nor of the whole
    assert work(found.root, whole.key, ROOT) == "done"
    assert found.record(whole.key).weights_sha256 is None

    assert work(found.root, audit.key, ROOT) == "done"
    names(found, whole.key, "other")  # the audit judges its images with the present weights
    assert work(found.root, audit.key, ROOT) == "error"
    assert f"other weights were used by {whole.key}" in found.record(audit.key).error.message
    names(found, two.key, "other")
    assert [job.key for job in todo(jobs[:4] + [audit], found)] == [two.key, whole.key, audit.key]


def test_a_row_of_several_weights_has_no_worst_case(store: Store) -> None:
    seeds = [trained(store, seed=seed) for seed in range(2)]
    clean, steep = (
        [evaluated(store, seed, name, [1, right]) for seed in seeds] for name, right in (("clean", 1), ("steep", 0))
    )
    for place in range(2):  # of course seeds differ
        names(store, clean[place], f"seed {place}")
        names(store, steep[place], f"seed {place}")
    assert only(store).accuracy.worst.mean == 0.5
    names(store, steep[1], None)  # unknown
    assert only(store).accuracy.worst.mean == 0.5
    names(store, steep[1], "seed 0")
    row = only(store)
    assert row.accuracy.worst.values == {}
    assert row.provenance.keys == {}
    assert row.accuracy.worst.state() == "mixed weights"
    assert {seed: reason for seed, (_, reason) in row.accuracy.worst.absent.items()} == dict.fromkeys(
        range(2), row.accuracy.worst.absent[0][1]
    )
    assert row.accuracy.worst.absent[1][1].startswith(
        f"{clean[1]} used weights seed 1, {steep[1]} used seed 0; `bench run` repeats"
    )
    assert row.accuracy.attacks["steep"].mean == 0.5  # each is what it was
    text = markdown(store)
    assert "| mixed weights |" in text
    assert f"worst case: mixed weights: {clean[1]}" in text
    (with_verdict,) = with_verdicts(store, [row])
    compared = [finding for finding in with_verdict.findings if finding.code in ("C7", "C8", "C13")]
    assert {(finding.level, finding.note) for finding in compared} == {("not checked", "mixed weights")}
    names(store, steep[1], "seed 1")
    certificate = evaluated(store, seeds[0], "certify", [1, 1], columns={"radius": np.array([0.3, 0.6])})
    assert only(store).accuracy.worst.mean == 0.5
    names(store, certificate, "other")
    assert only(store).accuracy.worst.state() == "mixed weights"
    evaluated(store, seeds[0], "certify", state="error", n=2)  # the same job
    names(store, certificate, "other")
    assert only(store).accuracy.worst.mean == 0.5  # what has no result mixes nothing
