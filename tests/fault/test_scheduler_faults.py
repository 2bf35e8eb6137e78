"""F2, F5, F6, F15, F17, F18, F24: the local executor under kills, signals, memory faults, lost devices and hangs.

The jobs need no torch (tests/fake_jobs.py); executor, processes, leases and store are the real ones. Each test has a
small part that always runs, and the number of trials below, which docs/reliability.md shows, among those marked fault.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGTERM, Signals
from typing import Any

import driver_of_jobs
import fake_jobs
import pytest
from fake_jobs import evaluate, kinds, says, starts, train
from harness import alive

from bench.executors.base import Event
from bench.executors.devices import Gpu, Slot, slots
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.planning.job import Job
from bench.records.record import Record
from bench.records.store import Store

WORKER_KILLS, NEIGHBOURS = 100, 50
SIGNALS = 20  # of each kind
CROWD = 20  # jobs beside and with the one that has no memory
HANGS = 10
SOAKED = 1000
MANY = pytest.param(SIGNALS, marks=[pytest.mark.fault, pytest.mark.timeout(900)])
FAST = pytest.mark.parametrize("trials", [1, MANY])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    return made


def run(store: Store, jobs: list[Job], workers: int = 2, **how: Any) -> list[Event]:
    return list(drive(Local(store.root.parent, [Slot("cpu")] * workers, work=fake_jobs.work, **how), jobs, store))


def record(store: Store, job: Job) -> Record:
    found = store.record(job.key)
    assert found is not None
    return found


@pytest.mark.parametrize("kills", [4, pytest.param(WORKER_KILLS, marks=pytest.mark.fault)])
def test_f02_a_killed_worker_costs_its_own_job_alone(store: Store, tmp_path: Path, kills: int) -> None:
    """At any moment of a job, four at a time. Those that die a third time are given up."""
    draw = random.Random(0)
    jobs = [train(seed) for seed in range(kills + kills * NEIGHBOURS // WORKER_KILLS)]
    hopeless = max(kills // 10, 1)
    for place, job in enumerate(jobs[:kills]):
        moment = f"kill {draw.uniform(0.0, 0.05):.3f}"
        says(tmp_path, job, moment, *([] if place < hopeless else ["ok"]))
    for job in jobs[kills:]:
        says(tmp_path, job, "ok 0.02")
    events = run(store, jobs, workers=4)
    assert [kinds(events, job)[-1] for job in jobs] == ["error"] * hopeless + ["ok"] * (len(jobs) - hopeless)
    told = [len(starts(tmp_path, job)) for job in jobs]
    assert told == [3] * hopeless + [2] * (kills - hopeless) + [1] * (len(jobs) - kills)
    assert all(record(store, job).retries == () for job in jobs[kills:])
    assert sum(event.kind == "retried" for event in events) == kills + hopeless


Started = tuple["subprocess.Popen[str]", list[int]]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """`bench run` in a process of its own, once three of its six jobs run; and the processes of these."""
    made: list[subprocess.Popen[str]] = []
    here = Path(__file__).parent
    path = os.pathsep.join(str(folder) for folder in (here.parent.parent, here.parent, here))

    def start(root: Path, *acts: str) -> Started:
        jobs = driver_of_jobs.jobs()
        Store(root / "results").prepare()
        for job, act in zip(jobs, acts, strict=False):
            says(root, job, act)
        words = [sys.executable, str(here / "driver_of_jobs.py"), str(root)]
        process = subprocess.Popen(
            words,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        made.append(process)
        until = time.monotonic() + 60
        while time.monotonic() < until and not all(starts(root, job) for job in jobs[:3]):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        return process, _session(process.pid)

    yield start
    for process in made:
        process.kill()
        process.wait()


def _session(driver: int) -> list[int]:
    """All that a driver started: fork server, resource tracker, workers and what these started."""
    import psutil

    return [child.pid for child in psutil.Process(driver).children(recursive=True)]


def orphans(pids: list[int]) -> list[int]:
    """Those that are still there 3 s after their driver ended (the fork server notices it by a closed pipe)."""
    until = time.monotonic() + 3
    while time.monotonic() < until and any(alive(pid) for pid in pids):
        time.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


def safe(root: Path, before: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    """What was finished stands untouched, nothing else claims to be, and the same run does the rest, once."""
    store, jobs = Store(root / "results"), driver_of_jobs.jobs()
    done = {job.key for job in jobs if store.done(job.key)}
    assert {key for key, at in before.items() if _stamps(root).get(key) == at} == set(before)
    assert all(store.intact(key) for key in done)
    counts = {job.key: len(starts(root, job)) for job in jobs}
    for job in jobs:
        says(root, job, *["ok"] * (counts[job.key] + 1))
    events = run(store, jobs, workers=3)
    assert {job.key for job in jobs if kinds(events, job) == ["skipped"]} == done
    assert all(len(starts(root, job)) == counts[job.key] + (job.key not in done) for job in jobs)
    assert all(record(store, job).state == "done" for job in jobs)


def _stamps(root: Path) -> dict[str, float]:
    return {path.parent.name: path.stat().st_mtime for path in (root / "results").glob("*/record.json")}


@FAST
@pytest.mark.parametrize(("number", "code", "limit"), [(SIGINT, 130, 10.0), (SIGTERM, 143, 25.0), (SIGHUP, 129, 25.0)])
def test_f05_f06_one_signal_saves_says_how_to_resume_and_leaves_nothing(
    begin: Callable[..., Started],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    number: Signals,
    code: int,
    limit: float,
    trials: int,
) -> None:
    draw, slowest = random.Random(trials), 0.0
    for trial in range(trials):
        root = tmp_path / str(trial)
        process, below = begin(root, "polite", f"ok {draw.uniform(0.0, 0.3):.2f}", "sleep", *["ok 0.05"] * 3)
        time.sleep(draw.uniform(0.0, 0.3))
        below = list({*below, *_session(process.pid)})
        before, sent = _stamps(root), time.monotonic()
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
        slowest = max(slowest, time.monotonic() - sent)
        assert process.returncode == code, told
        assert "Traceback" not in told
        assert " left\nstopped; nothing finished is lost. Resume with:\n  bench " in told
        assert (root / f"{driver_of_jobs.jobs()[0].key}.saved").read_text() == "saved"
        assert orphans(below) == []
        safe(root, before, capsys)
    assert slowest < limit
    print(f"{number.name}: at most {slowest:.1f} s over {trials} trials")


@FAST
def test_f05_a_second_signal_ends_it_at_once(
    begin: Callable[..., Started], tmp_path: Path, capsys: pytest.CaptureFixture[str], trials: int
) -> None:
    draw, slowest = random.Random(trials), 0.0
    for trial in range(trials):
        root = tmp_path / str(trial)
        process, below = begin(root, "deaf", "clan", "polite", *["ok 0.05"] * 3)
        below, before = list({*below, *_session(process.pid)}), _stamps(root)
        process.send_signal(SIGINT)
        time.sleep(draw.uniform(0.3, 0.8))
        assert process.poll() is None  # a deaf job has its ten seconds
        sent = time.monotonic()
        process.send_signal(SIGINT)
        _, told = process.communicate(timeout=60)
        slowest = max(slowest, time.monotonic() - sent)
        assert process.returncode == 130, told
        assert "Traceback" not in told
        assert orphans(below) == []
        safe(root, before, capsys)
    assert slowest < 2.0
    print(f"second SIGINT: at most {slowest:.1f} s over {trials} trials")


@pytest.mark.parametrize("crowd", [4, pytest.param(CROWD, marks=pytest.mark.fault)])
@pytest.mark.parametrize("how", ["raised", pytest.param("killed", marks=pytest.mark.fault)])
def test_f15_one_job_without_memory_costs_no_other(store: Store, tmp_path: Path, how: str, crowd: int) -> None:
    kernel, act = tmp_path / "kernel", {"raised": "oom", "killed": "host 0.7"}[how]
    kernel.touch()
    trained = [train(seed) for seed in range(crowd // 2)]
    judged = [evaluate(job, 100) for job in trained]
    jobs = [*trained, *judged]
    assert len(jobs) == crowd
    says(tmp_path, judged[0], act)
    events = run(store, jobs, workers=1, memory_kills=lambda: len(kernel.read_text()))
    assert [kinds(events, job)[-1] for job in jobs].count("ok") == crowd - 1
    assert kinds(events, judged[0]) == ["started", "retried"] * 3 + ["started", "error"]
    found = record(store, judged[0])
    assert found.state == "oom"
    assert found.peak_memory_mb.rss > 1
    assert [each.step for each in found.retries] == ["halve"] * 3
    assert [len(start["before"]) for start in starts(tmp_path, judged[0])] == [0, 1, 2, 3]
    assert all(len(starts(tmp_path, job)) == 1 for job in jobs if job != judged[0])


def test_f17_a_lost_gpu_costs_its_process_and_is_benched_and_nothing_ends_on_the_cpu(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    two = [Gpu(str(place), f"GPU-{place}", "card", 80_000.0, 5.0) for place in range(2)]
    places = [slot for name in ("0", "1") for slot in slots("auto", 1, 1, [name], lambda: two)]
    jobs = [train(seed) for seed in range(8)]
    for job in jobs:
        (tmp_path / f"{job.key}.bad").write_text("1")  # whoever comes to GPU 1 is told that it is lost
        says(tmp_path, job, "ok 0.05")
    events = run_on(store, jobs, places)
    assert [kinds(events, job)[-1] for job in jobs] == ["ok"] * 8
    seen = {job.key: [start["shown"]["CUDA_VISIBLE_DEVICES"] for start in starts(tmp_path, job)] for job in jobs}
    broken = [job for job in jobs if "1" in seen[job.key]]
    assert len(broken) == 2  # then the GPU is benched
    for job in broken:
        assert seen[job.key] == ["1", "0"]  # elsewhere
        assert len({start["pid"] for start in starts(tmp_path, job)}) == 2  # in a new process
        assert [(e.step, e.type) for e in record(store, job).retries] == [("elsewhere", "AcceleratorError")]
    assert {start["device"] for job in jobs for start in starts(tmp_path, job)} == {"cuda"}


def run_on(store: Store, jobs: list[Job], places: list[Slot]) -> list[Event]:
    return list(drive(Local(store.root.parent, places, work=fake_jobs.work), jobs, store))


@pytest.mark.parametrize("hangs", [3, pytest.param(HANGS, marks=pytest.mark.fault)])
def test_f18_a_job_that_never_returns_is_killed_in_time_with_all_it_started(
    store: Store, tmp_path: Path, hangs: int
) -> None:
    limit = 2.0 if hangs < HANGS else 10.0
    jobs = [train(seed) for seed in range(hangs)]
    for job, act in zip(jobs, ["clan", "family", *["deaf", "sleep"] * hangs], strict=False):
        says(tmp_path, job, act)
    began, ended = dict[str, float](), dict[str, float]()
    for event in drive(Local(tmp_path, [Slot("cpu")] * hangs, work=fake_jobs.work, time_limit=limit), jobs, store):
        if event.job is not None:
            (began if event.kind == "started" else ended)[event.job.key] = time.monotonic()
    for job in jobs:
        assert record(store, job).state == "timeout"
        assert limit <= ended[job.key] - began[job.key] + 0.05
        if hangs == HANGS:  # ten at a time, at limit + 10 %
            assert ended[job.key] - began[job.key] <= 1.1 * limit
        child = tmp_path / f"{job.key}.child"
        below = [int(pid) for pid in child.read_text().split()] if child.exists() else []
        assert not any(alive(pid) for pid in [starts(tmp_path, job)[0]["pid"], *below])
    assert len((tmp_path / f"{jobs[0].key}.child").read_text().split()) == 2


SOAK = """
import json, random, sys, time
from pathlib import Path
import psutil
import fake_jobs
from bench.executors.devices import Slot
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.records.store import Store

