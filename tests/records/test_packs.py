"""Packs are read as folders are: every table from a pack equals the one from the folders it was made of."""

from __future__ import annotations

import hashlib
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
from fake_store import matrix, run
from harness import Bench

import bench as notebook
from bench.records.merge import merge
from bench.records.pack import pack_records, unpack_records
from bench.records.packs import Pack, PackError
from bench.records.store import Store
from bench.report.page import render
from bench.tables.leaderboard import markdown, write_leaderboard

JOBS = matrix(3, 4)
FOLDERS, PACKED = Path("folders"), Path("packed")


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same records twice: in folders with weights and images, and in one pack alone."""
    monkeypatch.chdir(tmp_path)
    run(FOLDERS, JOBS)
    for job in JOBS[:5]:
        (FOLDERS / job.key / "train.jsonl").write_text('{"epoch": 1, "ce": 0.5, "seconds": 2.0}\n')
    PACKED.mkdir()
    pack_records(Store(FOLDERS), "toy", [job.key for job in JOBS])
    return Path(shutil.move(FOLDERS / "toy.zip", PACKED / "toy.zip"))


def rewritten(pack: Path, change: dict[str, bytes | None], added: tuple[tuple[str, bytes], ...] = ()) -> None:
    """Replace (None: remove) members of a pack, and add others at its end."""
    with zipfile.ZipFile(pack) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    with zipfile.ZipFile(pack, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, data in [*members, *added]:
            content = change.get(name, data)
            if content is not None:
                file.writestr(name, content)


def test_every_table_from_a_pack_equals_the_one_from_folders(pack: Path, bench: Bench) -> None:
    for path in FOLDERS.glob("*/*.safetensors"):  # packs hold neither weights nor images
        path.unlink()
    folders, packed = Store(FOLDERS), Store(PACKED)
    assert packed.keys() == folders.keys()
    assert dict(packed.jobs()) == dict(folders.jobs())
    assert markdown(packed) == markdown(folders)
    for store in (folders, packed):
        write_leaderboard(store, store.root / "board.md", store.root / "tables")
    tables = {path.name: path.read_bytes() for path in (PACKED / "tables").iterdir()}
    assert tables == {path.name: path.read_bytes() for path in (FOLDERS / "tables").iterdir()}
    assert render(packed)[0].replace("packed", "folders") == render(folders)[0]
    assert notebook.load(PACKED).equals(notebook.load(FOLDERS))
    key = next(job.key for job in JOBS if job.kind == "evaluate")
    assert notebook.samples(key, PACKED).equals(notebook.samples(key, FOLDERS))
    for command in ("timing", "status"):
        first, second = (bench(command, "--json", "--results-dir", str(place)) for place in (FOLDERS, PACKED))
        assert (first.code, second.out) == (0, first.out.replace("folders", "packed"))
    assert "match their checksums" in bench("verify", "--results-dir", str(PACKED)).out
    assert {path.name for path in PACKED.iterdir()} == {"toy.zip", "board.md", "tables"}  # nothing was unpacked


def test_equal_records_give_equal_bytes_from_folders_and_from_packs(pack: Path) -> None:
    before = hashlib.sha256(pack.read_bytes()).hexdigest()
    pack_records(Store(PACKED), "toy", [job.key for job in JOBS])
    assert hashlib.sha256(pack.read_bytes()).hexdigest() == before
    unpack_records(Store(PACKED), None)
    for job in JOBS:
        for name in ("job.json", "record.json"):
            assert (PACKED / job.key / name).read_bytes() == (FOLDERS / job.key / name).read_bytes()
    pack_records(Store(PACKED), "toy", [job.key for job in JOBS])
    assert hashlib.sha256(pack.read_bytes()).hexdigest() == before


def test_a_run_on_packed_records_does_nothing(pack: Path) -> None:
    assert run(PACKED, JOBS) == {"skipped": len(JOBS)}
    assert [path.name for path in PACKED.iterdir()] == ["toy.zip"]


def test_a_run_repeats_a_packed_training_only_for_its_weights(pack: Path) -> None:
    training, evaluation = JOBS[0].key, next(job.key for job in JOBS if job.kind == "evaluate")
    rewritten(
        pack, {f"{evaluation}/{name}": None for name in ("job.json", "record.json", "samples.npz", "train.jsonl")}
    )
    counts = run(PACKED, JOBS)
    assert (counts["ok"], counts["skipped"]) == (2, len(JOBS) - 2)
    assert {path.name for path in PACKED.iterdir() if path.is_dir()} == {training, evaluation}
    assert markdown(Store(PACKED)) == markdown(Store(FOLDERS))


def test_merge_copies_records_out_of_a_pack(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert merge([PACKED], Path("merged")) == 0
    assert f"{len(JOBS)} records copied" in capsys.readouterr().out
    assert markdown(Store(Path("merged"))) == markdown(Store(FOLDERS))
    assert merge([FOLDERS], PACKED) == 0  # equal records; weights and images are added in folders
    assert run(PACKED, JOBS) == {"skipped": len(JOBS)}


def test_records_that_no_pack_holds_go_to_another_one(pack: Path, bench: Bench) -> None:
    assert bench("pack", "--results-dir", str(PACKED)).code == 2
    run(PACKED, matrix(4, 1)[-2:])
    outcome = bench("pack", "--results-dir", str(PACKED))
    assert (outcome.code, outcome.out) == (0, "packed/other.zip: 2 records\n")
    assert bench("unpack", "--results-dir", "elsewhere", str(PACKED / "other.zip")).out == (
        "2 jobs unpacked to elsewhere\n"
    )


KEY, DATA = JOBS[0].key, b"x" * 5000
BAD = {
    "traversal": ({}, (("../../evil", b""),), "it holds '../../evil'"),
    "other file": ({}, ((f"{KEY}/weights.pt", b""),), "expected <key>/ and one of job.json"),
    "twice": ({}, ((f"{KEY}/record.json", b"{}"),), "/record.json twice"),
    "no record": ({f"{KEY}/record.json": None}, (), f"job {KEY} lacks record.json"),
    "checksum": ({f"{KEY}/record.json": b"{}"}, (), "does not match its checksum"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_pack_is_one_line_and_nothing_is_used(pack: Path, bench: Bench, name: str) -> None:
    change, added, expected = BAD[name]
    rewritten(pack, change, added)
    for command in (("leaderboard", "--output", "board.md"), ("timing",), ("status",), ("verify",)):
        outcome = bench(*command, "--results-dir", str(PACKED))
        assert (outcome.code, outcome.out) == (2, "")
        assert outcome.err.startswith("error: packed/toy.zip is not a usable pack of records: ")
        assert expected in outcome.err
        assert outcome.err.count("\n") == 1
    assert [path.name for path in PACKED.iterdir()] == ["toy.zip"]


def test_damaged_bytes_and_compressed_members_are_refused(pack: Path) -> None:
    whole = pack.read_bytes()
    place = whole.index(b'"train_seconds"')
    pack.write_bytes(whole[:place] + b"X" + whole[place + 1 :])
    with pytest.raises(PackError, match=r"record\.json is damaged \(Bad CRC-32"):
        markdown(Store(PACKED))
    pack.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PackError, match="is not a usable pack"):
        markdown(Store(PACKED))
    with zipfile.ZipFile(pack, "w", zipfile.ZIP_DEFLATED) as file:  # such as a zip bomb
        file.writestr(f"{KEY}/record.json", b" " * 10**6)
    with pytest.raises(PackError, match="is compressed; members of a pack are stored as they are"):
        Pack(pack)


def test_packs_share_equal_records_and_refuse_different_ones(pack: Path) -> None:
    copy = shutil.copy(pack, PACKED / "a.zip")
    assert markdown(Store(PACKED)) == markdown(Store(FOLDERS))
    rewritten(Path(copy), {f"{KEY}/train.jsonl": DATA})
    with pytest.raises(PackError, match=rf"a\.zip and packed/toy\.zip hold different records of job {KEY}"):
        markdown(Store(PACKED))
