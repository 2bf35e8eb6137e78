"""The executor ray on a real Ray of this machine: the same results, retries, nothing left behind, loopback only."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Bench, outcomes, states, tiny, write_plugins
from paths import TESTS

from bench.records.leases import holder_of
from bench.records.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ON = ["--executor", "ray"]


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'defense-bench[ray]'")
    monkeypatch.setenv("BENCH_RAY_TEST", str(tmp_path))


def ray(*words: object) -> subprocess.CompletedProcess[str]:
    """A driver in a process of its own: Ray reads its switches once."""
    command = [sys.executable, "-m", "bench", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=400)


def daemons() -> set[int]:
    """Ray's processes that are no driver, of this test alone: others may run a Ray of their own at the same time."""
    names, mine = ("raylet", "gcs_server"), os.environ["BENCH_RAY_TEST"]
    found = set()
    for process in psutil.process_iter(["name", "environ"]):
        if process.info["name"] in names and (process.info["environ"] or {}).get("BENCH_RAY_TEST") == mine:
            found.add(process.pid)
    return found


def test_ray_gives_what_this_machine_gives_and_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    plugins = write_plugins(tmp_path)
    before = daemons()
    words = tiny(*plugins, attack="clean,wobble,picky")
    assert bench(*words, "--results-dir", tmp_path / "here").code == 0
    done = ray(*words, "--results-dir", tmp_path / "a b'c é", *ON)
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes(tmp_path / "a b'c é") == outcomes(tmp_path / "here")
    assert len(outcomes(tmp_path / "here")) == 4
    assert daemons() == before


