"""`bench run` from the command to the records, with tiny plug-ins: resume, failures, signals, order, provenance."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import Bench, alive, outcomes, states, tiny, write_plugins, written
from paths import ROOT

from bench.records.record import JobError
from bench.records.store import Store

RESULTS = Path("results")
pytest.importorskip("torch")


@pytest.fixture
def plugins(tmp_path: Path) -> list[object]:
    return write_plugins(tmp_path)


@pytest.fixture(scope="module")
def cache() -> dict[str, Path]:
    return {}


@pytest.fixture
def finished(
    bench: Bench, plugins: list[object], cache: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A results folder in which `plain` was trained and judged by `clean` and `wobble`; a copy for each test."""
    if "results" not in cache:
        folder = tmp_path_factory.mktemp("finished") / "results"
        outcome = bench(*tiny("--results-dir", folder, *plugins))
        assert outcome.code == 0, outcome.err
        cache["results"] = folder
    shutil.copytree(cache["results"], RESULTS)
    return RESULTS


def train_key(results: Path, defense: str = "plain") -> str:
    return next(
        key for key, job in Store(results).jobs().items() if job.kind == "train" and job.defense.name == defense
    )


def error_of(results: Path, defense: str) -> JobError:
    record = Store(results).record(train_key(results, defense))
    assert record is not None
    assert record.error is not None
    return record.error


def test_the_same_command_again_does_nothing(finished: Path, bench: Bench, plugins: list[object]) -> None:
    assert states(finished) == {"plain": "done", "plain/clean": "done", "plain/wobble": "done"}
    before = written(finished)
    again = bench(*tiny(*plugins))
    assert (again.code, again.err) == (0, "")
    assert "0 jobs run, 3 already done" in again.out
    assert "plain" in again.out  # the table stands there again
    assert written(finished) == before
    more = bench(*tiny(*plugins, attack="wobble,clean,fgsm"))
    assert "1 job run, 3 already done" in more.out
    assert {key: written(finished)[key] for key in before} == before


def test_order_and_number_of_workers_change_no_sample(bench: Bench, plugins: list[object]) -> None:
    first = bench(*tiny(*plugins, "--results-dir", "one", "--workers", 1, defense="plain,fragile"))
    second = bench(
        *tiny(*plugins, "--results-dir", "two", "--workers", 2, defense="fragile,plain", attack="wobble,clean")
    )
    assert (first.code, second.code) == (0, 0)
    assert len(outcomes(Path("one"))) == 6
    assert outcomes(Path("one")) == outcomes(Path("two"))


def test_the_debug_executor_equals_the_local_one(finished: Path, bench: Bench, plugins: list[object]) -> None:
    outcome = bench(*tiny(*plugins, "--results-dir", "debug", "--executor", "debug"))
    assert outcome.code == 0, outcome.err
    assert outcomes(Path("debug")) == outcomes(finished)


def test_a_killed_worker_costs_one_job_and_a_rerun_repairs_it(bench: Bench, plugins: list[object]) -> None:
    Path("fragile.todo").write_text("kill")
    outcome = bench(*tiny(*plugins, defense="fragile,plain"))
    assert outcome.code == 1
    assert "3 jobs failed or blocked; see `bench status --results-dir results`" in outcome.err
    assert states(RESULTS) == {"fragile": "error", "plain": "done", "plain/clean": "done", "plain/wobble": "done"}
    assert error_of(RESULTS, "fragile") == JobError("WorkerDied", "the worker died (SIGKILL) without a record")
    status = bench("status", "--results-dir", RESULTS)
    assert status.out.startswith("6 jobs in results: 3 done, 1 error, 2 waiting\n")
    assert "\nerror     training fragile seed 0 (" in status.out
    before = written(RESULTS)
    Path("fragile.todo").unlink()
    again = bench(*tiny(*plugins, defense="fragile,plain"))
    assert (again.code, again.err) == (0, "")
    assert "3 jobs run, 3 already done" in again.out
    kept = [key for key in before if key != train_key(RESULTS, "fragile")]
    assert {key: written(RESULTS)[key] for key in kept} == {key: before[key] for key in kept}
    assert set(states(RESULTS).values()) == {"done"}


def test_a_training_that_raises_hurts_only_itself(bench: Bench, plugins: list[object], tmp_path: Path) -> None:
    Path("fragile.todo").write_text("raise")
    outcome = bench(*tiny(*plugins, defense="fragile,plain"))
    assert outcome.code == 1
    assert states(RESULTS)["plain/wobble"] == "done"
    error = error_of(RESULTS, "fragile")
    assert error.type == "RuntimeError"
    assert error.message.startswith("broken on purpose")
    assert "misbehave" in error.traceback
    assert "RuntimeError: broken on purpose" in bench("status", "--results-dir", RESULTS).out


