"""F28: random schedules of drivers that claim, beat, finish, fail, stop, crash, fall silent and come back."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fake_store import matrix
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from bench.executors.base import todo
from bench.records import leases
from bench.records.leases import STALE, Claims, Lease, holders
from bench.records.record import JobError, Record
from bench.records.store import Store

SCHEDULES, MOVES = 2000, 30
CREW = 3
JOBS = matrix(1, 1)
NUMBER, KEY = st.integers(0, CREW - 1), st.sampled_from([job.key for job in JOBS])
BY_KEY = {job.key: job for job in JOBS}


class Driver:
    """A driver that is up: its claims, and what it still has to do. `puts`: records of each job when it started."""

    def __init__(self, store: Store, puts: dict[str, int]) -> None:
        self.claims = Claims(store, [job.key for job in JOBS])
        self.open = {job.key for job in todo(JOBS, store)}
        self.puts = dict(puts)

    def lease(self, key: str) -> Lease | None:
        return self.claims._leases.get(key)


class Schedule(RuleBasedStateMachine):
    """What happens to two jobs at the hands of three drivers, and beside it what has to be true."""

    root: ClassVar[Path]
    number: ClassVar[Any] = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(self.root / str(next(self.number)))
        self.store.prepare()
        for job in JOBS:
            self.store.add(job)
        self.drivers: dict[int, Driver] = {}
        self.tokens: dict[str, str] = {}  # who rightly holds a job, dead or alive
        self.silent: set[str] = set()
        self.done: set[str] = set()
        self.failed: dict[str, int] = dict.fromkeys(BY_KEY, 0)
        self.puts: dict[str, int] = dict.fromkeys(BY_KEY, 0)  # records written so far

    def path_of(self, key: str) -> Path:
        (path,) = [h.path for h in self.found(key) if h.token == self.tokens[key]]
        return path

    def found(self, key: str) -> list[leases.Holder]:
        return holders(self.store.folder(key), time.time())

    def rightly(self, number: int, key: str) -> bool:
        lease = self.drivers[number].lease(key) if number in self.drivers else None
        return lease is not None and lease.token == self.tokens.get(key)

    @rule(number=NUMBER)
    def start_or_stop_and_start_again(self, number: int) -> None:
        if number in self.drivers:
            self._released(number)
            self.drivers.pop(number).claims.close()
        self.drivers[number] = Driver(self.store, self.puts)
        assert not self.drivers[number].open & self.done  # what was finished is not done again

    def _released(self, number: int) -> None:
        for key in [key for key in BY_KEY if self.rightly(number, key)]:
            del self.tokens[key]
            self.silent.discard(key)

    @rule(number=NUMBER, key=KEY)
    @precondition(lambda self: self.drivers)
    def claim(self, number: int, key: str) -> None:
        driver = self.drivers.get(number)
        if driver is None or key not in driver.open:
            return
        mine, record = driver.lease(key), self.store.record(key)
        if mine is not None and mine.held:
            expected = "run"
        elif key in self.tokens and key not in self.silent:
            expected = "held"
        elif record is not None and self.puts[key] != driver.puts[key]:
            expected = "over"
        else:
            expected = "run"
        assert driver.claims.take(key) == expected
        if expected == "over":
            driver.open.discard(key)
            self.tokens.pop(key, None)
            self.silent.discard(key)
        elif expected == "run" and (lease := driver.lease(key)) is not mine and lease is not None:
            assert key not in self.done
            self.failed[key] += record is not None
            assert self.store.record(key) is None
            self.tokens[key] = lease.token
            self.silent.discard(key)

    @rule(number=NUMBER, key=KEY)
    @precondition(lambda self: self.tokens)
    def beat(self, number: int, key: str) -> None:
        lease = self.drivers[number].lease(key) if number in self.drivers else None
        if lease is None:
            return
        right = self.rightly(number, key)
        assert lease.beat() == right
        assert self.drivers[number].claims.lost(key) == (not right)
        if right:
            self.silent.discard(key)

    @rule(number=NUMBER, key=KEY, state=st.sampled_from(["done", "done", "error", "oom"]))
    @precondition(lambda self: self.tokens)
    def finish(self, number: int, key: str, state: str) -> None:
        if not self.rightly(number, key):
            return
        error = None if state == "done" else JobError("E", "m")
        self.puts[key] += 1
        self.store.put(BY_KEY[key], Record(state, error=error))
        assert self.store.record(key).failures == self.failed[key]
        self.drivers[number].claims.release(key)
        self.drivers[number].open.discard(key)
        del self.tokens[key]
        self.silent.discard(key)
        self.done |= {key} if state == "done" else set()

    @rule(number=NUMBER, here=st.booleans(), torn=st.booleans())
    @precondition(lambda self: self.tokens)
    def crash(self, number: int, here: bool, torn: bool) -> None:
        """On this machine, where it is noticed at once, or on another one, where only its silence is."""
        if number not in self.drivers:
            return
        for key in [key for key in BY_KEY if self.rightly(number, key)]:
            path = self.path_of(key)
            stat, says = path.stat(), json.loads(path.read_text())
            path.write_text(json.dumps(says | ({"began": "1"} if here else {"machine": "another"})))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            if torn:
                (self.store.folder(key) / ".record.json.torn").write_text('{"schema": 1, "ke')
            if here:
                del self.tokens[key]
                self.silent.discard(key)
        for lease in list(self.drivers.pop(number).claims._leases.values()):
            leases._beating.discard(lease)

    @rule(key=KEY)
    @precondition(lambda self: self.tokens)
    def fall_silent(self, key: str) -> None:
        if key in self.tokens:
            os.utime(self.path_of(key), (time.time() - STALE - 1,) * 2)
            self.silent.add(key)

    @invariant()
    def nobody_shares_a_job_and_nothing_finished_is_lost(self) -> None:
        for key in BY_KEY:
            alive = [holder.token for holder in self.found(key) if holder.alive]
            assert alive == ([self.tokens[key]] if key in self.tokens and key not in self.silent else [])
        assert all(self.store.done(key) for key in self.done)
        assert list(self.store.root.glob("*/.lease*")) == []

    def teardown(self) -> None:
        """Everybody is gone: a new driver can do all that is left, once, and then there is nothing to do."""
        for number in list(self.drivers):
            self.crash(number, True, False)
        for key in list(self.tokens):
            self.fall_silent(key)
        last = Driver(self.store, self.puts)
        assert last.open == set(BY_KEY) - self.done
        for key in last.open:
            assert last.claims.take(key) == "run"
            self.store.put(BY_KEY[key], Record("done"))
        last.claims.close()
        assert todo(JOBS, self.store) == []
        assert [holder for key in BY_KEY for holder in self.found(key)] == []


@pytest.mark.parametrize("examples", [50, pytest.param(SCHEDULES, marks=[pytest.mark.fault, pytest.mark.timeout(900)])])
def test_f28_random_schedules_share_lose_and_block_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: int
) -> None:
    monkeypatch.setattr(leases, "BEAT", 3600.0)  # beats are steps here
    monkeypatch.setattr(leases, "_beating", leases._Beating())
    monkeypatch.setattr(os, "fsync", lambda file: None)  # processes die here, machines do not
    monkeypatch.setattr(Schedule, "root", tmp_path, raising=False)
    how = settings(
        max_examples=examples,
        stateful_step_count=MOVES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Schedule, settings=how)