if __name__ == "__main__":
    root, count = Path(sys.argv[1]), int(sys.argv[2])
    store, me = Store(root / "results"), psutil.Process()
    trained = [fake_jobs.train(seed) for seed in range(count // 4)]
    jobs = trained + [fake_jobs.evaluate(job, n) for job in trained for n in (1, 2, 3)]
    faulty = random.Random(0).sample(jobs, count // 20)
    for place, job in enumerate(faulty):
        fake_jobs.says(root, job, ("raise", "kill", "oom")[place % 3], "ok")
    backend = Local(root, [Slot("cpu")] * 2, work=fake_jobs.work)
    list(drive(backend, [fake_jobs.train(-1)], store))
    files, held, spent = me.num_fds(), me.memory_info().rss, time.process_time()
    ends = {event.job.key: event.kind for event in drive(backend, jobs, store) if event.job}
    print(json.dumps({
        "ends": sorted(ends.values()), "jobs": len(jobs), "files": me.num_fds() - files,
        "bytes": me.memory_info().rss - held, "ms": 1000 * (time.process_time() - spent) / count,
        "alive": [s["pid"] for job in jobs for s in fake_jobs.starts(root, job) if psutil.pid_exists(s["pid"])],
    }))
"""


@pytest.mark.parametrize("count", [20, pytest.param(SOAKED, marks=pytest.mark.fault)])
def test_f24_many_jobs_with_faults_leak_nothing_and_cost_little(store: Store, tmp_path: Path, count: int) -> None:
    """In a process of its own, since workers import what the driver's main module is, which here is pytest."""
    script = tmp_path / "soak.py"
    script.write_text(SOAK)
    tests = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    words = [sys.executable, str(script), str(tmp_path), str(count)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["ends"]) == found["jobs"] == count
    assert set(found["ends"]) <= {"ok", "error", "blocked"}
    assert 0.8 * count <= found["ends"].count("ok") < count
    assert found["files"] <= 2
    assert found["bytes"] < 50 * 2**20
    assert found["ms"] < 50.0
    assert found["alive"] == []
    assert [path for path in store.root.rglob("*") if path.name.startswith(".") or path.name == "shared"] == []