def test_an_attack_that_raises_costs_no_training(bench: Bench, plugins: list[object]) -> None:
    Path("wobble.todo").write_text("raise")
    outcome = bench(*tiny(*plugins))
    assert outcome.code == 1
    assert states(RESULTS) == {"plain": "done", "plain/clean": "done", "plain/wobble": "error"}
    before = written(RESULTS)
    Path("wobble.todo").unlink()
    again = bench(*tiny(*plugins))
    assert again.code == 0
    assert "1 job run, 2 already done" in again.out
    assert sum(before[key] == stat for key, stat in written(RESULTS).items()) == 2
    assert states(RESULTS)["plain/wobble"] == "done"


def test_a_loss_that_is_no_number_is_diverged_and_not_tried_again(bench: Bench, plugins: list[object]) -> None:
    Path("fragile.todo").write_text("nan")
    outcome = bench(*tiny(*plugins, defense="fragile"))
    assert outcome.code == 1
    assert states(RESULTS) == {"fragile": "diverged"}
    assert error_of(RESULTS, "fragile").type == "Diverged"
    before = written(RESULTS)
    again = bench(*tiny(*plugins, defense="fragile"))
    assert again.code == 1
    assert "0 jobs run, 1 already done" in again.out
    assert written(RESULTS) == before


def test_what_cannot_be_judged_says_why_and_is_no_failure(bench: Bench, plugins: list[object]) -> None:
    outcome = bench(*tiny(*plugins, attack="clean,picky"))
    assert (outcome.code, outcome.err) == (0, "")
    assert states(RESULTS) == {"plain": "done", "plain/clean": "done", "plain/picky": "unsupported"}
    assert "not in the mood" in outcome.out
    assert "0 jobs run, 3 already done" in bench(*tiny(*plugins, attack="clean,picky")).out


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_absent_weights_are_trained_again_only_when_needed(
    finished: Path, bench: Bench, plugins: list[object], damage: str
) -> None:
    key = train_key(finished)
    weights = finished / key / "weights-last.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    if damage == "truncated":
        weights.write_bytes(whole[:-1])
    before = written(finished)
    assert "0 jobs run, 3 already done" in bench(*tiny(*plugins)).out
    assert written(finished) == before
    more = bench(*tiny(*plugins, attack="clean,wobble,fgsm"))
    assert more.code == 0, more.err
    assert "2 jobs run, 2 already done" in more.out
    assert weights.read_bytes() == whole
    assert {k for k in before if written(finished)[k] == before[k]} == set(before) - {key}


def test_damaged_records_are_made_again(finished: Path, bench: Bench, plugins: list[object]) -> None:
    expected = outcomes(finished)
    key = next(key for key, job in Store(finished).jobs().items() if job.kind == "evaluate")
    (finished / key / "record.json").write_text("{")
    (finished / train_key(finished) / "job.json").write_text("{")
    assert "1 folder without a readable job.json" in bench("status", "--results-dir", finished).out
    outcome = bench(*tiny(*plugins))
    assert outcome.code == 0, outcome.err
    assert "1 job run, 2 already done" in outcome.out
    assert outcomes(finished) == expected


def test_a_record_says_where_it_comes_from_and_nothing_of_the_machine(
    bench: Bench, plugins: list[object], tmp_path: Path
) -> None:
    bench(*tiny(*plugins))
    record = Store(RESULTS).record(train_key(RESULTS))
    assert record is not None
    origin = record.provenance
    assert None not in (origin.device, origin.workers, origin.threads, origin.plugin_sha256)
    written = json.loads((RESULTS / train_key(RESULTS) / "record.json").read_text())["provenance"]
    assert {"commit", "dirty"} <= set(written)  # null where the code is not in a checkout
    assert (origin.versions or {})["torch"]
    assert private_words(tmp_path) == {}


def test_an_error_says_nothing_of_the_machine(bench: Bench, plugins: list[object], tmp_path: Path) -> None:
    Path("fragile.todo").write_text("raise")
    bench(*tiny(*plugins, defense="fragile"))
    assert private_words(tmp_path) == {}


def private_words(tmp_path: Path) -> dict[str, list[str]]:
    """What the durable files of a run tell of this machine, by file."""
    files = [*RESULTS.glob("*/record.json"), *RESULTS.glob("*/job.json")]
    assert files
    private = [str(tmp_path), str(ROOT), str(Path.home()), socket.gethostname()]
    if len(getpass.getuser()) > 4 or getpass.getuser() == "root":
        private.append(f"/{getpass.getuser()}/")
    told = {str(path): [word for word in private if word in path.read_text()] for path in files}
    return {path: words for path, words in told.items() if words}


def test_json_mode_prints_one_event_a_line(finished: Path, bench: Bench, plugins: list[object]) -> None:
    outcome = bench(*tiny(*plugins, "--json", attack="clean,wobble,fgsm"))
    assert (outcome.code, outcome.err) == (0, "")
    events = [json.loads(line) for line in outcome.out.splitlines()]
    assert sorted(event["event"] for event in events) == ["ok", "row", "skipped", "skipped", "skipped", "started"]
    assert events[-2]["job"].startswith("fgsm Linf 0.1 on plain seed 0")
    assert (events[-1]["event"], events[-1]["method"], events[-1]["eps"]) == ("row", "plain", "0.1")


