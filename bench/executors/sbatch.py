"""The interface to Slurm: the batch script, job arrays and their dependencies, sbatch, squeue and scontrol.

The same script has two uses: with keys it runs one task of an array, without keys it submits all jobs
(`--print-script`). A task is one key, or several joined by `+`, short evaluations that it runs one after the other. It
then writes results/slurm/trail-<task>: a line with each key that begins, and one with key and exit code at its end.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path

from bench.executors.base import MissingDependency
from bench.planning.job import Job

# each a path or a list of paths
CARRIED = ("BENCH_PLUGINS", "BENCH_DATA", "BENCH_CACHE", "BENCH_MODEL_FILE", "PYTHONPATH")
OURS = ("job-name", "output", "array", "dependency", "kill-on-invalid-dep", "parsable", "wrap", "test-only", "wait")
MOST_TASKS = 500  # of an array; Slurm's default limit is 1001
PACKED = ("evaluate", "audit")  # kinds of short jobs that share a task: no job needs that they succeed
PACK = 300.0  # seconds that the jobs of such a task are expected to take together, unless the user says otherwise
_LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
ACTIVE = (
    "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING", "SIGNALING",
    "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT", "REVOKED",
)  # fmt: skip


class SlurmError(ValueError):
    """Slurm refused, or did not answer."""


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm for a run: options of sbatch without dashes, such as `partition=gpu`.

    `of_kind`: those of the jobs of one kind, such as evaluate, beside or in place of them; `running`: most tasks of an
    array that run at a time; `pack`: most seconds that jobs which share a task are expected to take (0: none share).
    """

    options: tuple[str, ...] = ()
    of_kind: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    running: int | None = None
    pack: float = 0.0

    def limit(self, kind: str) -> float | None:
        """The time limit of a task for jobs of a kind, in seconds; None where Slurm's own holds."""
        given = [option for option in (*self.options, *self.of_kind.get(kind, ())) if option.startswith("time=")]
        return seconds_of(given[-1].partition("=")[2]) if given else None

    def devices(self, kind: str, device: str) -> int:
        """GPUs (`device` cuda) or cores (cpu) that a job of this kind asks for; 1 where no option says how many."""
        found = 1
        for option in (*self.options, *self.of_kind.get(kind, ())):  # the last one counts, as it does for sbatch
            word, _, value = option.partition("=")
            gpus = next((part for part in value.split(",") if word == "gres" and part.startswith("gpu")), "")
            gpus = value if word in ("gpus", "gpus-per-node", "gpus-per-task") else gpus
            asked = gpus if device == "cuda" else value if word == "cpus-per-task" else ""
            if asked:
                last = asked.rpartition(":")[2]
                found = int(last) if last.isdecimal() else 1
        return found


