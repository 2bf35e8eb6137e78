"""Leases: one process alone does a job, the dead are replaced at once or after a minute, and nobody overwrites."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from factories import toy_job

from bench.executors.base import Event
from bench.executors.debug import Debug
from bench.executors.driver import drive
from bench.records import leases
from bench.records.leases import STALE, Claims, claim, holder_of, holders
from bench.records.record import Record
from bench.records.store import Store

TRAIN = toy_job("train", {"seed": 0})
EVALUATE = toy_job("evaluate", {"n": 1}, (TRAIN.key,))
EMPTY = {"metrics": {}, "files": {}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    for job in (TRAIN, EVALUATE):
        made.add(job)
    return made


def lease_files(store: Store, key: str = TRAIN.key) -> list[str]:
    """Names of everything in a job folder but job.json."""
    return sorted(path.name for path in store.folder(key).iterdir() if path.name != "job.json")


def claim_in_another_process(store: Store, then: str = "") -> subprocess.CompletedProcess[str]:
    code = "import sys; from pathlib import Path; from bench.records.leases import claim\n"
    code += "from bench.records.store import Store\n"
    code += f"lease = claim(Store(Path(sys.argv[1])), sys.argv[2]); print(lease is not None)\n{then}"
    return subprocess.run(
        [sys.executable, "-c", code, str(store.root), TRAIN.key], capture_output=True, text=True, timeout=60
    )


def test_one_holder_at_a_time(store: Store) -> None:
    first = claim(store, TRAIN.key)
    assert first is not None
    assert claim(store, TRAIN.key) is None
    assert claim_in_another_process(store).stdout == "False\n"
    assert lease_files(store) == ["lease-000001.json"]  # the losers left nothing
    assert first.beat()
    holder = holder_of(store, TRAIN.key)
    assert holder is not None
    assert holder.pid == os.getpid()
    first.release()
    assert holder_of(store, TRAIN.key) is None
    assert lease_files(store) == []
    second = claim(store, TRAIN.key)
    assert second is not None
    second.release()


def test_what_a_dead_process_held_is_free_at_once(store: Store) -> None:
    assert claim_in_another_process(store, "import os; sys.stdout.flush(); os._exit(9)").stdout == "True\n"
    assert lease_files(store) == ["lease-000001.json"]
    lease = claim(store, TRAIN.key)
    assert lease is not None
    assert lease_files(store) == ["lease-000002.json"]
    lease.release()


def test_a_process_id_that_came_again_is_another_process(store: Store) -> None:
    lease = claim(store, TRAIN.key)
    assert lease is not None
    says = json.loads(lease.path.read_text())
    lease.path.write_text(json.dumps({**says, "began": "1"}))
    assert claim(store, TRAIN.key) is not None


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"token": "x"}', "\xff"])
@pytest.mark.parametrize(("age", "free"), [(STALE - 5, False), (STALE + 5, True)])
def test_elsewhere_only_the_heartbeat_counts(store: Store, text: str | None, age: float, free: bool) -> None:
    path = store.folder(TRAIN.key) / "lease-000007.json"
    other = {"token": "t", "machine": "another", "pid": os.getpid(), "began": "1"}
    path.write_bytes((json.dumps(other) if text is None else text).encode("latin-1"))
    os.utime(path, (time.time() - age,) * 2)
    lease = claim(store, TRAIN.key)
    assert (lease is not None) == free
    assert lease_files(store) == ["lease-000008.json" if free else "lease-000007.json"]
    if lease is not None:
        lease.release()


def test_a_living_process_that_is_silent_for_a_minute_loses_its_job_and_notices(store: Store) -> None:
    first = claim(store, TRAIN.key)
    assert first is not None
    os.utime(first.path, (time.time() - STALE - 1,) * 2)
    second = claim(store, TRAIN.key)
    assert second is not None
    assert not first.beat()
    assert not first.held
    first.release()  # takes nothing away from the second
    assert second.beat()
    assert claim(store, TRAIN.key) is None
    second.release()


def test_a_beat_keeps_a_lease_alive_and_never_another_s(store: Store) -> None:
    lease = claim(store, TRAIN.key)
    assert lease is not None
    os.utime(lease.path, (time.time() - STALE + 5,) * 2)
    assert lease.beat()
    assert holders(store.folder(TRAIN.key), time.time())[0].age < 5
    lease.path.unlink()
    lease.path.write_text(json.dumps({"token": "theirs", "machine": "m", "pid": 1, "began": ""}))
    os.utime(lease.path, (1.0, 1.0))
    assert not lease.beat()
    assert lease.path.stat().st_mtime == 1.0
    lease.release()
    assert lease.path.exists()


def test_a_file_server_that_is_away_costs_a_job_after_a_while_only(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = claim(store, TRAIN.key)
    assert lease is not None

    def away(path: object) -> None:
        raise OSError(errno.ESTALE, "away")

    monkeypatch.setattr(os, "utime", away)
    assert lease.beat()
    lease._last -= STALE
    assert not lease.beat()


def test_a_lease_that_goes_away_while_it_is_read_is_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS knows that a file was there, and says that it is stale."""
    lease, stat, said = claim(store, TRAIN.key), os.stat, errno.ESTALE
    assert lease is not None

    def gone(path: object, **how: bool) -> os.stat_result:
        if "lease-" in str(path):
            raise OSError(said, "gone")
        return stat(str(path), **how)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", gone)
        assert holders(store.folder(TRAIN.key), time.time()) == []
        assert holder_of(store, TRAIN.key) is None
        said = errno.EIO
        with pytest.raises(OSError, match="gone"):
            holders(store.folder(TRAIN.key), time.time())
    assert holder_of(store, TRAIN.key) is not None
    lease.release()


