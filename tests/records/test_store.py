"""The store: every write is atomic, damage is noticed, no key leaves the folder."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from factories import toy_job
from harness import Bench
from paths import TESTS

from bench.atomic import file_hash, write_atomic, write_json
from bench.jobs.verify import checked
from bench.planning import schema
from bench.planning.job import Job
from bench.planning.schema import NewerSchemaError
from bench.records.packs import Pack
from bench.records.record import Record, TrainMetrics, TrainRecord, from_json, to_json
from bench.records.store import Store, checksum

JOB = toy_job("train", {"seed": 0})
OTHER = toy_job("evaluate", {"n": 4}, (JOB.key,))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    made.add(JOB)
    return made


def with_samples(store: Store, job: Job = JOB) -> Path:
    """A finished evaluation with its samples; gives the path of these."""
    store.add(job)
    path = store.folder(job.key) / "samples.npz"
    write_atomic(path, lambda file: np.savez_compressed(file, correct=np.array([True, False])))
    store.put(job, Record("done", files={"samples.npz": file_hash(path)}))
    return path


@pytest.mark.parametrize("old", [None, b"the old content"])
def test_a_write_that_dies_leaves_the_old_file_and_no_litter(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "record.json"
    if old is not None:
        path.write_bytes(old)

    def die(file: IO[bytes]) -> None:
        file.write(b"half of the new")
        file.flush()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, die)
    assert (path.read_bytes() if path.exists() else None) == old
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["record.json"])


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path, seen = tmp_path / "record.json", []
    path.write_bytes(b"old")
    write_atomic(path, lambda file: (file.write(b"new"), file.flush(), seen.append(path.read_bytes())))
    assert seen == [b"old"]
    assert path.read_bytes() == b"new"


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir() else "file")
        fsync(descriptor)

    def renamed(source: str, target: Path) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_json(tmp_path / "record.json", {})
    assert calls == ["file", "rename", "folder"]


def test_equal_content_gives_equal_bytes_and_nan_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"a": 1, "b": [1.5, None]})
    write_json(tmp_path / "b", {"b": [1.5, None], "a": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a", {"a": math.nan})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_job_is_done_once_its_record_stands(store: Store) -> None:
    assert (store.keys(), store.record(JOB.key), store.done(JOB.key)) == ([JOB.key], None, False)
    store.put(JOB, Record("done", TrainMetrics(train_seconds=1.5)))
    record = store.record(JOB.key)
    assert record is not None
    assert record == TrainRecord("done", TrainMetrics(train_seconds=1.5), kind="train")
    assert store.done(JOB.key)
    assert list(store.records()) == [(JOB, record)]
    assert store.jobs() == {JOB.key: JOB}


@pytest.mark.parametrize(
    ("state", "done"), [("done", True), ("diverged", True), ("unsupported", True), ("error", False)]
)
def test_an_error_is_stored_for_reading_and_tried_again(store: Store, state: str, done: bool) -> None:
    store.put(JOB, Record(state))
    assert store.record(JOB.key) is not None
    assert store.done(JOB.key) == done


def test_numbers_that_json_does_not_have_become_null(store: Store) -> None:
    odd = TrainMetrics(train_seconds=math.nan, check_seconds=1.0, final_terms={"ce": math.inf, "kl": 2.0}, steps=2)
    store.put(JOB, Record("done", odd))
    values = json.loads((store.folder(JOB.key) / "record.json").read_text())["metrics"]
    assert values == {"train_seconds": None, "check_seconds": 1.0, "final_terms": {"ce": None, "kl": 2.0}, "steps": 2}
    record = store.record(JOB.key)
    assert record is not None
    assert record.metrics == TrainMetrics(check_seconds=1.0, final_terms={"ce": None, "kl": 2.0}, steps=2)


WRONG_TYPES = {
    "metrics.keep_seconds": ({"metrics": {"keep_seconds": "1.5"}}, "input should be a valid number"),
    "metrics.final_terms.ce": ({"metrics": {"final_terms": {"ce": [1]}}}, "input should be a valid number"),
    "metrics": ({"metrics": 3}, "input should be an object"),
    "state": ({"state": "gone"}, "input should be 'done'"),
    "files.samples.npz": ({"files": {"samples.npz": None}}, "input should be a valid string"),
    "provenance.workers": ({"provenance": {"workers": True}}, "input should be a valid integer"),
    "error.message": ({"state": "error", "error": {"type": "E"}}, "field required"),
    "attempts.0.step": ({"attempts": [{"step": 1, "type": "E", "message": ""}]}, "input should be a valid string"),
}


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_a_field_of_another_type_is_damage_that_names_file_and_field(store: Store, field: str) -> None:
    values, expected = WRONG_TYPES[field]
    store.put(JOB, Record("done"))
    path = store.folder(JOB.key) / "record.json"
    record = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({**record, "checksum": checksum(record)}))
    assert (store.record(JOB.key), store.done(JOB.key), list(store.records())) == (None, False, [])
    damage = store.damage(JOB.key) or ""
    assert damage.startswith(f"{JOB.key}/record.json is damaged: {field} is ")
    assert expected in damage
    (problem,) = checked(store).problems
    assert problem == damage
    store.reopen(JOB.key)  # as before another run of the job
    assert [entry["reason"] for entry in store.quarantined()] == [damage]


@pytest.mark.parametrize(("first", "last"), [(1, 3), (1, 1), (-1, 2)])
def test_a_shard_of_images_that_its_evaluation_lacks_is_refused(store: Store, first: int, last: int) -> None:
    shard = toy_job("shard", {"n": 2, "images": [first, last]}, (JOB.key,))
    store.add(shard)
    with pytest.raises(ValueError, match=rf"its images are {first} to {last} of 2\); `bench run` writes it again"):
        store.job(shard.key)


def test_every_committed_record_is_written_as_it_was_read() -> None:
    """A record that is read and written again has equal JSON: no field is lost, added or converted."""
    packs = [Pack(path) for path in sorted((TESTS.parent / "results").rglob("*.zip"))]
    records = [json.loads(pack.read(key, "record.json") or b"") for pack in packs for key in pack.members]
    assert len(records) > 1000
    for values in records:
        about = {name: values[name] for name in ("schema", "key", "kind", "checksum")}
        assert {**to_json(from_json(values)), **about} == values


def test_every_flipped_byte_of_a_record_is_noticed(store: Store) -> None:
    store.put(JOB, Record("done", TrainMetrics(train_seconds=1.5), files={"weights": "ab"}))
    path = store.folder(JOB.key) / "record.json"
    whole = path.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        # a flip in white space may leave the very same content behind
        if store.record(JOB.key) is not None and json.loads(path.read_bytes()) != json.loads(whole):
            unnoticed.append(place)
    assert unnoticed == []
    path.write_bytes(whole)
    assert store.done(JOB.key)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"x"', "{}", '{"schema": 1}', "\xff"])
def test_a_record_that_is_none_is_noticed(store: Store, text: str) -> None:
    (store.folder(JOB.key) / "record.json").write_bytes(text.encode("latin-1"))
    assert store.record(JOB.key) is None
    assert not store.done(JOB.key)
    assert list(store.records()) == []


def test_a_truncated_record_is_noticed(store: Store) -> None:
    store.put(JOB, Record("done"))
    path = store.folder(JOB.key) / "record.json"
    whole = path.read_bytes()
    for length in range(len(whole.rstrip())):
        path.write_bytes(whole[:length])
        assert store.record(JOB.key) is None


def test_a_record_counts_in_its_own_folder_only(store: Store) -> None:
    store.put(JOB, Record("done"))
    store.add(OTHER)
    shutil.copy(store.folder(JOB.key) / "record.json", store.folder(OTHER.key))
    assert store.record(OTHER.key) is None


def test_samples_come_back_and_damaged_ones_are_refused(store: Store) -> None:
    path = with_samples(store)
    assert store.samples(JOB.key)["correct"].tolist() == [True, False]
    whole = path.read_bytes()
    for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"samples\.npz does not match its record; run the job again"):
            store.samples(JOB.key)
        assert not store.intact(JOB.key)
    path.unlink()
    with pytest.raises(ValueError, match="does not match its record"):
        store.samples(JOB.key)


def test_samples_without_a_record_are_refused(store: Store) -> None:
    path = with_samples(store)
    store.put(JOB, Record("done"))  # a record that names no samples
    for missing in (False, True):
        if missing:
            path.unlink()
        with pytest.raises(ValueError, match="does not match its record"):
            store.samples(JOB.key)


def test_samples_are_never_unpickled(store: Store) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return (os._exit, (3,))

    path = store.folder(JOB.key) / "samples.npz"
    write_atomic(path, lambda file: np.savez(file, correct=np.array([Canary()], dtype=object)))
    store.put(JOB, Record("done", files={"samples.npz": file_hash(path)}))
    with pytest.raises(ValueError, match="Python objects, which are never read"):
        store.samples(JOB.key)


HOSTILE = [
    *("a/../../b", "..\\..\\x", "%2e%2e%2f%2e%2e", "....//....//ab", "/0123456789a", "./0123456789", "0123456789ab/.."),
    *(
        "con",
        "nul",
        "aux.txt",
        "-rf",
        "--help",
        "$(touch x)",
        "`touch x`",
        "a;touch x",
        "a|b",
        "a&b",
        "*",
        "?",
        "\u202e",
    ),
    *("a" * 255, "0123456789ab" * 30, "\u212a123456789ab", "\t0123456789ab"),
    "",
    ".",
    "..",
    "../../etc/pa",
    "/etc/passwd0",
    "0123456789a",
    "0123456789abc",
    "0123456789AB",
    "0123456789a\n",
    "0123456789ab\n",
    "0123456789a/",
    "0123456789a\0",
    "0123456789ag",
    "..\\..\\012345",
    "０１２３４５６７８９ab",
    "~root/012345",
]


def test_forty_hostile_names() -> None:
    assert len(set(HOSTILE)) == 40


@pytest.mark.parametrize("key", HOSTILE)
@pytest.mark.parametrize("command", [("logs",), ("retry",), ("worker",)])
def test_no_command_follows_a_hostile_key(store: Store, bench: Bench, command: tuple[str], key: str) -> None:
    before = sorted(store.root.parent.rglob("*"))
    outcome = bench(*command, "--results-dir", store.root, "--", key)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert sorted(store.root.parent.rglob("*")) == before


@pytest.mark.parametrize("key", HOSTILE)
def test_no_key_leaves_the_folder(store: Store, key: str) -> None:
    for method in (store.folder, store.job, store.record, store.done, store.progress, store.samples):
        with pytest.raises(ValueError, match="is not a job key; expected 12 hexadecimal digits"):
            method(key)


def test_a_link_in_place_of_a_folder_is_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (store.root / OTHER.key).symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match="is a link; job folders must be real ones"):
        store.add(OTHER)
    assert list((tmp_path / "outside").iterdir()) == []
    assert store.keys() == [JOB.key]


def test_other_files_in_the_folder_are_no_jobs(store: Store) -> None:
    (store.root / "0123456789ab").write_text("a file")
    (store.root / "notes").mkdir()
    (store.root / "0123456789AB").mkdir()
    assert store.keys() == [JOB.key]
    assert Store(store.root / "none").keys() == []


def test_a_job_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(LookupError, match=f"no job {OTHER.key} in "):
        store.job(OTHER.key)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "kind": 1, "what": 1}', "\xff"])
def test_a_damaged_job_hurts_only_itself_and_is_written_again(store: Store, text: str) -> None:
    store.put(JOB, Record("done"))
    store.add(OTHER)
    store.put(OTHER, Record("done"))
    path = store.folder(JOB.key) / "job.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"job\.json is damaged .*; `bench run` writes it again"):
        store.job(JOB.key)
    assert [job for job, _ in store.records()] == [OTHER]
    store.add(JOB)
    assert store.job(JOB.key) == JOB
    assert sorted(job.key for job, _ in store.records()) == sorted([JOB.key, OTHER.key])


def test_a_job_of_another_folder_is_noticed(store: Store) -> None:
    store.add(OTHER)
    shutil.copy(store.folder(OTHER.key) / "job.json", store.folder(JOB.key))
    with pytest.raises(ValueError, match=f"holds job {OTHER.key}"):
        store.job(JOB.key)


def test_a_standing_job_is_not_written_again(store: Store) -> None:
    path = store.folder(JOB.key) / "job.json"
    before = path.stat().st_ino
    store.add(JOB)
    assert path.stat().st_ino == before


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_half_written_progress_is_no_progress(store: Store, text: str) -> None:
    assert store.progress(JOB.key) == {}
    path = store.folder(JOB.key) / "progress.json"
    path.write_text('{"share": 0.5}')
    assert store.progress(JOB.key) == {"share": 0.5}
    path.write_bytes(text.encode("latin-1"))
    assert store.progress(JOB.key) == {}


def test_a_folder_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(OSError, match=f"cannot write results folder {place}: .*; choose --results-dir") as error:
            Store(place).prepare()
        assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes read-only folders")
def test_a_read_only_folder_is_refused_and_still_read(store: Store) -> None:
    store.put(JOB, Record("done"))
    store.root.chmod(0o555)
    try:
        with pytest.raises(OSError, match=r"cannot write results folder .*: Permission denied"):
            store.prepare()
        assert [job for job, _ in store.records()] == [JOB]
    finally:
        store.root.chmod(0o755)


def set_aside(store: Store) -> list[tuple[str, bytes]]:
    """Name and content of what was quarantined, and each has its reason beside it."""
    found = []
    for says in store.quarantined():
        assert says["reason"]
        places = [p for p in (store.root / "quarantine").glob(f"{says['key']}-*/{says['file']}") if p.is_file()]
        found += [(says["file"], place.read_bytes()) for place in places]
    return sorted(set(found))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b'{"schema": 1}'])
def test_a_damaged_record_is_kept_aside_before_its_job_is_done_again(store: Store, text: bytes) -> None:
    path = store.folder(JOB.key) / "record.json"
    path.write_bytes(text)
    store.reopen(JOB.key)
    assert not path.exists()
    assert set_aside(store) == [("record.json", text)]
    store.put(JOB, Record("done"))
    record = store.record(JOB.key)
    assert record is not None
    assert record.failures == 0  # damage is no failure


def test_damaged_files_are_kept_aside_and_whole_ones_stay(store: Store) -> None:
    path = with_samples(store)
    weights = store.folder(JOB.key) / "weights-last.safetensors"
    weights.write_bytes(b"weights")
    files = {"samples.npz": file_hash(path), weights.name: file_hash(weights), "weights-best.safetensors": "0" * 64}
    store.put(JOB, Record("done", files=files))
    assert store.intact(JOB.key)
    weights.write_bytes(b"weightS")
    assert store.intact(JOB.key)  # weights may be left out of a copy, so they are asked for where they are needed
    path.write_bytes(b"")
    assert not store.intact(JOB.key)
    store.reopen(JOB.key)
    assert set_aside(store) == [("samples.npz", b""), ("weights-last.safetensors", b"weightS")]
    assert sorted(p.name for p in store.folder(JOB.key).iterdir()) == ["job.json"]
    assert len(store.quarantined()) == 2


def test_lost_samples_are_noticed_too(store: Store) -> None:
    with_samples(store).unlink()
    assert store.done(JOB.key)
    assert not store.intact(JOB.key)
    store.reopen(JOB.key)
    assert store.quarantined() == []


def test_a_damaged_job_file_is_kept_aside(store: Store) -> None:
    path = store.folder(JOB.key) / "job.json"
    path.write_bytes(b"{")
    store.add(JOB)
    assert set_aside(store) == [("job.json", b"{")]
    assert store.job(JOB.key) == JOB


def test_what_failed_and_is_done_again_says_how_often(store: Store) -> None:
    for count in (1, 2):
        store.put(JOB, Record("error"))
        store.reopen(JOB.key)
        store.reopen(JOB.key)  # nothing there any more, nothing counted
        store.put(JOB, Record("done"))
        record = store.record(JOB.key)
        assert record is not None
        assert record.failures == count
        store.reopen(JOB.key)  # done again for its weights, say: no retry


def newer(store: Store, name: str) -> Path:
    """A job.json or record.json as a later version may leave it."""
    path = store.folder(JOB.key) / name
    values = {**json.loads(path.read_text()), "schema": 2, "later": True}
    if name == "record.json":
        values["checksum"] = checksum(values)
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("name", ["job.json", "record.json"])
def test_what_a_newer_version_wrote_is_refused_and_not_touched(store: Store, name: str) -> None:
    if name == "record.json":
        store.put(JOB, Record("done"))
    path = newer(store, name)
    before = {p: p.read_bytes() for p in store.root.rglob("*") if p.is_file()}
    for action in (store.prepare, lambda: store.add(JOB), lambda: list(store.records())):
        if name == "record.json" and action != store.prepare:
            action = functools.partial(store.reopen, JOB.key)
        with pytest.raises(NewerSchemaError, match="results have schema 2, this version reads up to 1; update bench"):
            action()
    assert {p: p.read_bytes() for p in store.root.rglob("*") if p.is_file()} == before
    assert path.exists()


def test_a_number_of_the_schema_that_was_flipped_is_damage(store: Store) -> None:
    """Not a newer version's: the rest of the file, or the record beside it, says so."""
    store.put(JOB, Record("done"))
    for name in ("job.json", "record.json"):
        path = store.folder(JOB.key) / name
        whole = path.read_text()
        path.write_text(whole.replace('"schema": 1', '"schema": 9'))
        store.prepare()
        if name == "record.json":
            assert store.record(JOB.key) is None
        else:
            store.add(JOB)
            assert path.read_text() == whole
        path.write_text(whole)


