"""The executor slurm on a real Slurm: the same results as elsewhere, requeues, failures, refusals, scripts by hand."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from harness import Bench, outcomes, states, tiny, write_plugins
from slurm_cluster import active, empty_queue, requeue, slurm, start, tasks, until  # noqa: F401  # with fixtures

from bench.records.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm", "empty_queue"), pytest.mark.timeout(600)]
ON = ["--executor", "slurm"]


@pytest.fixture
def plugins(tmp_path: Path) -> list[object]:
    return write_plugins(tmp_path)


def test_slurm_gives_what_this_machine_gives(bench: Bench, plugins: list[object], tmp_path: Path) -> None:
    words = tiny("--seeds", "0,1", *plugins, attack="clean,wobble,fgsm,picky")
    odd = tmp_path / 'a b\'c "d" é $HOME `x` %j \\n'
    here = bench(*words, "--results-dir", tmp_path / "here", "--workers", 2, "-q")
    there = bench(*words, "--results-dir", odd, *ON, "--partition", "main", "--mem", "100M", "-q")
    assert (here.code, there.code) == (0, 0)
    assert outcomes(odd) == outcomes(tmp_path / "here")
    assert len(outcomes(odd)) == 10
    rows = [_rows(done.out) for done in (here, there)]
    assert rows[0] == rows[1] != []
    again = bench(*words, "--results-dir", odd, *ON)
    assert "0 jobs run, 10 already done" in again.out


def test_each_kind_of_job_gets_the_time_that_was_asked_for_it(bench: Bench, plugins: list[object]) -> None:
    limits = ("--time", "0:30:00", "--slurm", "evaluate.time=0:10:00", "--max-running", 1, "--detach")
    assert bench(*tiny("--seeds", "0,1", *plugins, attack="clean"), *ON, *limits).code == 0
    words = ["squeue", "--noheader", "--array", "--states=all", "--format=%F|%l"]
    answer = subprocess.run(words, capture_output=True, text=True, check=True)
    store, asked = Store(Path("results")), dict(line.split("|") for line in answer.stdout.split())
    found = {
        (store.job(key).kind, asked[file.name])
        for file in (store.root / "slurm").iterdir()
        if file.name.isdigit()
        for key in file.read_text().split()
    }
    assert found == {("train", "30:00"), ("evaluate", "10:00")}
    until(lambda: len(outcomes(store.root)) == 4)


def shared_tasks(results: Path) -> list[set[str]]:
    """The attacks of each task that several jobs share."""
    store = Store(results)
    files = [file for file in (results / "slurm").iterdir() if file.name.isdigit()]
    words = [word.split("+") for file in files for word in file.read_text().split()]
    return [{store.evaluation(key).attack.name for key in keys} for keys in words if len(keys) > 1]


def learned(bench: Bench, plugins: list[object]) -> list[object]:
    """A run of two seeds, one of which has been done here: its records tell how long each evaluation takes."""
    attacks = "clean,wobble,fgsm"
    assert bench(*tiny("--seeds", "0", *plugins, attack=attacks), "-q").code == 0
    return tiny("--seeds", "0,1", *plugins, attack=attacks)


def test_short_evaluations_share_a_task_and_one_fails_alone(
    bench: Bench, plugins: list[object], tmp_path: Path
) -> None:
    words = learned(bench, plugins)
    assert bench(*words, "--results-dir", tmp_path / "here", "-q").code == 0
    (tmp_path / "wobble.todo").write_text("kill")
    done = bench(*words, *ON)
    assert done.code == 1
    assert shared_tasks(Path("results")) == [{"clean", "wobble", "fgsm"}]
    records = {job.attack.name: record for job, record in Store(Path("results")).records() if job.seed and job.needs}
    assert {name: record.state for name, record in records.items()} == {
        "clean": "done",
        "wobble": "error",
        "fgsm": "done",
    }
    assert "Slurm reports FAILED" in records["wobble"].error.message
    (tmp_path / "wobble.todo").unlink()
    assert bench(*words, *ON).code == 0
    assert outcomes(Path("results")) == outcomes(tmp_path / "here")


def test_a_requeued_shared_task_repeats_nothing(bench: Bench, plugins: list[object], tmp_path: Path) -> None:
    words = learned(bench, plugins)
    assert bench(*words, "--results-dir", tmp_path / "here", "-q").code == 0
    (tmp_path / "wobble.todo").write_text("sleep")
    driver = start(*words, *ON)
    try:
        until(lambda: len(Store(Path("results")).jobs()) == 8)
        store = Store(Path("results"))
        mine = {job.attack.name: job for job in store.jobs().values() if job.seed and job.needs}
        until(lambda: Store(Path("results")).progress(mine["wobble"].key))
        shown = bench("status", "--json").out
        assert mine["wobble"].key in shown
        (task,) = tasks("RUNNING")
        requeue(task, meanwhile=(tmp_path / "wobble.todo").unlink)
        out, err = driver.communicate(timeout=200)
    finally:
        driver.kill()
    assert driver.returncode == 0, out + err
    assert shared_tasks(Path("results")) == [{"clean", "wobble", "fgsm"}]
    assert outcomes(Path("results")) == outcomes(tmp_path / "here")
    begun = {
        name: (store.folder(job.key) / "log.txt").read_text().count(f"{job.key} on cpu") for name, job in mine.items()
    }
    assert begun == {"clean": 1, "wobble": 2, "fgsm": 1}


def _rows(out: str) -> list[list[str]]:
    """The table's cells, without the two columns of times."""
    return [line.split("│")[1:-3] for line in out.splitlines() if line.startswith("│")]