@dataclass(frozen=True)
class Batch:
    """An array of jobs with the same dependencies: the jobs `hard` must succeed, the jobs `soft` must only end.
    `own`: options of sbatch of its kind of job; `running`: most of its tasks that run at a time; `sizes`: how many of
    the jobs each task runs (none: one)."""

    jobs: tuple[Job, ...]
    hard: tuple[str, ...] = ()
    soft: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    running: int | None = None
    sizes: tuple[int, ...] = ()

    def tasks(self) -> list[tuple[Job, ...]]:
        """The jobs of each task."""
        sizes = self.sizes or (1,) * len(self.jobs)
        return [self.jobs[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]

    def words(self) -> list[str]:
        """The tasks as arguments of the script."""
        return ["+".join(job.key for job in task) for task in self.tasks()]

    def options(self, tasks: Mapping[str, str]) -> list[str]:
        """Options of sbatch. `tasks`: the task of each submitted job by key, such as `12_0`."""
        kinds = (("afterok", self.hard), ("afterany", self.soft))
        terms = [":".join((kind, *dict.fromkeys(tasks[key] for key in keys))) for kind, keys in kinds if keys]
        # else Slurm keeps the dependents of a failed training in the queue for ever
        waits = ["--kill-on-invalid-dep=yes", f"--dependency={','.join(terms)}"] if terms else []
        array = f"--array=0-{len(self.tasks()) - 1}" + (f"%{self.running}" if self.running else "")
        return ["--parsable", array, *(f"--{option}" for option in self.own), *waits]


def batches(
    waiting: list[Job],
    submitted: Collection[str] = (),
    asked: Request = Request(),
    expected: Callable[[Job], float | None] = lambda job: None,
) -> list[Batch]:
    """The waiting jobs as arrays, each after its dependencies. Jobs neither waiting nor `submitted` have ended.

    `expected`: seconds of a job that may share a task, None for one that runs alone.
    """
    found: list[Batch] = []
    rest, unfinished = list(waiting), {*submitted, *(job.key for job in waiting)}
    while rest:
        left = {job.key for job in rest}
        ready: dict[tuple[tuple[str, ...], ...], list[Job]] = {}
        for job in rest:
            if left.isdisjoint(job.waits):
                hard = tuple(key for key in (*job.needs[:1], *job.parts) if key in unfinished)
                soft = tuple(key for key in job.needs[1:] if key in unfinished)
                ready.setdefault((hard, soft, asked.of_kind.get(job.kind, ())), []).append(job)
        if not ready:
            raise ValueError(f"jobs {', '.join(sorted(left))} wait for each other")
        for (hard, soft, own), jobs in ready.items():
            tasks = packed(jobs, asked, expected)
            for part in (tasks[cut : cut + MOST_TASKS] for cut in range(0, len(tasks), MOST_TASKS)):
                sizes = tuple(map(len, part)) if any(len(task) > 1 for task in part) else ()
                found.append(Batch(tuple(chain(*part)), hard, soft, own, asked.running, sizes))
        placed = {job.key for batch in found for job in batch.jobs}
        rest = [job for job in rest if job.key not in placed]
    return found


def packed(jobs: list[Job], asked: Request, expected: Callable[[Job], float | None]) -> list[list[Job]]:
    """Jobs with the same dependencies as tasks: those that are expected to end within `asked.pack` together share one,
    in the given order. A task is expected to take no more than half of its time limit."""
    tasks, shared, taken = list[list[Job]](), list[Job](), 0.0
    for job in jobs:
        limit = asked.limit(job.kind)
        most = asked.pack if limit is None else min(asked.pack, limit / 2)
        seconds = expected(job) if job.kind in PACKED and most else None
        if seconds is None or seconds > most:
            tasks.append([job])
            continue
        if not shared or taken + seconds > most:
            shared, taken = [], 0.0
            tasks.append(shared)
        shared.append(job)
        taken += seconds
    return tasks


def seconds_of(limit: str) -> float | None:
    """Seconds of a time limit of Slurm's: 90, 1:30, 4:00:00, 1-12, 1-12:30 or 1-12:30:00, where without days the first
    number is minutes unless there are three. None for what has no end or cannot be read, which Slurm judges."""
    found = _LIMIT.fullmatch(limit.strip())
    if found is None:
        return None
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is None and len(parts) < 3:
        parts.insert(0, 0)
    hours, minutes, seconds = (*parts, 0, 0)[:3]
    return float(int(found["days"] or 0) * 86400 + hours * 3600 + minutes * 60 + seconds)


def read_trail(path: Path) -> dict[str, int | None]:
    """Exit code of each job that a shared task has begun, None for one that has not ended; empty without the file."""
    try:
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) if len(words) > 1 else None for words in lines if words}


def name(results: Path) -> str:
    """The name of all Slurm jobs of a results folder."""
    return f"bench-{hashlib.sha256(os.fsencode(results.absolute())).hexdigest()[:8]}"


# of several keys: a failed job fails alone, what ended before a requeue is not begun again, and SIGTERM, which Slurm
# may send to this shell alone, reaches the worker; with 143 a worker leaves that has to run again
_TASK = """\
if [ $# -gt 0 ]; then
    shift "${SLURM_ARRAY_TASK_ID:-0}"
    case "$1" in *+*) ;; *) run "$1" ;; esac
    trail="$results/slurm/trail-${SLURM_ARRAY_JOB_ID:-$$}_${SLURM_ARRAY_TASK_ID:-0}"
    failed=0 stopped='' worker=''
    trap 'stopped=1; [ -z "$worker" ] || kill -TERM "$worker" 2>/dev/null' TERM
    for key in ${1//+/ }; do
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
fi""".splitlines()


