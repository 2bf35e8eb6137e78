"""S4: no name that somebody types or stores becomes a path outside the folder it belongs to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_store import matrix, run
from harness import Bench

from bench.planning.job import Job
from bench.records.store import JOB, RECORD, Store, checksum

NAMES = [
    *("..", ".", "../outside", "../../outside", "a/../../outside", "outside/../../outside", "./../outside"),
    *("/etc/passwd", "/tmp/outside", "//outside", "~", "~/outside", "~root/outside", "file:///tmp/outside"),
    *("..\\outside", "..\\..\\outside", "C:\\outside", "\\\\server\\outside", "..;/outside", "....//outside"),
    *("%2e%2e%2foutside", "..%c0%afoutside", "．．／outside", "..∕outside", "\u202e../outside", "..\u200b/outside"),
    *("a\0b", "../outside\0.py", "a\nb", "a\r../outside", "\t", " ", "-rf", "--output=../outside"),
    *("$(touch ../outside)", "`touch ../outside`", "x;touch ../outside", "x|tee ../outside", "con", "x" * 5000),
]
# what takes a name; {} is where it goes
COMMANDS: list[tuple[str, ...]] = [
    ("run", "--dataset", "folder:{}", "--attack", "clean"),
    ("run", "--dataset", "{}"),
    ("plan", "--defense", "{}"),
    ("plan", "--defense", "standard", "--attack", "{}"),
    ("plan", "--model", "{}"),
    ("run", "--plugin", "{}"),
    ("eval", "--checkpoint", "{}", "--arch", "mlp"),
    ("eval", "--model-file", "{}:build"),
    ("new", "defense", "{}", "--dir", "new"),
    ("new", "attack", "{}", "--dir", "new"),
    ("list", "defenses", "{}"),
    ("list", "datasets", "{}"),
    ("explain", "{}"),
    ("check", "{}"),
    ("logs", "{}"),
    ("retry", "{}"),
    ("worker", "{}"),
    ("compare", "{}", "{}"),
]
FILE = "weights-last.safetensors"


def everything(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture
def place(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with finished results two folders below one that must not change."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    run(inside / "results", matrix(1, 1))
    return inside


def test_forty_names() -> None:
    assert len(NAMES) == len(set(NAMES)) == 40


@pytest.mark.parametrize("name", NAMES, ids=range(40))
def test_no_command_writes_for_a_hostile_name(name: str, place: Path, bench: Bench, tmp_path: Path) -> None:
    before = everything(tmp_path)
    for command in COMMANDS:
        head, *rest = (word.replace("{}", name) for word in command)
        end = ["--"] if name.startswith("-") and head in ("list", "explain", "check", "logs", "retry", "worker") else []
        outcome = bench(head, *end, *rest)
        assert outcome.code == 2, (command, outcome)
        assert "Traceback" not in outcome.err
        assert everything(tmp_path) == before, command


@pytest.mark.parametrize("name", NAMES, ids=range(40))
def test_a_spec_of_a_hostile_name_writes_nothing_by_it(name: str, place: Path, bench: Bench, tmp_path: Path) -> None:
    spec = {"name": name, "threat": {"eps": 0.1}, "defenses": ["standard"], "attacks": ["clean"]}
    (place / "spec.yaml").write_text(json.dumps(spec))
    before = everything(tmp_path)
    bench("plan", "spec.yaml")
    assert everything(tmp_path) == before


def forge(root: Path, **other: Any) -> tuple[Store, Job]:
    """Another record for a finished training, with its checksum right: who can write it can also hash it."""
    store = Store(root)
    job = next(job for job in store.jobs().values() if job.kind == "train")
    path = store.folder(job.key) / RECORD
    record = {**json.loads(path.read_text()), **other}
    path.write_text(json.dumps({**record, "checksum": checksum(record)}))
    return store, job


@pytest.mark.parametrize("name", NAMES, ids=range(40))
def test_no_record_names_a_file_elsewhere(name: str, place: Path, bench: Bench, tmp_path: Path) -> None:
    """Set aside, copied or removed is what lies in the folder of the record, whatever the record says."""
    for victim in (tmp_path / "outside", tmp_path / "a" / "outside", place / "outside"):
        victim.write_text("precious")
    files = {name: "0" * 64, "../../outside": "0" * 64, "../../../outside": "0" * 64}
    store, job = forge(place / "results", files=files)
    shutil.copytree(place / "results", place / "other")
    kept = {path: content for path, content in everything(tmp_path).items() if not path.startswith("a/b/results/")}
    assert store.record(job.key) is None
    bench("merge", "other")
    bench("gc")
    bench("verify")
    store.reopen(job.key)
    after = everything(tmp_path)
    assert {path: after.get(path) for path in kept} == kept
    aside = [json.loads(path.read_text()) for path in (place / "results" / "quarantine").glob("*/reason.json")]
    assert [(one["key"], one["file"]) for one in aside] == [(job.key, RECORD)]


@pytest.mark.parametrize("files", [[], "weights", {"": "0"}, {".hidden": "0"}, {"a" * 101: "0"}, {"a b": "0"}, 3])
def test_a_record_with_an_odd_list_of_files_is_damaged(files: Any, place: Path) -> None:
    store, job = forge(place / "results", files=files)
    assert store.record(job.key) is None


def test_a_record_with_its_true_files_stands(place: Path) -> None:
    store, job = forge(place / "results", retries=1)
    record = store.record(job.key)
    assert record is not None
    assert list(record.files) == [FILE]


@pytest.mark.parametrize("link", ["log.txt", "progress.tmp", "train.jsonl", "blocks", "blocks/source", FILE, RECORD])
def test_nothing_is_written_through_a_link_in_a_job_folder(link: str, place: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir() if link == "blocks" else victim.write_text("precious")
    store = Store(place / "results")
    job = next(job for job in store.jobs().values() if job.kind == "train")
    path = store.folder(job.key) / link
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    before = everything(victim) if victim.is_dir() else victim.read_bytes()
    store.reopen(job.key)
    assert run(place / "results", matrix(1, 1))["ok"] >= 1
    assert (everything(victim) if victim.is_dir() else victim.read_bytes()) == before
    aside = {one["file"]: one["reason"] for one in store.quarantined()}
    assert aside[link] == "it is a link; results hold regular files only"
    assert store.done(job.key)


def test_quarantine_and_tables_are_no_links(place: Path, tmp_path: Path, bench: Bench) -> None:
    (tmp_path / "victim").mkdir()
    for name in ("quarantine", "tables"):
        (place / "results" / name).symlink_to(tmp_path / "victim")
    outcome = bench("leaderboard")
    assert outcome.code == 2
    assert "tables is a link; results hold real files only" in outcome.err
    store = Store(place / "results")
    with pytest.raises(ValueError, match="quarantine is a link"):
        store.set_aside(store.keys()[0], RECORD, "for a test")
    assert list((tmp_path / "victim").iterdir()) == []
    assert not (place / "leaderboard.md").exists()


@pytest.mark.parametrize("name", ["notes.txt", "log.txt", FILE, JOB])
def test_a_link_in_another_folder_is_not_merged(name: str, place: Path, tmp_path: Path, bench: Bench) -> None:
    """Its content would be a file of this machine's, copied into results that are shared."""
    (tmp_path / "secret").write_text("secret")
    shutil.move(place / "results", place / "other")
    key = next(path.name for path in (place / "other").iterdir() if (path / FILE).exists())
    (place / "other" / key / name).unlink(missing_ok=True)
    (place / "other" / key / name).symlink_to(tmp_path / "secret")
    outcome = bench("merge", "other")
    if name == "notes.txt":  # no record names it
        assert outcome.code == 0
        assert not (place / "results" / key / name).exists()
    else:
        assert outcome.code == 1
        assert f"{key}/{name} is a link; results hold regular files only" in outcome.out
        assert not (place / "results").exists()
    assert not [path for path in (place / "results").rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
