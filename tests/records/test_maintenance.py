"""status, logs, retry, merge, verify and gc: what they say, what they change, and what they never touch."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_store import N, contents, matrix, npz, run
from harness import Bench

from bench.atomic import file_hash, write_json
from bench.planning.job import Job
from bench.planning.plan import plan
from bench.planning.spec import load
from bench.records.leases import claim
from bench.records.record import JobError, Record
from bench.records.store import IMAGES, SAMPLES, Store, checksum

RESULTS = Path("results")
JOBS = matrix(2, 3)
TRAIN, CLEAN, STEEP = JOBS[:3]


@pytest.fixture
def store(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A finished matrix in ./results."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    run(RESULTS, JOBS)
    return Store(RESULTS)


def fail(store: Store, job: Job, state: str = "error") -> None:
    (store.folder(job.key) / "record.json").unlink()
    store.put(job, Record(state, error=JobError("RuntimeError", "no luck", "long")))


def change(store: Store, job: Job, **values: Any) -> None:
    """Another record with a right checksum: what a forger writes."""
    path = store.folder(job.key) / "record.json"
    record = {**json.loads(path.read_text()), **values}
    write_json(path, {**record, "checksum": checksum(record)})


def test_status_says_what_runs_and_what_failed(store: Store, bench: Bench) -> None:
    fail(store, STEEP, "diverged")
    (store.folder(CLEAN.key) / "record.json").unlink()
    now = time.time()
    write_json(store.folder(CLEAN.key) / "progress.json", {"share": 0.25, "began": now - 110, "now": now})
    (store.folder(JOBS[5].key) / "record.json").write_text("{")
    store.reopen(JOBS[5].key)
    before = contents(RESULTS)
    lease = claim(store, CLEAN.key)
    assert lease is not None
    out = bench("status").out
    assert out.startswith("8 jobs in results: 1 diverged, 5 done, 1 running, 1 waiting\n")
    assert "\n  evaluate  1 diverged, 3 done, 1 running, 1 waiting\n" in out
    assert f"running   clean on guard (train_eps=0.1) seed 0 ({CLEAN.key}) 25%, about 5 min " in out
    # the one that waits is the only other one of its kind
    assert re.search(r"\ntime left about 5 min \d\d s \+ 1 job of unknown length on 1 slot, estimated from", out)
    assert f"diverged  steep Linf 0.1 on guard (train_eps=0.1) seed 0 ({STEEP.key}): RuntimeError: no luck" in out
    assert "1 damaged file set aside in results/quarantine/" in out
    says = json.loads(bench("status", "--json").out)
    assert says["kinds"]["evaluate"] == {"diverged": 1, "done": 3, "running": 1, "waiting": 1}
    assert [one["key"] for one in says["running"]] == [CLEAN.key]
    assert says["seconds_left"] == pytest.approx(says["running"][0]["seconds_left"], abs=2)
    assert says["jobs_of_unknown_length"] == 1
    assert [(one["key"], one["reason"]) for one in says["failed"]] == [(STEEP.key, "RuntimeError: no luck")]
    assert says["quarantined"][0]["file"] == "record.json"
    lease.release()
    assert bench("status").out.startswith("8 jobs in results: 1 diverged, 5 done, 2 waiting\n")
    assert contents(RESULTS) == before


def test_logs_take_the_beginning_of_a_key(store: Store, bench: Bench) -> None:
    (store.folder(CLEAN.key) / "log.txt").write_text("one\ntwo\n")
    assert bench("logs", CLEAN.key[:8]).out == "one\ntwo\n"
    assert bench("logs", STEEP.key).out == f"no log of {STEEP.key}: it was not run here\n"
    twin = store.root / (CLEAN.key[:11] + ("0" if CLEAN.key[11] != "0" else "1"))
    twin.mkdir()
    both = ", ".join(sorted([CLEAN.key, twin.name]))
    outcome = bench("logs", CLEAN.key[:11])
    assert (outcome.code, outcome.err) == (2, f"error: 2 jobs begin with {CLEAN.key[:11]}: {both}; give more digits\n")
    for nothing in ("zz", "", "../results"):
        assert bench("logs", nothing).code == 2


def test_logs_follow_until_the_job_has_ended(store: Store, bench: Bench) -> None:
    record, log = store.folder(CLEAN.key) / "record.json", store.folder(CLEAN.key) / "log.txt"
    record.rename("aside")
    log.write_text("one\n")

    def go_on() -> None:
        time.sleep(0.7)
        with log.open("a") as file:
            file.write("two\n")
        time.sleep(0.7)
        with log.open("a") as file:
            file.write("three\n")
        Path("aside").rename(record)

    thread = threading.Thread(target=go_on)
    thread.start()
    assert bench("logs", "-f", CLEAN.key).out == "one\ntwo\nthree\n"
    thread.join()


def test_retry_lets_the_same_run_do_failed_jobs_again(store: Store, bench: Bench) -> None:
    fail(store, STEEP, "diverged")
    fail(store, CLEAN)
    assert run(RESULTS, JOBS)["ok"] == 1  # the error, and not what diverged
    outcome = bench("retry", STEEP.key[:6])
    assert outcome.code == 0
    assert f"{STEEP.key} was diverged; the same `bench run` does it again\n1 record removed" in outcome.out
    assert run(RESULTS, JOBS)["ok"] == 1
    for job in (STEEP, CLEAN):
        record = store.record(job.key)
        assert record is not None
        assert (record.state, record.failures) == ("done", 1)
    assert "2 records of jobs that had failed before" in bench("status").out


def test_retry_of_all_that_failed_leaves_the_rest(store: Store, bench: Bench) -> None:
    fail(store, STEEP, "diverged")
    before = contents(RESULTS)
    outcome = bench("retry", "--failed")
    assert outcome.code == 0
    gone = {f"{STEEP.key}/record.json"}
    assert {k: v for k, v in before.items() if k not in gone} == {
        k: v for k, v in contents(RESULTS).items() if k != f"{STEEP.key}/attempts.json"
    }
    for words in ((CLEAN.key,), (), ("--failed", CLEAN.key), (CLEAN.key, STEEP.key)):
        assert bench("retry", *words).code == 2
    assert (store.folder(CLEAN.key) / "record.json").exists()


def test_retry_leaves_alone_what_another_process_does(store: Store, bench: Bench) -> None:
    fail(store, STEEP)
    lease = claim(store, STEEP.key)
    outcome = bench("retry", "--failed")
    assert (outcome.code, lease is not None and lease.beat()) == (1, True)
    assert f"{STEEP.key} is being done by another process" in outcome.out
    assert store.record(STEEP.key) is not None


@pytest.fixture
def halves(store: Store) -> list[Path]:
    """Two machines with the first and the last five jobs, so two of them on both."""
    for name, keys in (("one", JOBS[:5]), ("two", JOBS[3:])):
        for job in keys:
            shutil.copytree(RESULTS / job.key, Path(name) / job.key)
    return [Path("one"), Path("two")]


def test_merge_brings_machines_together(store: Store, halves: list[Path], bench: Bench) -> None:
    (halves[0] / STEEP.key / IMAGES).unlink()  # weights and images may be left out
    (halves[1] / "0123456789ab").mkdir()
    outcome = bench("merge", *halves, "--results-dir", "all")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == "8 records copied, 2 equal ones skipped, 1 unfinished job left out\n"
    whole = {name: content for name, content in contents(RESULTS).items() if name != f"{STEEP.key}/{IMAGES}"}
    assert contents(Path("all")) == whole
    assert "0 records copied, 10 equal ones skipped" in bench("merge", *halves, "--results-dir", "all").out
    assert run(Path("all"), JOBS) == {"skipped": 8}


def test_merge_completes_a_copy_whose_files_are_missing(store: Store, halves: list[Path], bench: Bench) -> None:
    whole, first, second = contents(RESULTS), *halves
    weights = "weights-last.safetensors"
    absent = [RESULTS / TRAIN.key / weights, RESULTS / STEEP.key / IMAGES, RESULTS / CLEAN.key / SAMPLES]
    for path in absent:
        path.unlink()
    both = next(job for job in JOBS[3:5] if job.kind == "evaluate" and job.threat)
    (RESULTS / both.key / IMAGES).unlink()
    for half in halves:
        path = half / both.key / IMAGES
        path.write_bytes(b"images of another machine, with the same verdicts")
        change(Store(half), both, files={**store.record(both.key).files, IMAGES: file_hash(path)})
    (first / STEEP.key / "notes.txt").write_text("no record names it")
    outcome = bench("merge", first, second)
    assert (outcome.code, outcome.err) == (0, "")
    said = "0 records copied, 3 equal ones completed by 3 files, 7 equal ones skipped, 0 unfinished jobs left out\n"
    assert outcome.out == said
    del whole[f"{both.key}/{IMAGES}"]  # what lies elsewhere is not what the record names
    assert contents(RESULTS) == whole
    assert all(store.intact(job.key) for job in JOBS)
    assert "0 records copied, 10 equal ones skipped" in bench("merge", *halves).out


def test_merge_completes_what_another_source_brought(store: Store, halves: list[Path], bench: Bench) -> None:
    train = next(job for job in JOBS[3:5] if job.kind == "train")
    weights = "weights-last.safetensors"
    (halves[0] / train.key / weights).unlink()
    outcome = bench("merge", *halves, "--results-dir", "all")
    assert "8 records copied, 1 equal one completed by 1 file, 1 equal one skipped, " in outcome.out
    assert contents(Path("all")) == contents(RESULTS)


def test_merge_leaves_files_alone_that_are_being_made(store: Store, halves: list[Path], bench: Bench) -> None:
    path = RESULTS / STEEP.key / IMAGES
    path.unlink()
    lease = claim(store, STEEP.key)
    outcome = bench("merge", halves[0])
    assert (outcome.code, path.exists(), lease is not None and lease.beat()) == (1, False, True)
    assert f"{STEEP.key} is being done in results; left alone\n" in outcome.out
    assert "0 records copied, 4 equal ones skipped" in outcome.out


@pytest.mark.parametrize("how", ["samples", "state", "record", "file", "absent", "job"])
def test_merge_names_conflicts_and_damage_and_copies_nothing(
    store: Store, halves: list[Path], bench: Bench, how: str
) -> None:
    theirs, both = Store(halves[1]), next(job for job in JOBS[3:5] if job.kind == "evaluate")
    path = halves[1] / both.key / SAMPLES
    if how == "samples":
        path.write_bytes(npz(index=list(range(N)), correct=[True] * N))
        change(theirs, both, files={SAMPLES: file_hash(path)})
    if how == "state":
        change(theirs, both, state="diverged")  # with the very same samples
    if how == "record":
        (halves[1] / both.key / "record.json").write_text("{}")
    if how == "file":
        path.write_bytes(b"other")
    if how == "absent":
        path.unlink()
    if how == "job":
        (halves[1] / both.key / "job.json").write_text("{")
    outcome = bench("merge", *halves, "--results-dir", "all")
    assert outcome.code == 1
    kind = "conflict: " if how in ("samples", "state") else "damaged: "
    assert outcome.out.startswith(kind)
    assert both.key in outcome.out.splitlines()[0]
    assert not Path("all").exists()
    before = contents(RESULTS)
    assert bench("merge", halves[1]).code == 1  # against what lies there already
    assert contents(RESULTS) == before


def test_equal_samples_in_other_bytes_are_no_conflict(store: Store, halves: list[Path], bench: Bench) -> None:
    np = pytest.importorskip("numpy")
    theirs, both = Store(halves[1]), next(job for job in JOBS[3:5] if job.kind == "evaluate")
    columns = theirs.samples(both.key)
    path = halves[1] / both.key / SAMPLES
    np.savez_compressed(path, **columns)
    files = {**theirs.record(both.key).files, SAMPLES: file_hash(path)}
    change(theirs, both, files=files)
    assert bench("merge", *halves, "--results-dir", "all").code == 0


def test_verify_finds_every_change(store: Store, bench: Bench) -> None:
    assert "8 records and 12 files match their checksums\n" in bench("verify", "--sample", 0).out
    before = contents(RESULTS)
    for name, whole in before.items():
        path = RESULTS / name
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        outcome = bench("verify", "--sample", 0)
        assert (outcome.code, outcome.out.count("WRONG  ")) == (4, 1), name
        path.write_bytes(whole)
    (RESULTS / TRAIN.key / "weights-last.safetensors").unlink()
    absent = bench("verify", "--sample", 0)
    assert absent.code == 0
    assert "1 x weights-last.safetensors not in this copy: not checked" in absent.out
    (RESULTS / CLEAN.key / SAMPLES).unlink()
    assert bench("verify").code == 4


@pytest.mark.parametrize("how", ["n", "index", "length", "kind"])
def test_verify_derives_what_it_can_again(store: Store, bench: Bench, how: str) -> None:
    """A forger who writes right checksums has to make all of it agree."""
    columns = {
        "index": [*range(1, N + 1)] if how == "index" else [*range(N)],
        "correct": [True] * (N - 1 if how == "length" else N),
    }
    (RESULTS / CLEAN.key / SAMPLES).write_bytes(npz(**columns))
    files = {SAMPLES: file_hash(RESULTS / CLEAN.key / SAMPLES)}
    metrics = json.loads((RESULTS / CLEAN.key / "record.json").read_text())["metrics"]
    metrics |= {"n": N + 1} if how == "n" else {}
    change(store, CLEAN, files=files, metrics=metrics, kind="train" if how == "kind" else "evaluate")
    outcome = bench("verify", "--sample", 0)
    assert (outcome.code, outcome.out.count("WRONG  ")) == (4, 1), outcome.out


def test_gc_removes_what_nobody_reads_and_no_record(store: Store, bench: Bench) -> None:
    folder = RESULTS / CLEAN.key
    (folder / "blocks").mkdir()
    (folder / "blocks" / "block-000000.safetensors").write_bytes(b"1234")
    (folder / "weights-best.safetensors").write_bytes(b"56")
    for name, age in ((".record.json.abcd", 7200), (".samples.npz.abcd", 0), ("notes.txt", 7200)):
        (folder / name).write_bytes(b"7")
        os.utime(folder / name, (time.time() - age,) * 2)
    (folder / "lease-000003.json").write_bytes(b"89")
    os.utime(folder / "lease-000003.json", (1.0, 1.0))
    whole = replace(STEEP, n=2 * N, parts=(STEEP.key,))
    store.add(whole)
    before = contents(RESULTS)
    dry = bench("gc", "--dry-run")
    assert contents(RESULTS) == before
    assert "4 paths, 9 bytes would be freed" in dry.out
    outcome = bench("gc")
    assert "4 paths, 9 bytes were freed; no record was touched" in outcome.out
    gone = {f"{CLEAN.key}/weights-best.safetensors", f"{CLEAN.key}/.record.json.abcd", f"{CLEAN.key}/lease-000003.json"}
    assert set(before) - set(contents(RESULTS)) == gone
    assert not (folder / "blocks").exists()
    files = {SAMPLES: file_hash(RESULTS / STEEP.key / SAMPLES)}
    shutil.copy(RESULTS / STEEP.key / SAMPLES, RESULTS / whole.key)
    store.put(whole, Record("done", files=files))
    assert IMAGES in bench("gc").out  # its images lie in the whole evaluation now
    assert store.intact(STEEP.key)


def test_gc_leaves_a_job_alone_that_runs_or_has_to(store: Store, bench: Bench) -> None:
    folder = RESULTS / CLEAN.key
    (folder / "blocks").mkdir()
    lease = claim(store, CLEAN.key)
    assert "0 paths" in bench("gc").out
    assert lease is not None
    lease.release()
    fail(store, CLEAN)  # an error is tried again and goes on from its blocks
    assert "0 paths" in bench("gc").out
    assert (folder / "blocks").exists()


@pytest.mark.parametrize("command", ["status", "logs x", "retry --failed", "verify", "gc", "merge none"])
def test_a_folder_that_is_not_there_is_named(bench: Bench, command: str) -> None:
    outcome = bench(*command.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: no results folder ")
    assert not RESULTS.exists()


def left(store: Store) -> set[str]:
    return set(Store(store.root).keys())


def test_forget_removes_what_never_ran_and_nothing_else(store: Store, bench: Bench) -> None:
    (store.folder(STEEP.key) / "record.json").unlink()
    (store.folder(CLEAN.key) / "record.json").unlink()
    saved = store.folder(CLEAN.key) / "blocks" / "1.safetensors"  # a stopped job has saved work
    saved.parent.mkdir()
    saved.touch()
    fail(store, JOBS[-1])
    refused = bench("forget", "--never-ran")
    assert (refused.code, refused.err) == (2, "error: nothing was removed; --yes removes these\n")
    assert "to remove 1 job: 1 without a result" in refused.out
    assert STEEP.key in refused.out
    assert left(store) == {job.key for job in JOBS}
    assert bench("forget", "--never-ran", "--yes").out.endswith("1 job removed\n")
    assert left(store) == {job.key for job in JOBS} - {STEEP.key}
    assert bench("forget", "--never-ran", "--yes").out == "to remove 0 jobs\n"


def test_forget_takes_finished_jobs_by_an_option_only_and_all_that_need_them(store: Store, bench: Bench) -> None:
    refused = bench("forget", TRAIN.key[:8], "--yes")
    assert (refused.code, refused.err) == (2, f"error: {TRAIN.key} is finished; --finished removes finished jobs too\n")
    dependents = {job.key for job in JOBS if TRAIN.key in (job.key, *job.waits)}
    assert len(dependents) == 4
    assert left(store) == {job.key for job in JOBS}
    out = bench("forget", TRAIN.key[:8], "--finished", "--yes").out
    assert "to remove 4 jobs: 4 done" in out
    assert left(store) == {job.key for job in JOBS} - dependents


def test_forget_keeps_what_another_job_needs(store: Store, bench: Bench) -> None:
    fail(store, TRAIN)
    out = bench("forget", TRAIN.key, "--yes").out  # its evaluations are done
    assert "to keep   3 jobs: finished (--finished removes them too)" in out
    assert "to keep   1 job: needed by jobs that stay" in out
    assert left(store) == {job.key for job in JOBS}


def test_forget_leaves_a_folder_alone_in_which_a_job_runs(store: Store, bench: Bench) -> None:
    for job in (CLEAN, STEEP):
        (store.folder(job.key) / "record.json").unlink()
    lease = claim(store, CLEAN.key)
    assert lease is not None
    refused = bench("forget", "--never-ran", "--yes")
    lease.release()
    assert (refused.code, refused.err) == (
        2, f"error: {CLEAN.key} runs in results, and others may wait for it; stop that run first\n"
    )  # fmt: skip
    assert left(store) == {job.key for job in JOBS}


def test_forget_asks_which_and_knows_specs(store: Store, bench: Bench, tmp_path: Path) -> None:
    for words in ((), ("--never-ran", TRAIN.key)):
        assert "name either specs and jobs (SPEC or KEY ...) or --never-ran" in bench("forget", *words).err
    assert "no job abc" in bench("forget", "abc").err
    (tmp_path / "mine.yaml").write_text(
        "threat: {eps: 0.1}\nmodels: [mlp]\ndefenses: [standard]\nattacks: [clean]\nchecks: off\n"
    )
    assert "no spec file" in bench("forget", "other.yaml").err
    planned = plan(load(tmp_path / "mine.yaml"), tmp_path)
    for job in planned:
        store.add(job)
    assert "2 jobs removed" in bench("forget", str(tmp_path / "mine.yaml"), "--yes").out
    assert left(store) == {job.key for job in JOBS}