def test_quiet_mode_prints_the_table_only(finished: Path, bench: Bench, plugins: list[object]) -> None:
    outcome = bench(*tiny(*plugins, "--quiet"))
    assert (outcome.code, outcome.err) == (0, "")
    assert "chosen" not in outcome.out
    assert "plain" in outcome.out


def test_a_dry_run_writes_nothing_and_knows_what_is_done(finished: Path, bench: Bench, plugins: list[object]) -> None:
    before = sorted(Path().rglob("*"))
    outcome = bench(*tiny(*plugins, "--dry-run", attack="clean,wobble,fgsm"))
    assert outcome.code == 0
    assert "jobs      4: 1 training, 3 evaluations; 3 done, 1 to do" in outcome.out
    assert "estimated from the cost model" in outcome.out  # fgsm declares its cost; no record has it
    other = bench(*tiny(*plugins, "--dry-run", "--seeds", "1"))
    assert "3 to do" in other.out
    assert "estimated from 3 past records" in other.out  # the same jobs were done for another seed
    assert sorted(Path().rglob("*")) == before


def test_the_worker_command_does_one_job(finished: Path, bench: Bench, plugins: list[object]) -> None:
    expected = outcomes(finished)
    jobs = Store(finished).jobs()
    key = next(key for key, job in jobs.items() if job.kind == "evaluate" and job.attack.name == "wobble")
    (finished / key / "record.json").unlink()
    outcome = bench("worker", key, *plugins)
    assert (outcome.code, outcome.out, outcome.err) == (0, f"{key} done\n", "")
    assert outcomes(finished) == expected


def run_until_it_sleeps(plugins: list[object], *prefix: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """The driver in a process of its own, once its training hangs; and all processes below it."""
    Path("fragile.todo").write_text("sleep")
    words = [str(word) for word in tiny(*plugins, "--workers", 2, defense="fragile,plain")]
    command = [sys.executable, "-m", "bench", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and driver.poll() is None:
        sleeping = [key for key in Store(RESULTS).jobs() if "pid" in Store(RESULTS).progress(key)]
        if set(states(RESULTS)) == {"plain", "plain/clean", "plain/wobble"} and len(sleeping) == 1:
            return driver, psutil.Process(driver.pid).children(recursive=True)
        time.sleep(0.1)
    for child in psutil.Process(driver.pid).children(recursive=True):
        child.kill()
    driver.kill()
    raise AssertionError(f"the run did not get to its sleeping job: {driver.communicate(timeout=10)}")


def outliving(children: list[psutil.Process]) -> list[int]:
    """Processes that are there half a minute after their driver ended; they are killed then."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(alive(child.pid) for child in children):
        time.sleep(0.05)
    left = [child for child in children if alive(child.pid)]
    for child in left:
        child.kill()
    return [child.pid for child in left]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.fault)]
)
def test_a_stopped_run_leaves_no_process_and_says_how_to_resume(
    bench: Bench, plugins: list[object], number: signal.Signals, code: int
) -> None:
    driver, children = run_until_it_sleeps(plugins)
    assert len(children) >= 2  # the fork server and the sleeping worker at least
    before = written(RESULTS)
    driver.send_signal(number)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == code
    assert "stopped; nothing finished is lost. Resume with:\n  bench run --defense fragile,plain" in err
    assert "Traceback" not in err
    assert outliving(children) == []
    assert set(states(RESULTS).values()) == {"done"}
    Path("fragile.todo").unlink()
    again = bench(*tiny(*plugins, defense="fragile,plain"))
    assert again.code == 0, again.err
    assert "3 jobs run, 3 already done" in again.out
    assert {key: written(RESULTS)[key] for key in before} == before


@pytest.mark.fault
def test_a_killed_driver_loses_nothing_that_was_finished(bench: Bench, plugins: list[object]) -> None:
    driver, children = run_until_it_sleeps(plugins)
    before = written(RESULTS)
    driver.kill()
    driver.communicate(timeout=60)
    assert outliving(children) == []
    Path("fragile.todo").unlink()
    again = bench(*tiny(*plugins, defense="fragile,plain"))
    assert again.code == 0, again.err
    assert set(states(RESULTS).values()) == {"done"}
    assert {key: written(RESULTS)[key] for key in before} == before


def test_a_run_whose_data_cannot_be_had_starts_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("file").absolute()))
    monkeypatch.delenv("BENCH_DATA", raising=False)
    words = ["--dataset", "fashion_mnist", "--defense", "fast_at,trades", "--attack", "clean,fgsm", "--workers", "1"]
    outcome = bench("run", *words)
    assert outcome.code == 2
    assert re.fullmatch(
        r"error: no fashion_mnist in .*, where it cannot be written \(.*\); pass --data-dir\n", outcome.err
    )
    assert not Path("results").exists()
