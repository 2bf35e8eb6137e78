"""F1, F4, F9-F11, F13, F14, F22, F25 of the reliability list: kills, starvation, corruption and races, by the hundred.

The numbers below are the figures that docs/reliability.md shows.
"""

from __future__ import annotations

import json
import random
import re
import resource
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import driver
import pytest
from fake_store import contents, matrix, run, work
from store_server import kill, leaderboard, lost, outcome, repeated, start, unparsable
from store_server import server as server

from bench.jobs.verify import checked
from bench.planning.job_fields import PluginChoice
from bench.records.store import IMAGES, SAMPLES, Store

KILLS, REWRITES = 300, 100
FLIPS, TRUNCATIONS, EMPTIED = 200, 50, 20
WRITERS, RESULTS, ROUNDS = 8, 250, 20
DRIVERS = 10  # rounds of two drivers on one folder
TRAININGS = 6  # 24 jobs

pytestmark = pytest.mark.fault


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], str]:
    """Files and leaderboard of a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("reference") / "results"
    run(root, matrix(TRAININGS))
    return contents(root), leaderboard(root)


def test_f1_a_driver_killed_at_any_moment_loses_and_repeats_nothing(
    server: Any, reference: tuple[dict[str, bytes], str], tmp_path: Path
) -> None:
    draw, kills, folders = random.Random(0), 0, 0
    while kills < KILLS:
        root, acks = tmp_path / f"results{folders}", tmp_path / f"acks{folders}"
        folders += 1
        while True:
            process = start(server, driver.drive, root, acks, TRAININGS)
            process.join(draw.uniform(0.01, 0.12))
            if process.exitcode is not None or not kill(process):
                break
            kills += 1
            assert unparsable(root) == []
            assert lost(root, acks) == []
        assert process.exitcode == 0
        assert repeated(acks) == []
        assert outcome(root) == reference[0]
        assert not (root / "quarantine").exists()
        if folders % 5 == 1:
            assert leaderboard(root) == reference[1]
        shutil.rmtree(root)
    assert folders < kills  # they were killed on the way, not at the end
    print(f"F1: {kills} kills over {folders} runs")


@pytest.mark.parametrize("call", driver.CALLS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_f1_a_driver_killed_at_every_failpoint(
    server: Any, reference: tuple[dict[str, bytes], str], tmp_path: Path, call: str, when: str
) -> None:
    root, acks = tmp_path / "results", tmp_path / "acks"
    # a fast machine is done before the eleventh heartbeat
    for nth in (1, 2, 3) if call == "utime" else (1, 4, 11):
        process = start(server, driver.drive, root, acks, TRAININGS, (call, when, nth))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert unparsable(root) == []
        assert lost(root, acks) == []
    process = start(server, driver.drive, root, acks, TRAININGS)
    process.join()
    assert (process.exitcode, repeated(acks)) == (0, [])
    assert outcome(root) == reference[0]
    assert leaderboard(root) == reference[1]


def test_f4_a_leaderboard_killed_while_it_is_rewritten_is_the_old_or_the_new_one(server: Any, tmp_path: Path) -> None:
    for name, trainings in (("one", 1), ("two", 2)):
        run(tmp_path / name, matrix(trainings))
    output, whole = tmp_path / "leaderboard.md", set()
    from bench.tables.leaderboard import write_leaderboard

    for name in ("one", "two"):
        write_leaderboard(Store(tmp_path / name), output, tmp_path / "tables", [0.0])
        whole.add(output.read_bytes())
    assert len(whole) == 2
    draw, seen = random.Random(0), set()
    places = [(call, when) for call in ("mkstemp", "fsync", "chmod", "replace") for when in ("before", "after")]
    for number in range(REWRITES):
        failpoint = (*places[number % len(places)], draw.randint(1, 12))
        process = start(server, driver.rewrite, tmp_path, output, failpoint)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert output.read_bytes() in whole
        seen.add(output.read_bytes())
    assert seen == whole  # both were being written


@pytest.mark.parametrize("call", ["mkstemp", "fsync", "replace", "link", "mkdir"])
@pytest.mark.parametrize("nth", [1, 4, 7])
def test_f9_a_full_disk_stops_a_run_in_one_line_and_it_goes_on_later(
    server: Any, tmp_path: Path, call: str, nth: int
) -> None:
    root = tmp_path / "results"
    receiver, sender = server.Pipe(duplex=False)
    process = start(server, driver.starved, root, call, nth, sender)
    process.join()
    message = receiver.recv()
    assert "No space left on device" in message
    assert "\n" not in message
    if call in ("fsync", "replace"):
        assert str(root) in message
        size = r"[0-9.]+ (bytes|KB|MB|GB)"
        assert re.search(rf"; {size} are needed, {size} are free there\. Make room", message)
    assert unparsable(root) == []
    litter = [path for path in root.rglob("*") if path.is_file() and path.name.startswith(".")]
    assert litter == []
    assert set(outcome(root)) <= set(_reference(tmp_path, 2))
    run(root, matrix(2))
    assert outcome(root) == _reference(tmp_path, 2)


def _reference(tmp_path: Path, trainings: int) -> dict[str, bytes]:
    root = tmp_path / "undisturbed"
    run(root, matrix(trainings))
    return outcome(root)


def _limited(root: Path, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
    try:
        run(root, matrix(2))
        answer.send("")
    except OSError as error:
        answer.send(str(error))


def test_f9_a_limit_on_file_size_does_the_same(server: Any, tmp_path: Path) -> None:
    root = tmp_path / "results"
    receiver, sender = server.Pipe(duplex=False)
    start(server, _limited, root, sender).join()
    message = receiver.recv()
    assert "File too large" in message
    assert str(root) in message
    assert [path for path in root.rglob(".*") if path.is_file()] == []
    run(root, matrix(2))
    assert outcome(root) == _reference(tmp_path, 2)


@pytest.mark.parametrize("how", ["file", "parent", "link"])
def test_f10_a_folder_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path, how: str) -> None:
    root = tmp_path / "results"
    if how == "file":
        root.write_text("in the way")
    if how == "parent":
        (tmp_path / "file").write_text("in the way")
        root = tmp_path / "file" / "results"
    if how == "link":
        root.symlink_to(tmp_path / "nowhere" / "results")
        (tmp_path / "nowhere").write_text("in the way")
    began = time.monotonic()
    with pytest.raises(OSError, match=r"cannot write results folder .*; choose --results-dir"):
        run(root, matrix(2))
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("how", ["vanished", "file", "job"])
def test_f10_a_folder_that_vanishes_stops_the_run_and_no_result_is_claimed(tmp_path: Path, how: str) -> None:
    root, done = tmp_path / "results", []

    def do(folder: Path, key: str, data: Path, device: str) -> str:
        if len(done) == 3:
            shutil.rmtree(root / key if how == "job" else root)
            if how == "file":
                root.write_text("in the way")
        done.append(key)
        return work(folder, key, data, device)

    with pytest.raises((OSError, LookupError)) as error:
        run(root, matrix(2), do)
    assert "\n" not in str(error.value)
    assert not Store(root).done(done[-1]) if root.is_dir() else True
    if root.is_file():
        root.unlink()
    run(root, matrix(2))
    assert outcome(root) == _reference(tmp_path, 2)


def damage(path: Path, how: str, draw: random.Random) -> bytes:
    """Other content than before (a flip in the white space of JSON would be none); gives it."""
    whole = path.read_bytes()
    while True:
        place = draw.randrange(len(whole))
        flipped = whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        changed = {"flip": flipped, "truncate": whole[:place], "empty": b""}[how]
        if path.suffix != ".json" or _content(changed) != _content(whole):
            path.write_bytes(changed)
            return changed


def _content(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data


def test_f11_every_corruption_is_noticed_set_aside_and_made_good(tmp_path: Path) -> None:
    """Of records, jobs, samples, weights and images alike. Weights and images while something needs them."""
    jobs = matrix(2)
    root, draw = tmp_path / "results", random.Random(0)
    run(root, jobs)
    expected, store = outcome(root), Store(root)
    ways = ["flip"] * FLIPS + ["truncate"] * TRUNCATIONS + ["empty"] * EMPTIED
    unnoticed, kept, wrong = [], 0, []
    names = sorted(expected)
    for number, how in enumerate(ways):
        name = names[number % len(names)]
        key, file = name.split("/")
        content = damage(root / name, how, draw)
        if not checked(store).problems:
            unnoticed.append((name, how))
        needed = [job for job in jobs if key in job.needs] if file.startswith("weights") else []
        for job in needed[:1]:
            (store.folder(job.key) / "record.json").unlink()
        if file == IMAGES:  # as one does who wants them again
            (store.folder(key) / "record.json").unlink()
        before = set(root.glob("quarantine/*/*"))
        run(root, jobs)
        new = [path for path in set(root.glob("quarantine/*/*")) - before if path.name == file]
        kept += file == IMAGES or [path.read_bytes() for path in new] == [content]
        wrong += [(name, how)] if outcome(root) != expected else []
    assert unnoticed == []
    assert wrong == []
    assert kept == len(ways) == 270


@pytest.mark.timeout(900)
def test_f13_f25_concurrent_writers_lose_nothing(server: Any, tmp_path: Path) -> None:
    """Without file locks: every call for one fails."""
    for number in range(ROUNDS):
        root = tmp_path / f"results{number}"
        Store(root).prepare()
        processes = [start(server, driver.write_all, root, RESULTS, own) for own in range(WRITERS)]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * WRITERS
        store = Store(root)
        assert len(list(store.records())) == WRITERS * (RESULTS - RESULTS // 2) + RESULTS // 2
        assert list(root.rglob(".*")) == []
        shutil.rmtree(root)


def test_f13_f25_two_drivers_share_a_folder_and_do_each_job_once(
    server: Any, reference: tuple[dict[str, bytes], str], tmp_path: Path
) -> None:
    shared = 0
    for number in range(DRIVERS):
        root, acks = tmp_path / f"results{number}", [tmp_path / f"acks{number}-{who}" for who in (0, 1)]
        processes = [start(server, driver.drive, root, ack, TRAININGS) for ack in acks]
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        began = [
            Counter(line for line in ack.read_text().splitlines() if "begin" in line) for ack in acks if ack.exists()
        ]
        total = sum(began, Counter[str]())
        assert set(total.values()) == {1}
        assert len(total) == 4 * TRAININGS
        shared += len(began) == 2 and all(began)
        assert outcome(root) == reference[0]
    assert shared >= DRIVERS // 2  # both had a part in it


def test_f13_a_driver_takes_over_what_a_killed_one_left(
    server: Any, reference: tuple[dict[str, bytes], str], tmp_path: Path
) -> None:
    root, acks = tmp_path / "results", [tmp_path / "acks0", tmp_path / "acks1"]
    processes = [start(server, driver.drive, root, ack, TRAININGS) for ack in acks]
    time.sleep(0.05)
    kill(processes[0])
    processes[1].join()
    assert processes[1].exitcode == 0
    assert outcome(root) == reference[0]
    assert repeated(acks[1]) == []


ODD = [
    "ü" * 120,
    "a" * 255,
    "con",
    "nul.txt",
    "COM1",
    "Guard",
    "guard",
    "a\u202eb",
    "\U0001f600",
    "a/b",
    "..",
    " ",
    "a\nb",
]


def test_f22_odd_names_are_stored_as_they_are_and_never_become_paths(tmp_path: Path) -> None:
    root = tmp_path / "results"
    jobs = []
    for name in ODD:
        jobs.append(replace(matrix(1)[0], defense=PluginChoice(name, {})))
    assert len({job.key for job in jobs}) == len(ODD)
    run(root, jobs)
    assert {job.defense.name for job in Store(root).jobs().values()} == set(ODD)
    assert sorted(path.name for path in root.iterdir()) == sorted(job.key for job in jobs)
    assert SAMPLES not in leaderboard(root)