def test_an_older_schema_is_brought_up_step_by_step(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(JOB, Record("done", TrainMetrics(steps=2)))

    def to_2(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "metrics": {name: 1000 * value for name, value in values.get("metrics", {}).items()}}

    def to_3(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "metrics": {name: value + 1 for name, value in values.get("metrics", {}).items()}}

    monkeypatch.setattr(schema, "SCHEMA", 3)
    monkeypatch.setattr(schema, "MIGRATIONS", {1: to_2, 2: to_3})
    assert store.job(JOB.key) == JOB  # keys hold: what was done stays done
    record = store.record(JOB.key)
    assert record is not None
    assert record.metrics == TrainMetrics(steps=2001)


FIXTURE = TESTS / "fixtures" / "store_v1"


def test_f21_the_store_of_schema_1_is_read_for_ever(tmp_path: Path) -> None:
    """Kept as it was written: files, jobs, records and values."""
    told = json.loads((FIXTURE.parent / "store_v1.json").read_text())
    shutil.copytree(FIXTURE, tmp_path / "results")
    store = Store(tmp_path / "results")
    store.prepare()
    found = {
        job.key: [job.kind, record.state, to_json(record)["metrics"], record.failures]
        for job, record in store.records()
    }
    assert found == told["records"]
    assert {key: {n: v.tolist() for n, v in store.samples(key).items()} for key in told["samples"]} == told["samples"]
    assert all(store.intact(key) == (about[1] in ("done", "unsupported", "diverged")) for key, about in found.items())