def test_a_lost_worker_is_tried_twice_more_and_what_failed_blocks_what_needs_it(bench: Bench, tmp_path: Path) -> None:
    plugins = write_plugins(tmp_path)
    (tmp_path / "fragile.todo").write_text("raise")
    (tmp_path / "wobble.todo").write_text("kill")
    done = ray(*tiny(*plugins, *ON, defense="fragile,plain", attack="wobble"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert states(Path("results")) == {"fragile": "error", "plain": "done", "plain/wobble": "error"}
    assert "broken on purpose" in done.stdout
    assert "ended as error" in done.stdout
    assert "Ray lost the worker 3 times" in done.stdout
    logs = [path.read_text() for path in Path("results").glob("*/log.txt")]
    assert max(log.count("evaluate") for log in logs) == 3


def test_a_job_that_somebody_does_by_hand_is_left_to_him(tmp_path: Path) -> None:
    plugins = write_plugins(tmp_path)
    (tmp_path / "fragile.todo").write_text("raise")
    words = [*tiny(*plugins, defense="fragile", attack="clean"), "--results-dir", tmp_path / "r"]
    assert ray(*words).returncode == 1
    store = Store(tmp_path / "r")
    (key,) = (job.key for job in store.jobs().values() if job.kind == "train")
    (tmp_path / "fragile.todo").write_text("sleep")
    command = [sys.executable, "-m", "bench", "worker", key, "--results-dir", str(store.root), *map(str, plugins)]
    worker = subprocess.Popen(command, env=dict(os.environ))
    driver = None
    try:
        until(lambda: holder_of(store, key) is not None and store.progress(key))
        driver = subprocess.Popen(
            [sys.executable, "-m", "bench", *map(str, [*words, *ON])], stdout=subprocess.PIPE, text=True
        )
        until(lambda: set(daemons()) and driver is not None and driver.poll() is None)
        time.sleep(20)
        assert driver.poll() is None
        (tmp_path / "fragile.todo").unlink()
        assert worker.wait(timeout=60) == 0
        out, _ = driver.communicate(timeout=200)
    finally:
        for process in (worker, driver):
            if process is not None:
                process.kill()
    assert driver.returncode == 0, out
    assert "1 job run, 1 already done" in out
    assert (store.folder(key) / "log.txt").read_text().count(f"train {key}") == 2  # the one that raised, and by hand


def test_ray_and_this_machine_share_a_folder(bench: Bench, tmp_path: Path) -> None:
    plugins = write_plugins(tmp_path)
    words = tiny("--seeds", "0,1,2", *plugins, attack="clean,wobble")
    assert bench(*words, "--results-dir", tmp_path / "here").code == 0
    there = tmp_path / "there"
    command = [sys.executable, "-m", "bench", *map(str, words), "--results-dir", str(there)]
    drivers = [subprocess.Popen([*command, *more], env=dict(os.environ)) for more in (ON, ["--workers", "1"])]
    try:
        assert [driver.wait(timeout=300) for driver in drivers] == [0, 0]
    finally:
        for driver in drivers:
            driver.kill()
    assert outcomes(there) == outcomes(tmp_path / "here")
    for key in Store(there).keys():
        assert (there / key / "log.txt").read_text().count(f" {key} on cpu, pid") == 1


HALVES = """
import json, sys
from pathlib import Path
import ray
from bench.executors.driver import drive
from bench.executors.ray import Ray
from bench.records.record import Record, to_json
from bench.records.store import Store
from factories import toy_job
ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
store = Store(Path(sys.argv[1]))
store.prepare()
begins, lacks, stands = (toy_job("train", {"seed": seed}) for seed in range(3))
store.add(stands)
store.put(stands, Record("done"))
events = drive(Ray(Path(sys.argv[1]), num_gpus=0.5), [begins, lacks, stands], store)
assert next(events).kind == "skipped"
(store.folder(lacks.key) / "job.json").unlink()  # as on a node that does not share the folder
told = {event.job.key: event.message for event in events if event.kind == "error"}
keys = (begins.key, lacks.key)
print(json.dumps([[told[key] for key in keys], [to_json(store.record(key)) for key in keys]]))
"""


def test_a_gpu_s_share_says_who_is_beside_and_a_job_that_a_node_cannot_see_is_no_lost_worker(tmp_path: Path) -> None:
    """Ray counts a GPU that is not there; jobs on it fail, and their records say what they were told."""
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", HALVES, str(tmp_path / "r")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    (_, said), (begun, lost) = json.loads(done.stdout)
    assert begun["provenance"]["workers"] == 2  # on its GPU; four run on the cluster at a time
    assert said == f"LookupError: {lost['error']['message']}"
    assert lost["error"]["message"].endswith(
        "; is the results folder shared with Ray's nodes, and is bench installed there?"
    )
    assert re.search(r"no job [0-9a-f]{12} in ", said)
    assert said.count("\n") == 0
    assert lost["error"]["type"] == "LookupError"


def until(what: Callable[[], Any]) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() - began < 120
        time.sleep(0.1)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A driver whose jobs sleep."""
    plugins = write_plugins(tmp_path)
    (tmp_path / "fragile.todo").write_text("sleep")
    words = tiny(*plugins, *ON, "--results-dir", tmp_path / "r", defense="fragile", attack="clean")
    driver = subprocess.Popen(
        [sys.executable, "-m", "bench", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # also where tests run in background
    )
    began = time.monotonic()
    while not list((tmp_path / "r").glob("*/progress.json")):
        assert time.monotonic() - began < 200
        time.sleep(0.2)
    yield driver
    driver.kill()
    driver.wait()


def test_ray_listens_on_loopback_only_and_ctrl_c_ends_it(listening: subprocess.Popen[bytes]) -> None:
    family = {process.pid for process in psutil.Process(listening.pid).children(recursive=True)} | {listening.pid}
    found = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in family]
    assert len(found) >= 3
    assert {c.laddr.ip for c in found} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    listening.send_signal(signal.SIGINT)
    assert listening.wait(timeout=60) == 130
    _, left = psutil.wait_procs([psutil.Process(pid) for pid in family if psutil.pid_exists(pid)], timeout=30)
    assert not left


def test_an_address_without_a_cluster_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = ray(*tiny(*ON, "--address", "127.0.0.1:9", defense="standard", attack="clean"))
    assert done.returncode == 2
    assert "no Ray cluster at --address 127.0.0.1:9" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()
