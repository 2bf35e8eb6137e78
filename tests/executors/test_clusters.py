"""What is said to a cluster, without one: the batch script, arrays and dependencies, answers read, options refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from factories import toy_job
from harness import Bench, tiny, write_plugins

from bench.executors.clusters import Cluster
from bench.executors.sbatch import (
    MOST_TASKS,
    Batch,
    Request,
    SlurmError,
    batches,
    check,
    command,
    describe_ending,
    fields,
    name,
    packed,
    parse_queue,
    read_trail,
    script,
    seconds_of,
)
from bench.planning.job import Job
from bench.records.store import Store

TRAIN, OTHER = (toy_job("train", {"seed": seed}) for seed in (0, 1))
FIRST, SECOND = (toy_job("evaluate", {"n": n}, (TRAIN.key,)) for n in (1, 2))
LAST = toy_job("evaluate", {"n": 3}, (TRAIN.key, FIRST.key, SECOND.key))
SHARDS = [toy_job("shard", {"images": [k, k + 1]}, (OTHER.key,)) for k in range(2)]
WHOLE = toy_job("evaluate", {"n": 4}, (OTHER.key,), tuple(shard.key for shard in SHARDS))
ODD = 'a b\'c "d" é $HOME `x` %j \\n #'


def test_jobs_that_wait_for_the_same_are_an_array_behind_what_they_need() -> None:
    found = batches([LAST, WHOLE, SECOND, FIRST, *SHARDS, OTHER, TRAIN])
    assert found[0] == Batch((OTHER, TRAIN))
    assert found[1] == Batch((SECOND, FIRST), hard=(TRAIN.key,))
    assert found[2] == Batch(tuple(SHARDS), hard=(OTHER.key,))
    assert found[3] == Batch((LAST,), hard=(TRAIN.key,), soft=(FIRST.key, SECOND.key))
    assert found[4] == Batch((WHOLE,), hard=(OTHER.key, *WHOLE.parts))
    assert len(found) == 5


def test_only_what_is_not_over_is_waited_for() -> None:
    assert batches([FIRST]) == [Batch((FIRST,))]  # its training stands
    assert batches([FIRST, LAST], {TRAIN.key}) == [
        Batch((FIRST,), hard=(TRAIN.key,)),
        Batch((LAST,), hard=(TRAIN.key,), soft=(FIRST.key,)),
    ]


def test_no_array_is_larger_than_a_cluster_allows() -> None:
    jobs = [toy_job("train", {"seed": seed}) for seed in range(2 * MOST_TASKS + 1)]
    found = batches(jobs)
    assert [len(batch.jobs) for batch in found] == [MOST_TASKS, MOST_TASKS, 1]
    assert [job for batch in found for job in batch.jobs] == jobs


def test_a_circle_is_refused_and_not_walked() -> None:
    lost = toy_job("evaluate", {"n": 9}, (TRAIN.key,))
    object.__setattr__(lost, "needs", (lost.key,))
    with pytest.raises(ValueError, match="wait for each other"):
        batches([lost])


def test_the_first_need_must_be_done_and_the_others_ended() -> None:
    batch = Batch((LAST, FIRST), (TRAIN.key,), (OTHER.key, SECOND.key))
    tasks = {TRAIN.key: "7_0", OTHER.key: "7_1", SECOND.key: "8_4"}
    assert batch.options(tasks) == [
        "--parsable",
        "--array=0-1",
        "--kill-on-invalid-dep=yes",
        "--dependency=afterok:7_0,afterany:7_1:8_4",
    ]
    assert Batch((TRAIN,)).options({}) == ["--parsable", "--array=0-0"]
    assert Batch((LAST,), soft=(FIRST.key,)).options({FIRST.key: "3_2"})[-1] == "--dependency=afterany:3_2"


def test_a_kind_of_job_has_resources_of_its_own_in_an_array_of_its_own() -> None:
    audit = toy_job("audit", {}, (TRAIN.key,))
    asked = Cluster(time="4:00:00", max_running=3, slurm=["evaluate.time=0:20:00", "evaluate.mem=2G"]).request()
    found = batches([TRAIN, FIRST, SECOND, audit], (), asked)
    own = ("time=0:20:00", "mem=2G")
    assert found == [
        Batch((TRAIN,), running=3),
        Batch((FIRST, SECOND), hard=(TRAIN.key,), own=own, running=3),
        Batch((audit,), hard=(TRAIN.key,), running=3),
    ]
    assert found[1].options({TRAIN.key: "7_0"})[:4] == ["--parsable", "--array=0-1%3", "--time=0:20:00", "--mem=2G"]
    text = script(asked.options, Path("results"), Path("data"), "cpu", found)
    assert "#SBATCH --time=4:00:00\n" in text
    assert "id1=$(sbatch --parsable --array=0-1%3 --time=0:20:00 --mem=2G --kill-on-invalid-dep=yes " in text
    assert [len(batch.jobs) for batch in batches([TRAIN, FIRST, SECOND, audit])] == [1, 3]


def test_values_of_options_are_quoted_in_the_script(bare: Path) -> None:
    asked = Cluster(slurm=["evaluate.comment=a b; $HOME"]).request()
    text = script(asked.options, Path("results"), Path("data"), "cpu", batches([FIRST], (), asked))
    assert "'--comment=a b; $HOME'" in text


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with an odd name to work in, and none of our variables."""
    for variable in ("BENCH_PLUGINS", "BENCH_DATA", "BENCH_CACHE", "BENCH_MODEL_FILE", "PYTHONPATH"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / ODD
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_script_is_this_one(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/opt/a b/python")
    monkeypatch.setenv("BENCH_PLUGINS", os.pathsep.join(["mine.py", "/there/b.py"]))
    monkeypatch.chdir("/")
    jobs = batches([TRAIN, FIRST, SECOND, LAST])
    text = script(["partition=gpu", "comment=a b"], Path("/shared/my results"), Path("/data"), "cuda", jobs)
    expected = f"""\
#!/bin/bash
#SBATCH --job-name={name(Path("/shared/my results"))}
#SBATCH --output=/dev/null
#SBATCH --requeue
#SBATCH --partition=gpu
#SBATCH '--comment=a b'
# A job of bench. `bash FILE` submits all jobs; `sbatch --array=0-1 FILE KEY KEY` is an array of two.
results='/shared/my results'
run() {{
    exec >>"$results/$1/log.txt" 2>&1
    export BENCH_PLUGINS=/mine.py:/there/b.py
    export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
    cd -- /
    exec '/opt/a b/python' -m bench worker "$1" --results-dir "$results" --data-dir /data --device cuda --over-is-done
}}
if [ $# -gt 0 ]; then
    shift "${{SLURM_ARRAY_TASK_ID:-0}}"
    case "$1" in *+*) ;; *) run "$1" ;; esac
    trail="$results/slurm/trail-${{SLURM_ARRAY_JOB_ID:-$$}}_${{SLURM_ARRAY_TASK_ID:-0}}"
    failed=0 stopped='' worker=''
    trap 'stopped=1; [ -z "$worker" ] || kill -TERM "$worker" 2>/dev/null' TERM
    for key in ${{1//+/ }}; do
        grep -qs "^$key [0-9]" "$trail" && continue
        [ -z "$stopped" ] || exit 143
        echo "$key" >>"$trail"
        (run "$key") &
        worker=$!
        wait "$worker"
        code=$?
        while kill -0 "$worker" 2>/dev/null; do
            wait "$worker"
            code=$?
        done
        [ "$code" != 143 ] || exit 143
        echo "$key $code" >>"$trail"
        [ "$code" = 0 ] || failed=$code
    done
    exit "$failed"
fi
set -e
mkdir -p "$results/slurm"
id0=$(sbatch --parsable --array=0-0 "$0" {TRAIN.key}); id0="${{id0%%;*}}"
echo {TRAIN.key} >"$results/slurm/$id0"; echo "job $id0: 1 tasks"
id1=$(sbatch --parsable --array=0-1 --kill-on-invalid-dep=yes "--dependency=afterok:${{id0}}_0" "$0" \
{FIRST.key} {SECOND.key}); id1="${{id1%%;*}}"
echo {FIRST.key} {SECOND.key} >"$results/slurm/$id1"; echo "job $id1: 2 tasks"
id2=$(sbatch --parsable --array=0-0 --kill-on-invalid-dep=yes \
"--dependency=afterok:${{id0}}_0,afterany:${{id1}}_0:${{id1}}_1" "$0" {LAST.key}); id2="${{id2%%;*}}"
echo {LAST.key} >"$results/slurm/$id2"; echo "job $id2: 1 tasks"
"""
    assert text == expected


def test_a_task_runs_its_own_key_whatever_the_paths_are_called(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = bare / "python"
    tool.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "$BENCH_PLUGINS" "$OMP_NUM_THREADS" "$PWD"\n')
    tool.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tool))
    monkeypatch.setenv("BENCH_PLUGINS", f"{ODD}.py")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    results = bare / "results"
    for job in (FIRST, SECOND):
        (results / job.key).mkdir(parents=True)
    file = bare / "job.sh"
    file.write_text(script([], Path("results"), Path(ODD), "cpu", []))
    subprocess.run(["bash", "-n", file], check=True)
    subprocess.run(
        ["bash", file, FIRST.key, SECOND.key], check=True, cwd="/", env={**os.environ, "SLURM_ARRAY_TASK_ID": "1"}
    )
    assert not (results / FIRST.key / "log.txt").exists()
    assert (results / SECOND.key / "log.txt").read_text().splitlines() == [
        *("-m", "bench", "worker", SECOND.key, "--results-dir", str(results)),
        *("--data-dir", str(bare / ODD), "--device", "cpu", "--over-is-done", str(bare / f"{ODD}.py"), "3", str(bare)),
    ]


def shared(jobs: list[Job], seconds: dict[str, float], **asked: Any) -> list[list[Job]]:
    """The tasks of jobs of known length, under the options of a run."""
    return packed(jobs, Cluster(**asked).request(), lambda job: seconds.get(job.key))


def test_short_evaluations_share_a_task_up_to_a_time() -> None:
    jobs = [toy_job("evaluate", {"n": n}, (TRAIN.key,)) for n in range(1, 7)]
    audit, shard, long, unknown = toy_job("audit", {}, (TRAIN.key,)), SHARDS[0], jobs[4], jobs[5]
    seconds = {job.key: 100.0 for job in [*jobs[:4], audit, shard]} | {long.key: 301.0}
    given = [jobs[0], long, jobs[1], shard, jobs[2], unknown, TRAIN, audit, jobs[3]]
    alone = [[long], [shard], [unknown], [TRAIN]]  # too long, others need its success, unknown, not an evaluation
    assert [task for task in shared(given, seconds) if task in alone] == alone
    assert [task for task in shared(given, seconds) if task not in alone] == [jobs[:3], [audit, jobs[3]]]  # 5 minutes
    assert shared(given, seconds, slurm_pack="0") == [[job] for job in given]
    assert shared(jobs[:4], seconds, slurm_pack="400s") == [jobs[:4]]
    assert shared(jobs[:4], seconds, slurm_pack="90s") == [[job] for job in jobs[:4]]
    # no more than half of the time that is asked for, so that one which takes longer than expected ends no other
    assert shared(jobs[:4], seconds, time="0:08:00") == [jobs[:2], jobs[2:4]]
    assert shared(jobs[:4], seconds, time="0:08:00", slurm=["evaluate.time=1-0"]) == [jobs[:3], [jobs[3]]]
    assert shared(jobs[:4], seconds, time="0:08:00", slurm=["train.time=1-0"]) == [jobs[:2], jobs[2:4]]


def test_the_jobs_of_a_shared_task_have_its_number() -> None:
    found = batches([TRAIN, FIRST, SECOND, LAST], (), Request(pack=60.0), lambda job: 20.0)
    assert [batch.words() for batch in found] == [[TRAIN.key], [f"{FIRST.key}+{SECOND.key}"], [LAST.key]]
    assert found[1].options({TRAIN.key: "1_0"})[1] == "--array=0-0"
    assert "--dependency=afterok:1_0,afterany:2_0" in found[2].options(
        {TRAIN.key: "1_0", FIRST.key: "2_0", SECOND.key: "2_0"}
    )
    text = script([], Path("results"), Path("data"), "cpu", found)
    assert f"echo {FIRST.key}+{SECOND.key} >" in text
    assert '"--dependency=afterok:${id0}_0,afterany:${id1}_0"' in text
    many = [toy_job("evaluate", {"n": n}, (TRAIN.key,)) for n in range(1, 4 * MOST_TASKS + 1)]
    parts = batches(many, (), Request(pack=60.0), lambda job: 20.0)
    assert [len(batch.tasks()) for batch in parts] == [MOST_TASKS, -(-len(many) // 3) - MOST_TASKS]
    assert [job for batch in parts for task in batch.tasks() for job in task] == many


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("1:30", 90), ("4:00:00", 14400), ("1-12", 129600), ("1-12:30", 131400), ("1-0:0:5", 86405),
        ("UNLIMITED", None), ("4h", None), ("", None), ("1:2:3:4", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: float | None) -> None:
    assert seconds_of(text) == seconds


def shared_task(bare: Path, monkeypatch: pytest.MonkeyPatch, worker: str) -> list[object]:
    """The command of a task of three keys, where this shell script stands for `python -m bench worker KEY`."""
    tool = bare / "python"
    tool.write_text(f"#!/bin/bash\nkey=$4 folder=$6\n{worker}\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tool))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    (bare / "results" / "slurm").mkdir(parents=True)
    for job in (FIRST, SECOND, LAST):
        (bare / "results" / job.key).mkdir()
    (bare / "job.sh").write_text(script([], Path("results"), Path(ODD), "cpu", []))
    return ["bash", bare / "job.sh", TRAIN.key, f"{FIRST.key}+{SECOND.key}+{LAST.key}", OTHER.key]


def test_a_failed_job_of_a_shared_task_fails_alone(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shared_task(bare, monkeypatch, f'echo "$key"; [ "$key" != {SECOND.key} ] || kill -9 $$')
    trail = bare / "results" / "slurm" / "trail-7_1"
    assert subprocess.run(words, cwd="/").returncode == 137
    assert read_trail(trail) == {FIRST.key: 0, SECOND.key: 137, LAST.key: 0}
    for job in (FIRST, SECOND, LAST):
        assert (bare / "results" / job.key / "log.txt").read_text() == f"{job.key}\n"
    assert not (bare / "results" / TRAIN.key).exists()
    subprocess.run(words, cwd="/")  # requeued after its end: nothing is begun again
    assert (bare / "results" / LAST.key / "log.txt").read_text() == f"{LAST.key}\n"


def test_a_stopped_shared_task_continues_where_it_was(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps = f"if [ $key = {SECOND.key} ] && [ ! -e again ]; then trap 'echo kept; exit 143' TERM; touch up; "
    words = shared_task(bare, monkeypatch, sleeps + "while :; do sleep 0.05; done; fi; echo done")
    task = subprocess.Popen(words, cwd="/")
    began = time.monotonic()
    while not (bare / "up").exists() and time.monotonic() - began < 60:
        time.sleep(0.05)
    task.send_signal(signal.SIGTERM)  # to the shell alone
    assert task.wait(timeout=60) == 143
    trail = bare / "results" / "slurm" / "trail-7_1"
    assert read_trail(trail) == {FIRST.key: 0, SECOND.key: None}
    (bare / "again").touch()
    assert subprocess.run(words, cwd="/").returncode == 0
    assert read_trail(trail) == {FIRST.key: 0, SECOND.key: 0, LAST.key: 0}
    logs = [(bare / "results" / job.key / "log.txt").read_text() for job in (FIRST, SECOND, LAST)]
    assert logs == ["done\n", "kept\ndone\n", "done\n"]


def test_each_results_folder_has_a_name_of_its_own_in_the_queue(bare: Path) -> None:
    assert name(Path("results")) == name(bare / "results") != name(Path("/results"))


def test_answers_are_read() -> None:
    assert parse_queue("12_0|RUNNING\n  12_1|PENDING\n\nslurm is slow\n") == {"12_0": "RUNNING", "12_1": "PENDING"}
    text = "JobId=3 JobName=JobState=no JobState={} Reason={} Dependency=(null) ExitCode={} DerivedExitCode=9:9 End=x"
    for answer, description in (
        (("OUT_OF_MEMORY", "OutOfMemory", "0:125"), "Slurm reports OUT_OF_MEMORY, OutOfMemory, signal 125"),
        (("TIMEOUT", "TimeLimit", "0:15"), "Slurm reports TIMEOUT, TimeLimit, SIGTERM"),
        (("FAILED", "NonZeroExitCode", "2:0"), "Slurm reports FAILED, NonZeroExitCode, exit code 2"),
        (("NODE_FAIL", "None", "0:0"), "Slurm reports NODE_FAIL"),
    ):
        assert describe_ending(fields(text.format(*answer))) == description
    assert describe_ending(fields("nothing")) == "it left Slurm's queue"


def test_slurm_s_own_words_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "sbatch"
    tool.write_text("#!/bin/sh\necho 'sbatch: error: bad thing' >&2\necho 'sbatch: worse' >&2\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SlurmError, match=r"^Slurm's sbatch failed: bad thing; sbatch: worse$"):
        command("sbatch")


@pytest.mark.parametrize("said", ["constraint=a100", "--constraint=a100", "exclusive", "comment=a b"])
def test_options_of_sbatch_pass(said: str) -> None:
    assert check(said) == said.removeprefix("--")


@pytest.mark.parametrize("said", ["", "-p", "a b=c", "partition=x\n#SBATCH --uid=0", "array=0-9", "--output=x", "wrap"])
def test_what_is_no_option_or_ours_is_refused(said: str) -> None:
    with pytest.raises(ValueError, match="--sbatch-option"):
        check(said)


def test_resources_become_options_of_sbatch() -> None:
    cluster = Cluster("gpu", "lab", "1:00:00", None, 2, 4, "16G", sbatch_option=["constraint=a100"])
    assert cluster.request().options == (
        *("partition=gpu", "account=lab", "time=1:00:00", "gres=gpu:2", "cpus-per-task=4", "mem=16G"),
        "constraint=a100",
    )
    assert Cluster().request().options == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition", "gpu"], "--partition needs --executor slurm; the executor is 'local'"),
        (["--num-gpus", 0.5, "--executor", "slurm"], "--num-gpus needs --executor ray; the executor is 'slurm'"),
        (["--print-script"], "--print-script needs --executor slurm"),
        (["--executor", "slurm", "--workers", 2], "--workers applies to this machine only"),
        (["--executor", "ray", "--gpus", 0], "--gpus applies to this machine only"),
        (["--executor", "debug", "--time-limit", "2h"], "--time-limit kills worker processes"),
        (["--device", "cpu", "--gpus", 0], "--gpus and --device cpu contradict each other"),
        (
            ["--executor", "slurm", "--gres", "gpu:1", "--gpus-per-job", 1],
            "--gres and --gpus-per-job set the same option",
        ),
        (["--executor", "slurm", "--max-jobs", 1, "--detach"], "--max-jobs needs a driver that waits"),
        (["--slurm-pack", "5m"], "--slurm-pack needs --executor slurm; the executor is 'local'"),
        (
            ["--executor", "slurm", "--slurm-pack", "soon"],
            "--slurm-pack: 'soon' is not a duration; expected a number with a unit, such as 90s, 15m or 2h; 0 for one",
        ),
        (["--max-running", 2], "--max-running needs --executor slurm; the executor is 'local'"),
        (["--executor", "slurm", "--slurm", "attack.time=1"], "--slurm is 'attack.time=1'; expected KIND.OPTION=VALUE"),
        (["--executor", "slurm", "--slurm", "train.array=0-1"], "--sbatch-option array is set by bench itself"),
        (["--executor", "pbs"], "--executor is 'pbs'; expected local, debug, slurm or ray"),
        (["--executor", "slurm", "--print-script", "--partition", "a\nb"], "--sbatch-option is 'partition=a"),
    ],
)
def test_options_that_would_be_ignored_are_refused(bench: Bench, options: list[object], message: str) -> None:
    done = bench(*tiny(*options, defense="standard", attack="clean"))
    assert done.code == 2
    assert done.err.startswith(f"error: {message}")
    assert done.err.count("\n") == 1
    assert not Path("results").exists()


@pytest.mark.parametrize(("executor", "message"), [("slurm", "`sbatch` on the PATH"), ("ray", "pip install")])
def test_an_absent_engine_is_one_line(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, executor: str, message: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setitem(sys.modules, "ray", None)
    done = bench(*tiny("--executor", executor, defense="standard", attack="clean"))
    assert done.code == 3
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not Path("results").exists()


def test_a_printed_script_holds_every_job_once(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = write_plugins(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    options = ["--executor", "slurm", "--print-script", "--gpus-per-job", 1, "--device", "auto"]
    done = bench(*tiny(*options, *plugins))
    assert done.code == 0
    file = tmp_path / "job.sh"
    file.write_text(done.out)
    subprocess.run(["bash", "-n", file], check=True)
    store = Store(tmp_path / "results")
    assert len(store.jobs()) == 3
    for key in store.keys():
        assert done.out.count(key) == 2  # submitted, and written down
    assert "--device cuda" in done.out
    assert "#SBATCH --gres=gpu:1" in done.out
    assert str(tmp_path / "wobble.py") in done.out
