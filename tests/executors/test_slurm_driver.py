"""What the Slurm driver makes of Slurm's answers, without a cluster: its commands are scripts with set answers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import toy_job

from bench.executors import driver, slurm
from bench.executors.base import Event
from bench.executors.driver import drive
from bench.executors.sbatch import Request
from bench.executors.slurm import Slurm
from bench.jobs.attempt import tried
from bench.planning.job import Job
from bench.records.leases import claim, holder_of
from bench.records.record import JobError, Record
from bench.records.runtime_estimate import Estimate
from bench.records.store import Store

TRAIN, OTHER = (toy_job("train", {"seed": seed}) for seed in (0, 1))
EVALUATE, WORST = (toy_job("evaluate", {"n": n}, (TRAIN.key,)) for n in (1, 2))
LAST = toy_job("evaluate", {"n": 3}, (OTHER.key, WORST.key))
THIRD = toy_job("evaluate", {"n": 4}, (TRAIN.key,))
JOBS = [TRAIN, OTHER, EVALUATE, WORST, LAST]
EMPTY: dict[str, Any] = {"metrics": {}, "files": {}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "results")
    made.prepare()
    for job in JOBS:
        made.add(job)
    return made


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands: `states` is what squeue answers, `answer` what scontrol does, `submitted` what sbatch was told;
    each array has the next number. Nobody waits for records that may be on their way."""
    tools, folder = tmp_path / "bin", tmp_path / "slurm"
    tools.mkdir()
    folder.mkdir()
    (folder / "states").touch()
    for name, text in {
        "sbatch": f"echo $* >>'{folder}/submitted'; wc -l <'{folder}/submitted'",
        "squeue": f"cat '{folder}/states'",
        "scontrol": f"cat '{folder}/answer'",
        "scancel": f"echo $* >>'{folder}/canceled'",
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    for name in ("FASTEST", "SLOWEST"):
        monkeypatch.setattr(slurm, name, 0.0)
    monkeypatch.setattr(driver, "TICK", 0.0)
    monkeypatch.setattr(slurm, "GRACE", -1.0)
    return folder


class Run:
    """A run whose rounds a test makes one by one."""

    def __init__(self, store: Store, jobs: list[Job], folder: Path, **how: Any) -> None:
        self.store, self.folder, self.backend = store, folder, Slurm(Path(), **how)
        self._events = drive(self.backend, jobs, store)

    def round(self, state: str | None = None) -> list[Event]:
        """The events of one more round, with these states of all tasks."""
        if state is not None:
            (self.folder / "states").write_text("".join(f"{each.number}|{state}\n" for each in self.tasks.values()))
        found = []
        for event in self._events:
            if event.kind == "tick":
                break
            found.append(event)
        return found

    @property
    def tasks(self) -> dict[str, slurm.Task]:
        return self.backend.tasks

    def submitted(self) -> list[set[str]]:
        """The keys of each array so far."""
        path = self.folder / "submitted"
        lines = path.read_text().splitlines() if path.exists() else []
        return [{word for word in line.split() if len(word) == 12 and "/" not in word} for line in lines]


@pytest.fixture
def run(store: Store, tools: Path) -> Callable[..., Run]:
    return lambda *jobs, **how: Run(store, list(jobs), tools, **how)


def keys(*jobs: Job) -> set[str]:
    return {job.key for job in jobs}


def test_all_jobs_are_submitted_at_once_with_their_dependencies(run: Callable[..., Run]) -> None:
    made = run(*JOBS)
    assert made.round() == []
    assert made.submitted() == [keys(TRAIN, OTHER), keys(EVALUATE, WORST), keys(LAST)]
    lines = (made.folder / "submitted").read_text().splitlines()
    assert "--dependency" not in lines[0]
    assert "--dependency=afterok:1_0 " in lines[1]
    assert "--dependency=afterok:1_1,afterany:2_1 " in lines[2]


def test_what_waits_for_a_job_that_another_process_runs_is_not_submitted(run: Callable[..., Run], store: Store) -> None:
    theirs = claim(store, TRAIN.key)
    assert theirs is not None
    made = run(*JOBS)
    made.round()
    assert made.submitted() == [keys(OTHER)]  # LAST waits for WORST, which waits for TRAIN
    made.round("PENDING")
    assert len(made.submitted()) == 1
    theirs.release()
    made.round("PENDING")
    made.round("PENDING")
    assert made.submitted()[1:] == [keys(TRAIN), keys(EVALUATE, WORST), keys(LAST)]


def test_a_job_is_claimed_before_it_is_submitted_and_left_to_its_worker(run: Callable[..., Run], store: Store) -> None:
    theirs = claim(store, TRAIN.key)
    assert theirs is not None
    store.put(OTHER, Record("error", error=JobError("ValueError", "before")))
    made = run(TRAIN, OTHER)
    assert made.round() == []
    assert made.submitted() == [keys(OTHER)]
    assert store.record(OTHER.key) is None  # a later command tries it again
    mine = claim(store, OTHER.key)
    assert mine is not None
    mine.release()
    store.put(TRAIN, Record("done"))
    theirs.release()
    found = made.round("PENDING") + made.round("PENDING")
    assert found == [Event("skipped", TRAIN, "done by another run")]
    assert len(made.submitted()) == 1


def test_what_could_not_be_claimed_is_held_by_nobody(
    run: Callable[..., Run], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(TRAIN, Record("error", error=JobError("ValueError", "before")))
    made, again = run(TRAIN), run(TRAIN)

    def away(*paths: object, **how: object) -> None:
        raise OSError(errno.EIO, "away")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", away)
        with pytest.raises(OSError, match="away"):
            made.round()
    assert holder_of(store, TRAIN.key) is None
    assert again.round() == []
    assert store.record(TRAIN.key) is None  # removed now, which the first try had not come to
    assert again.submitted() == [keys(TRAIN)]


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
    run: Callable[..., Run], store: Store, tools: Path, answer: str, mine: bool, again: bool
) -> None:
    if not mine:
        run(TRAIN, detach=True).round()
        (tools / "states").write_text("1_0|PENDING\n")
    made = run(TRAIN)
    made.round()
    assert [task.mine for task in made.tasks.values()] == [mine]
    assert len(made.submitted()) == 1
    (tools / "answer").write_text(answer)
    (tools / "states").write_text("")
    assert [event.kind for event in made.round()] == ([] if again else ["started", "error"])
    record = store.record(TRAIN.key)
    assert (record is None) == again
    assert record is None or (record.state, record.error.type) == ("error", "WorkerDied")
    made.round()
    assert len(made.submitted()) == 1 + again


def test_a_job_that_runs_elsewhere_is_waited_for(run: Callable[..., Run], store: Store, tools: Path) -> None:
    (tools / "answer").write_text("JobState=NODE_FAIL Reason=None ExitCode=0:5")
    made = run(TRAIN)
    made.round()
    theirs = claim(store, TRAIN.key)
    assert theirs is not None
    assert [made.round(), made.round()] == [[], []]
    assert made.tasks == {}
    assert len(made.submitted()) == 1
    theirs.release()
    made.round()
    assert len(made.submitted()) == 2


def test_a_record_that_came_before_its_task_began_is_another_run_s(run: Callable[..., Run], store: Store) -> None:
    made = run(TRAIN, OTHER)
    made.round()
    (made.folder / "states").write_text("1_0|PENDING\n1_1|RUNNING\n")
    assert made.round() == [Event("started", OTHER)]
    for job in (TRAIN, OTHER):
        store.put(job, Record("done"))
    assert made.round("PENDING") == [Event("skipped", TRAIN, "done by another run"), Event("ok", OTHER)]


@pytest.mark.parametrize(("job", "times", "state"), [(EVALUATE, 3, "oom"), (TRAIN, 0, "oom")])
def test_killed_for_memory_an_evaluation_is_submitted_again_with_half_the_batch(
    run: Callable[..., Run], store: Store, tools: Path, job: Job, times: int, state: str
) -> None:
    (tools / "answer").write_text("JobState=OUT_OF_MEMORY Reason=OutOfMemory ExitCode=0:125")
    made = run(job)
    made.round()
    for number in range(times):
        assert [event.kind for event in made.round("")] == ["retried"]
        assert [entry.step for entry in tried(store, job.key)] == ["halve"] * (number + 1)
        made.round()
        assert len(made.submitted()) == number + 2
    assert made.round("")[-1].kind == "error"
    record = store.record(job.key)
    assert record is not None
    assert record.state == state
    assert record.error.type == "KilledForMemory"
    assert "OUT_OF_MEMORY" in record.error.message
    assert len(record.retries) == times
    assert tried(store, job.key) == []


def test_over_the_time_limit_is_a_state_of_its_own(run: Callable[..., Run], store: Store, tools: Path) -> None:
    (tools / "answer").write_text("JobState=TIMEOUT Reason=TimeLimit ExitCode=0:15")
    made = run(EVALUATE)
    made.round()
    assert made.round()[-1].kind == "error"
    assert store.record(EVALUATE.key).state == "timeout"


def test_a_controller_that_is_away_ends_nothing(run: Callable[..., Run], tools: Path) -> None:
    made = run(TRAIN)
    made.round()
    (tools.parent / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    assert [made.round(), made.round()] == [[], []]
    assert list(made.tasks) == [TRAIN.key]
    assert not (tools / "cancelled").exists()


def test_a_record_may_come_late(
    run: Callable[..., Run], store: Store, tools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "GRACE", 60.0)
    (tools / "answer").write_text("JobState=COMPLETED Reason=None ExitCode=0:0")
    made = run(TRAIN, EVALUATE, max_jobs=1)
    made.round()
    assert made.round() == []
    assert made.tasks[TRAIN.key].lost
    made.backend.max_jobs = 2  # there is room for the evaluation, but its training is lost
    assert made.round() == []
    assert made.submitted() == [keys(TRAIN)]
    store.put(TRAIN, Record("done"))
    assert [event.kind for event in made.round()] == ["started", "ok"]
    made.round()
    assert made.submitted() == [keys(TRAIN), keys(EVALUATE)]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every job runs as task 7_0 from when it was submitted; a folder for what was submitted and canceled."""
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
    for name in ("FASTEST", "SLOWEST"):
        monkeypatch.setattr(slurm, name, 0.02)
    monkeypatch.setattr(driver, "TICK", 0.02)
    return said


def test_a_results_folder_that_is_away_for_a_moment_ends_nothing(store: Store, cluster: Path) -> None:
    events = drive(Slurm(store.root.parent), [TRAIN], store)
    assert next(event for event in events if event.kind != "tick").kind == "started"
    aside = store.root.with_name("away")
    store.root.rename(aside)
    assert [next(events).kind for _ in range(20)] == ["tick"] * 20
    aside.rename(store.root)
    store.put(TRAIN, Record("done"))
    assert [event.kind for event in events if event.kind != "tick"] == ["ok"]
    assert not (cluster / "scancel").exists()
    assert len((cluster / "sbatch").read_text().splitlines()) == 1


def test_one_that_stays_away_ends_the_driver(store: Store, cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = drive(Slurm(store.root.parent), [TRAIN], store)
    assert next(event for event in events if event.kind != "tick").kind == "started"
    monkeypatch.setattr(slurm, "PATIENCE", 0.2)
    store.root.rename(store.root.with_name("away"))
    with pytest.raises(FileNotFoundError):
        list(events)
    assert (cluster / "scancel").read_text() == "7_0\n"


def test_one_that_cannot_be_written_is_told_before_anything_is_submitted(store: Store, cluster: Path) -> None:
    (store.root / "slurm").write_text("no folder")
    with pytest.raises(FileExistsError):
        list(drive(Slurm(store.root.parent), [TRAIN], store))
    assert not (cluster / "sbatch").exists()


def twenty_seconds(job: Job, trained: Job) -> Estimate:
    """A cost model."""
    return Estimate(20.0, 20.0, 20.0, (), 0)


def sharing(run: Callable[..., Run], store: Store, **how: Any) -> Run:
    """A run with three evaluations in one task, whose training has ended."""
    store.add(THIRD)
    store.put(TRAIN, Record("done", files={}))
    return run(TRAIN, EVALUATE, WORST, THIRD, asked=Request(pack=60.0), cost_model=twenty_seconds, **how)


def trail(made: Run, *lines: str) -> None:
    (made.store.root / "slurm" / f"trail-{made.tasks[THIRD.key].number}").write_text("".join(f"{x}\n" for x in lines))


def test_each_job_of_a_shared_task_starts_and_ends_by_itself(run: Callable[..., Run], store: Store) -> None:
    made = sharing(run, store)
    made.round()
    assert [line.split()[-1] for line in (made.folder / "submitted").read_text().splitlines()] == [
        f"{EVALUATE.key}+{WORST.key}+{THIRD.key}"
    ]
    assert {task.number for task in made.tasks.values()} == {"1_0"}
    trail(made, EVALUATE.key)
    assert [(event.kind, event.job) for event in made.round("RUNNING")] == [("started", EVALUATE)]
    store.put(EVALUATE, Record("error", error=JobError("ValueError", "broken on purpose")))
    trail(made, EVALUATE.key, f"{EVALUATE.key} 1", WORST.key)
    found = [(event.kind, event.job) for event in made.round("RUNNING")]
    assert found == [("started", WORST), ("error", EVALUATE)]
    store.put(WORST, Record("done", files={}))
    assert [(event.kind, event.job) for event in made.round("RUNNING")] == [("ok", WORST)]
    made.backend.close()
    assert (made.folder / "canceled").read_text() == "1_0\n"


@pytest.mark.parametrize("state", ["TIMEOUT", "NODE_FAIL", "CANCELLED"])
def test_what_had_not_begun_in_a_shared_task_is_submitted_again(
    run: Callable[..., Run], store: Store, state: str
) -> None:
    made = sharing(run, store)
    made.round()
    store.put(EVALUATE, Record("done", files={}))
    trail(made, EVALUATE.key, f"{EVALUATE.key} 0", WORST.key)
    (made.folder / "answer").write_text(f"JobState={state} Reason=None ExitCode=0:15\n")
    ends = {event.job.key: event for event in made.round(state) + made.round() if event.job}
    assert ends[EVALUATE.key].kind == "ok"
    assert ends[WORST.key].kind == "error"
    assert f"Slurm reports {state}" in ends[WORST.key].message
    if state == "CANCELLED":  # by the user, who does not want it again
        assert ends[THIRD.key].kind == "error"
    else:
        assert THIRD.key not in ends
        made.round()
        assert made.submitted()[-1] == keys(THIRD)
    made.backend.close()


def test_a_job_that_failed_before_shares_no_task(run: Callable[..., Run], store: Store) -> None:
    made = sharing(run, store)
    made.round()
    trail(made, EVALUATE.key)
    (made.folder / "answer").write_text("JobState=OUT_OF_MEMORY Reason=None ExitCode=0:9\n")
    assert ("retried", EVALUATE) in [(event.kind, event.job) for event in made.round("OUT_OF_MEMORY")]
    made.round()
    words = [line.split()[-1] for line in (made.folder / "submitted").read_text().splitlines()[1:]]
    words += [line.split()[-2] for line in (made.folder / "submitted").read_text().splitlines()[1:]]
    assert {word for word in words if "/" not in word} == {EVALUATE.key, f"{WORST.key}+{THIRD.key}"}
    assert len(tried(store, EVALUATE.key)) == 1
    made.backend.close()


def test_the_end_of_one_job_of_a_shared_task_cancels_no_other(run: Callable[..., Run], store: Store) -> None:
    made = sharing(run, store)
    made.round()
    for job in (EVALUATE, WORST):
        made.backend.cancel(made.tasks[job.key])
        assert not (made.folder / "canceled").exists()
    made.backend.cancel(made.tasks[THIRD.key])
    assert (made.folder / "canceled").read_text() == "1_0\n"


def test_a_shared_task_of_another_command_is_followed(run: Callable[..., Run], store: Store) -> None:
    first = sharing(run, store, detach=True)
    first.round()
    store.put(EVALUATE, Record("error", error=JobError("ValueError", "broken on purpose")))
    trail(first, EVALUATE.key, f"{EVALUATE.key} 1", WORST.key)
    (first.folder / "states").write_text("1_0|RUNNING\n")
    again = run(TRAIN, EVALUATE, WORST, THIRD, asked=Request(pack=60.0), cost_model=twenty_seconds)
    again.round()
    assert {key: task.number for key, task in again.tasks.items()} == {
        EVALUATE.key: "2_0",  # it failed there: once more
        WORST.key: "1_0",
        THIRD.key: "1_0",
    }
    assert again.submitted()[1:] == [keys(EVALUATE)]