def script(given: Iterable[str], results: Path, root: Path, device: str, todo: list[Batch]) -> str:
    """The batch script. `given`: options of sbatch without dashes; `todo`: the arrays that it submits without keys."""
    results = results.absolute()
    header = [f"--job-name={name(results)}", "--output=/dev/null", "--requeue", *(f"--{option}" for option in given)]
    command = shlex.join([sys.executable, "-m", "bench", "worker"])
    options = ["--data-dir", str(root.absolute()), "--device", device, "--over-is-done"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {shlex.quote(option)}" for option in header),
        "# A job of bench. `bash FILE` submits all jobs; `sbatch --array=0-1 FILE KEY KEY` is an array of two.",
        f"results={shlex.quote(str(results))}",
        "run() {",
        '    exec >>"$results/$1/log.txt" 2>&1',
        *(f"    export {key}={shlex.quote(value)}" for key, value in environment().items()),
        '    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"',
        f"    cd -- {shlex.quote(str(Path.cwd()))}",
        f'    exec {command} "$1" --results-dir "$results" {shlex.join(options)}',
        "}",
        *_TASK,
        "set -e",
        'mkdir -p "$results/slurm"',
    ]
    tasks: dict[str, str] = {}
    for number, batch in enumerate(todo):
        keys = " ".join(batch.words())
        words = " ".join(  # the dependency names variables of the script
            f'"{word}"' if word.startswith("--dependency=") else shlex.quote(word) for word in batch.options(tasks)
        )
        lines.append(f'id{number}=$(sbatch {words} "$0" {keys}); id{number}="${{id{number}%%;*}}"')
        lines.append(f'echo {keys} >"$results/slurm/$id{number}"; echo "job $id{number}: {len(batch.tasks())} tasks"')
        tasks |= {job.key: f"${{id{number}}}_{index}" for index, task in enumerate(batch.tasks()) for job in task}
    return "\n".join(lines) + "\n"


def environment() -> dict[str, str]:
    """The variables of this environment that a job needs, with absolute paths; Slurm's `--export` may pass none."""
    found = {key: os.environ[key] for key in CARRIED if os.environ.get(key)}
    return {
        key: os.pathsep.join(os.path.abspath(part) for part in value.split(os.pathsep) if part)
        for key, value in found.items()
    }


def check(option: str) -> str:
    """An option of sbatch as the script has it, without dashes. Raises ValueError for those that bench sets itself."""
    bare = option.lstrip("-")
    word = bare.partition("=")[0]
    if "\n" in option or "\r" in option or not re.fullmatch(r"[a-z][a-z0-9-]+", word):
        raise ValueError(
            f"--sbatch-option is {option!r}; expected one of sbatch's long options, such as constraint=a100"
        )
    if word in OURS:
        raise ValueError(f"--sbatch-option {word} is set by bench itself; leave it out")
    return bare


def require(tool: str) -> None:
    """Raises MissingDependency if this machine lacks the command of Slurm."""
    if not shutil.which(tool):
        raise MissingDependency(
            f"--executor slurm needs Slurm's `{tool}` on the PATH: start it on a login node of the cluster, or write "
            "the script with --print-script"
        )


def command(*words: str) -> str:
    """Output of a command of Slurm. Raises MissingDependency without Slurm, SlurmError with its error message."""
    require(words[0])
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"Slurm's {words[0]} did not answer within 2 minutes") from None
    if done.returncode:
        lines = [line.partition("error: ")[2] or line for line in done.stderr.splitlines() if line.strip()]
        raise SlurmError(f"Slurm's {words[0]} failed: {'; '.join(lines) or f'exit code {done.returncode}'}")
    return done.stdout


def queue(results: Path) -> dict[str, str]:
    """State of each task in the queue, and of those that left it recently: `12_0` -> RUNNING."""
    answer = command(
        "squeue", "--noheader", "--array", "--states=all", f"--name={name(results)}", f"--user={os.getuid()}",
        "--format=%i|%T",
    )  # fmt: skip
    return parse_queue(answer)


def parse_queue(answer: str) -> dict[str, str]:
    """Lines `12_0|RUNNING` of squeue."""
    rows = [line.strip().split("|") for line in answer.splitlines() if "|" in line]
    return {row[0]: row[1] for row in rows}


def ending(task: str) -> dict[str, str]:
    """JobState, Reason and ExitCode of a task that has ended; empty once Slurm has forgotten it."""
    try:
        return fields(command("scontrol", "--oneliner", "show", "job", task))
    except SlurmError:
        return {}


def fields(answer: str) -> dict[str, str]:
    """`JobState=FAILED Reason=NonZeroExitCode ... ExitCode=0:9` of a task."""
    return dict(re.findall(r"(?<!\S)(JobState|Reason|ExitCode)=(\S+)", answer))


def describe_ending(found: Mapping[str, str]) -> str:
    """A description of how a task ended. `found`: from `ending`."""
    if not found:
        return "it left Slurm's queue"
    state, reason = found.get("JobState", "unknown"), found.get("Reason", "None")
    code, _, number = found.get("ExitCode", "0:0").partition(":")
    parts = [f"Slurm reports {state}"]
    if reason not in ("None", "(null)", state):
        parts.append(reason)
    if number not in ("", "0"):  # above the known signals are numbers of Slurm's for failures of its daemons
        known = {str(each.value): each.name for each in signal.Signals}
        parts.append(known.get(number, f"signal {number}"))
    elif code != "0":
        parts.append(f"exit code {code}")
    return ", ".join(parts)