def test_a_failed_job_is_an_error_and_what_needs_it_is_blocked(
    bench: Bench, plugins: list[object], tmp_path: Path
) -> None:
    (tmp_path / "fragile.todo").write_text("raise")
    done = bench(*tiny(*plugins, *ON, defense="fragile,plain", attack="wobble"))
    assert done.code == 1
    assert states(Path("results")) == {"fragile": "error", "plain": "done", "plain/wobble": "done"}
    assert "broken on purpose" in done.out
    assert "ended as error" in done.out
    until(lambda: not active())
    (tmp_path / "fragile.todo").unlink()
    assert (
        bench(
            *tiny(
                *plugins,
                *ON,
                defense="fragile,plain",
                attack="wobble",
            )
        ).code
        == 0
    )


def test_a_job_that_vanished_is_an_error_with_slurm_s_reason(
    bench: Bench, plugins: list[object], tmp_path: Path
) -> None:
    (tmp_path / "wobble.todo").write_text("kill")
    done = bench(*tiny(*plugins, *ON, attack="wobble"))
    assert done.code == 1
    assert states(Path("results")) == {"plain": "done", "plain/wobble": "error"}
    assert "Slurm reports FAILED" in done.out
    (record,) = (record for _, record in Store(Path("results")).records() if record.state == "error")
    assert "FAILED" in record.error.message
    assert record.error.type == "WorkerDied"


def test_a_requeued_job_ends_with_the_same_result(bench: Bench, plugins: list[object], tmp_path: Path) -> None:
    words = tiny(*plugins, attack="wobble")
    assert bench(*words, "--results-dir", tmp_path / "here").code == 0
    (tmp_path / "wobble.todo").write_text("sleep")
    driver = start(*words, "--results-dir", tmp_path / "there", *ON)
    try:
        until(lambda: "plain" in states(tmp_path / "there") if (tmp_path / "there").is_dir() else False)
        (evaluation,) = (job for job in Store(tmp_path / "there").jobs().values() if job.kind == "evaluate")
        until(lambda: Store(tmp_path / "there").progress(evaluation.key))
        (task,) = tasks("RUNNING")
        requeue(task, meanwhile=(tmp_path / "wobble.todo").unlink)
        out, err = driver.communicate(timeout=200)
    finally:
        driver.kill()
    assert driver.returncode == 0, out + err
    assert outcomes(tmp_path / "there") == outcomes(tmp_path / "here")
    log = (tmp_path / "there" / evaluation.key / "log.txt").read_text()
    assert log.count(f"evaluate {evaluation.key} on cpu") == 2  # it was begun twice


def test_ctrl_c_takes_the_jobs_out_of_the_queue(plugins: list[object], tmp_path: Path) -> None:
    (tmp_path / "wobble.todo").write_text("sleep")
    driver = start(*tiny(*plugins, attack="wobble,clean"), "--results-dir", tmp_path / "r", *ON, "--max-jobs", 2)
    try:
        until(lambda: len(tasks("RUNNING")) == 1 and len(list((tmp_path / "r").glob("*/progress.json"))) == 1)
        assert len(active()) <= 2
        driver.send_signal(signal.SIGINT)
        out, err = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert driver.returncode == 130, out + err
    assert "Resume with" in err
    until(lambda: not active())


def test_what_was_submitted_and_left_is_followed_and_not_submitted_twice(
    bench: Bench, plugins: list[object], tmp_path: Path
) -> None:
    (tmp_path / "fragile.todo").write_text("sleep")
    words = tiny(*plugins, *ON, defense="fragile", attack="wobble")
    before = set(tasks())
    left = bench(*words, "--detach")
    assert left.code == 0
    assert "2 jobs in Slurm's queue" in left.err
    submitted = set(tasks()) - before
    assert len(submitted) == 2
    (tmp_path / "fragile.todo").unlink()
    assert bench(*words).code == 0
    assert set(tasks()) - before == submitted
    assert states(Path("results")) == {"fragile": "done", "fragile/wobble": "done"}


@pytest.mark.parametrize("started", ["bash", "sbatch"])
def test_a_printed_script_does_all_jobs(bench: Bench, plugins: list[object], tmp_path: Path, started: str) -> None:
    words = tiny(*plugins, attack="wobble,clean")
    done = bench(*words, *ON, "--print-script")
    assert done.code == 0
    file = tmp_path / "all jobs.sh"
    file.write_text(done.out)
    subprocess.run(["bash", "-n", file], check=True)
    subprocess.run([started, file], check=True)
    until(lambda: len(states(Path("results"))) == 3)
    until(lambda: not active())
    assert bench(*words, "--results-dir", tmp_path / "here").code == 0
    assert outcomes(Path("results")) == outcomes(tmp_path / "here")


def test_a_bad_partition_is_one_line(bench: Bench) -> None:
    done = bench(*tiny(*ON, "--partition", "nowhere", defense="standard", attack="clean"))
    assert done.code == 2
    assert "invalid partition specified: nowhere" in done.err
    assert done.err.count("\n") == 1
