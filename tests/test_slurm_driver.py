"""What the Slurm driver makes of Slurm's answers, without a cluster: `scontrol` is a script with a set answer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bench.executors import slurm
from bench.executors.base import Event
from bench.executors.slurm import Slurm
from bench.executors.submitted import Submitted
from bench.jobs.attempt import tried
from bench.planning.job import Job
from bench.records.leases import Claims, claim, holder_of
from bench.records.store import Store

TRAIN, OTHER = (Job("train", {"seed": seed}) for seed in (0, 1))
EVALUATE, WORST = (Job("evaluate", {"n": n}, (TRAIN.key,)) for n in (1, 2))
LAST = Job("evaluate", {"n": 3}, (OTHER.key, WORST.key))
JOBS = [TRAIN, OTHER, EVALUATE, WORST, LAST]


@pytest.fixture
def run(tmp_path: Path) -> Submitted:
    """A run of five jobs, of which nothing is submitted."""
    store = Store(tmp_path / "results")
    store.prepare()
    for job in JOBS:
        store.add(job)
    known = {job.key: job for job in JOBS}
    return Submitted(store, Claims(store, list(known)), known, set(known), list(JOBS))


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What scontrol answers, as a file; nobody waits for records that may be on their way."""
    answer, tool = tmp_path / "answer", tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\ncat '{answer}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    monkeypatch.setattr(slurm, "GRACE", -1.0)
    return answer


def look(run: Submitted, state: str | None = "") -> list[Event]:
    return list(Slurm(Path())._look(run, None if state is None else dict.fromkeys(run.live.values(), state)))


def keys(jobs: list[Job]) -> set[str]:
    return {job.key for job in jobs}


def test_what_waits_for_a_job_that_another_process_is_at_is_not_submitted(run: Submitted) -> None:
    assert run.free() == JOBS
    run.held = {TRAIN.key}
    assert keys(run.free()) == {OTHER.key}  # LAST waits for WORST, which waits for TRAIN
    run.held = {EVALUATE.key}
    assert keys(run.free()) == keys([TRAIN, OTHER, WORST, LAST])
    run.held = set()
    run.submit([TRAIN, OTHER, WORST], ["7_0", "7_1", "8_0"])
    run.lost[OTHER.key] = 0.0
    assert keys(run.free()) == {EVALUATE.key}


def test_a_job_is_taken_up_before_it_is_submitted(run: Submitted) -> None:
    empty = {"metrics": {}, "files": {}}
    theirs = claim(run.store, TRAIN.key)
    assert theirs is not None
    assert run.take(TRAIN) == (False, None)
    assert run.held == {TRAIN.key}
    run.store.put(TRAIN, "done", empty)
    theirs.release()
    free, event = run.take(TRAIN)
    assert (free, event) == (False, Event("skipped", TRAIN, "done by another run"))
    assert TRAIN.key not in run.pending
    assert TRAIN not in run.waiting
    failed = Submitted(run.store, run.claims, run.jobs, run.pending, run.waiting)
    run.store.put(OTHER, "error", empty)
    failed.claims = Claims(run.store, [OTHER.key])  # a command that comes later tries it again
    assert failed.take(OTHER) == (True, None)
    assert run.store.record(OTHER.key) is None
    again = claim(run.store, OTHER.key)
    assert again is not None  # left to its worker
    again.release()