def test_the_thread_beats_by_itself(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.05)
    monkeypatch.setattr(leases, "_beating", leases._Beating())
    lease = claim(store, TRAIN.key)
    assert lease is not None
    os.utime(lease.path, (1.0, 1.0))
    until = time.monotonic() + 20
    while lease.path.stat().st_mtime == 1.0:
        assert time.monotonic() < until
        time.sleep(0.02)
    lease.path.unlink()
    while lease.held:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_folders_without_hard_links_serve_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links")

    monkeypatch.setattr(os, "link", refuse)
    first = claim(store, TRAIN.key)
    assert first is not None
    assert first.beat()
    assert claim(store, TRAIN.key) is None
    assert not leases._create(first.path, first.path)


def _race(root: Path, barrier: Barrier, rounds: int, sender: object) -> None:
    store, won = Store(root), []
    for number in range(rounds):
        barrier.wait()
        if claim(store, toy_job("train", {"seed": number}).key) is not None:
            won.append(number)
    barrier.wait()  # stay alive until the last claim is decided
    sender.send(won)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stale", [False, True])
def test_exactly_one_of_four_processes_wins_each_race(store: Store, stale: bool) -> None:
    """Both for a job nobody holds, and for one whose holder is dead."""
    rounds, processes = 25, 4
    for number in range(rounds):
        job = toy_job("train", {"seed": number})
        store.add(job)
        if stale:
            path = store.folder(job.key) / "lease-000001.json"
            path.write_text("{}")
            os.utime(path, (1.0, 1.0))
    context = multiprocessing.get_context("spawn")
    barrier, pipes = context.Barrier(processes), [context.Pipe(duplex=False) for _ in range(processes)]
    started = [context.Process(target=_race, args=(store.root, barrier, rounds, pipe[1])) for pipe in pipes]
    for process in started:
        process.start()
    won: Counter[int] = Counter()
    for receiver, _ in pipes:
        won.update(receiver.recv())
    for process in started:
        process.join()
    assert won == Counter(range(rounds))


def test_a_driver_sees_what_another_one_finished(store: Store) -> None:
    claims = Claims(store, [TRAIN.key, EVALUATE.key])
    theirs = claim(store, TRAIN.key)
    assert theirs is not None
    assert claims.take(TRAIN.key) == "held"
    store.put(TRAIN, Record("error"))
    theirs.release()
    assert claims.take(TRAIN.key) == "over"  # and is not tried once more by every driver
    assert Claims(store, [TRAIN.key]).take(TRAIN.key) == "run"  # but by the next command
    assert claims.take(EVALUATE.key) == "run"
    assert not claims.lost(EVALUATE.key)
    claims.close()
    assert lease_files(store, EVALUATE.key) == []


def test_a_driver_that_died_in_the_middle_leaves_the_job_to_others(store: Store) -> None:
    store.put(TRAIN, Record("error"))
    claims = Claims(store, [TRAIN.key])
    (store.folder(TRAIN.key) / "record.json").unlink()  # the other one had begun
    assert claims.take(TRAIN.key) == "run"
    claims.close()


def test_debug_waits_for_another_driver_and_goes_on_with_what_it_left(store: Store, tmp_path: Path) -> None:
    done: list[str] = []

    def work(root: Path, key: str, data: Path, device: str) -> str:
        done.append(key)
        store.put(store.job(key), Record("done"))
        return "done"

    theirs = claim(store, TRAIN.key)
    assert theirs is not None
    seen: list[Event] = []
    for event in drive(Debug(tmp_path, work=work), [TRAIN, EVALUATE], store):
        seen.append(event)
        if event.kind == "tick" and theirs.held:
            assert done == []  # the evaluation waits for a training that is not this driver's
            store.put(TRAIN, Record("done"))
            theirs.release()
    kinds = [(event.kind, event.job.key, event.message) for event in seen if event.job is not None]
    assert kinds[0] == ("skipped", TRAIN.key, "done by another run")
    assert [kind for kind, _, _ in kinds[1:]] == ["started", "ok"]
    assert done == [EVALUATE.key]