def test_what_could_not_be_taken_up_is_held_by_nobody(run: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    run.store.put(TRAIN, "error", {"metrics": {}, "files": {}})
    run.claims = Claims(run.store, [TRAIN.key])

    def away(*paths: object, **how: object) -> None:
        raise OSError(errno.EIO, "away")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", away)
        with pytest.raises(OSError, match="away"):
            run.take(TRAIN)
    assert holder_of(run.store, TRAIN.key) is None
    assert run.take(TRAIN) == (True, None)
    assert run.store.record(TRAIN.key) is None  # taken away now, which the first try had not come to


@pytest.mark.parametrize(
    ("answer", "mine", "again"),
    [
        ("JobState=CANCELLED Reason=DependencyNeverSatisfied ExitCode=0:0", True, True),
        ("JobState=FAILED Reason=NonZeroExitCode ExitCode=5:0", True, True),
        ("JobState=CANCELLED Reason=None ExitCode=0:15", False, True),  # by the command that submitted it
        ("JobState=CANCELLED Reason=None ExitCode=0:15", True, False),  # by the user
        ("JobState=FAILED Reason=NonZeroExitCode ExitCode=1:0", True, False),
        ("JobState=NODE_FAIL Reason=None ExitCode=0:5", True, False),
        ("", True, False),
    ],
)
def test_what_slurm_dropped_or_others_do_is_no_error(
    run: Submitted, says: Path, answer: str, mine: bool, again: bool
) -> None:
    says.write_text(answer)
    run.submit([TRAIN], ["7_0"])
    if not mine:
        run.mine.clear()
    events = [event.kind for event in look(run)]
    assert events == ([] if again else ["started", "error"])
    assert (TRAIN in run.waiting) == (TRAIN.key in run.pending) == again
    assert run.live == {}
    record = run.store.record(TRAIN.key)
    assert (record is None) == again
    assert record is None or (record["state"], record["error"]["type"]) == ("error", "WorkerDied")


def test_a_job_that_runs_elsewhere_is_waited_for(run: Submitted, says: Path) -> None:
    says.write_text("JobState=NODE_FAIL Reason=None ExitCode=0:5")
    run.submit([TRAIN], ["7_0"])
    theirs = claim(run.store, TRAIN.key)
    assert theirs is not None
    assert look(run) == []
    assert TRAIN in run.waiting
    theirs.release()


def test_a_record_that_came_before_its_task_began_is_another_run_s(run: Submitted, says: Path) -> None:
    run.submit([TRAIN, OTHER], ["7_0", "7_1"])
    for job in (TRAIN, OTHER):
        run.store.put(job, "done", {"metrics": {}, "files": {}})
    run.started.add(OTHER.key)  # put back by Slurm after its last breath
    assert look(run, "PENDING") == [Event("skipped", TRAIN, "done by another run"), Event("ok", OTHER)]
    assert run.pending == {EVALUATE.key, WORST.key, LAST.key}


@pytest.mark.parametrize(("job", "times", "state"), [(EVALUATE, 3, "oom"), (TRAIN, 0, "oom")])
def test_killed_for_memory_an_evaluation_is_submitted_again_with_half_the_batch(
    run: Submitted, says: Path, job: Job, times: int, state: str
) -> None:
    says.write_text("JobState=OUT_OF_MEMORY Reason=OutOfMemory ExitCode=0:125")
    for number in range(times):
        run.submit([job], [f"{number}_0"])
        assert look(run)[-1].kind == "retried"
        assert [entry["step"] for entry in tried(run.store, job.key)] == ["halve"] * (number + 1)
        assert job in run.waiting
    run.submit([job], ["9_0"])
    assert look(run)[-1].kind == "error"
    record = run.store.record(job.key)
    assert record is not None
    assert record["state"] == state
    assert record["error"]["type"] == "KilledForMemory"
    assert "OUT_OF_MEMORY" in record["error"]["message"]
    assert len(record.get("attempts", [])) == times
    assert tried(run.store, job.key) == []


def test_over_the_time_limit_is_a_state_of_its_own(run: Submitted, says: Path) -> None:
    says.write_text("JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15")
    run.submit([EVALUATE], ["9_0"])
    assert look(run)[-1].kind == "error"
    assert (run.store.record(EVALUATE.key) or {})["state"] == "timeout"


def test_a_controller_that_is_away_ends_nothing(run: Submitted) -> None:
    run.submit([TRAIN], ["7_0"])
    assert look(run, None) == []
    assert run.live == {TRAIN.key: "7_0"}


def test_a_record_may_come_late(run: Submitted, says: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "GRACE", 60.0)
    says.write_text("JobState=COMPLETED Reason=None ExitCode=0:0")
    run.submit([TRAIN], ["7_0"])
    assert look(run) == []
    assert run.lost
    assert keys(run.free()) == {OTHER.key}
    run.store.put(TRAIN, "done", {"metrics": {}, "files": {}})
    assert [event.kind for event in look(run)] == ["started", "ok"]
    assert not run.lost


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every job runs as task 7_0 from when it was submitted; a folder for what was submitted and cancelled."""
    tools, said = tmp_path / "bin", tmp_path / "said"
    said.mkdir()
    tools.mkdir()
    for name, text in {
        "sbatch": f"echo $* >>'{said}/sbatch'; echo 7",
        "squeue": f"[ ! -e '{said}/sbatch' ] || echo '7_0|RUNNING'",
        "scancel": f"echo $* >>'{said}/scancel'",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    for name in ("TICK", "FASTEST", "SLOWEST"):
        monkeypatch.setattr(slurm, name, 0.02)
    return said


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    return made


def test_a_results_folder_that_is_away_for_a_moment_ends_nothing(store: Store, cluster: Path) -> None:
    events = Slurm(store.root.parent).run([TRAIN], store)
    assert next(event for event in events if event.kind != "tick").kind == "started"
    aside = store.root.with_name("away")
    store.root.rename(aside)
    assert [next(events).kind for _ in range(20)] == ["tick"] * 20
    aside.rename(store.root)
    store.put(TRAIN, "done", {"metrics": {}, "files": {}})
    assert [event.kind for event in events if event.kind != "tick"] == ["ok"]
    assert not (cluster / "scancel").exists()
    assert len((cluster / "sbatch").read_text().splitlines()) == 1


def test_one_that_stays_away_ends_the_driver(store: Store, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = Slurm(store.root.parent).run([TRAIN], store)
    assert next(event for event in events if event.kind != "tick").kind == "started"
    monkeypatch.setattr(slurm, "PATIENCE", 0.2)
    store.root.rename(store.root.with_name("away"))
    with pytest.raises(FileNotFoundError):
        list(events)
    assert (cluster / "scancel").read_text() == "7_0\n"


def test_one_that_cannot_be_written_is_told_before_anything_is_submitted(store: Store, cluster: Path) -> None:
    (store.root / "slurm").write_text("no folder")
    with pytest.raises(FileExistsError):
        list(Slurm(store.root.parent).run([TRAIN], store))
    assert not (cluster / "sbatch").exists()
