"""Why a worker failed, and whether its job runs again: decisions only, without processes and files.

| what happened | what is done |
|---|---|
| it raised | nothing: it would raise again; state error |
| it died without a record | again, at most twice; then state error |
| out of memory, with others on its device | again alone, once |
| out of memory, alone, an evaluation | its passes halved, at most 3 times; then state oom (see bench.jobs.microbatch) |
| out of memory, alone, anything else | state oom: half a batch would be another training |
| the device failed (a CUDA error that stays) | again, elsewhere if possible, at most twice; then state error |
| over the time limit | state timeout |
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bench.planning.job import EvaluationJob, Job
from bench.records.record import JobError, PeakMemory, Record, Retry, State

AGAIN, HALVINGS = 2, 3
Kind = Literal["raised", "died", "oom", "device", "timeout"]
Step = Literal["give up", "again", "alone", "halve", "elsewhere"]
WORDS: dict[Step, str] = {
    "again": "it runs again",
    "alone": "it runs again alone",
    "halve": "it runs again with half the batch in each pass",
    "elsewhere": "it runs again, on another device if there is one",
}
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError", "_ArrayMemoryError", "FixedBatch")
NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
# after these the CUDA context is lost, through no fault of the job; a failed assert in a kernel is its own fault
DEVICE = (
    "CUDA error: unspecified launch failure",
    "CUDA error: an illegal memory access",
    "CUDA error: uncorrectable ECC error",
    "CUDA error: the launch timed out",
    "CUDA error: hardware error",
    "CUDA error: unknown error",
    "CUDA error: device is lost",
    "CUDA error: all CUDA-capable devices are busy",
    "CUDA error: no CUDA-capable device",
    "CUDA error: initialization error",
    "CUDA driver initialization failed",
    "No CUDA GPUs are available",
    "CUDA unknown error",
    "GPU is lost",
    "CUDNN_STATUS_INTERNAL_ERROR",
)


@dataclass(frozen=True)
class Fault:
    """Why a worker left no result. `peak`: its peak memory, if known."""

    kind: Kind
    name: str
    message: str
    peak: PeakMemory | None = None


def classify(name: str, message: str) -> Kind:
    """Kind of an exception from type name and message; used by worker and driver alike."""
    if name in OUT_OF_MEMORY or any(text in message for text in NO_MEMORY):
        return "oom"
    return "device" if any(text in message for text in DEVICE) else "raised"


def fault(
    record: Record | None, code: int | None, late: float | None, kernel: bool, peak: float | None
) -> Fault | None:
    """The fault of a job, None if it has a result.

    `code`: exit code of the worker; `late`: the time limit at which it was killed; `kernel`: whether the kernel killed
    a process for lack of memory meanwhile; `peak`: resident MB measured last.
    """
    if record is not None:
        if record.state not in ("error", "oom"):
            return None
        error = record.error or JobError("unknown", "no error stored")
        return Fault(classify(error.type, error.message), error.type, error.message, record.peak_memory_mb)
    held = PeakMemory(rss=peak)
    if late is not None:
        return Fault("timeout", "Timeout", f"killed at the time limit of {late:g} s, with all its processes", held)
    code = code or 0
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if kernel and code == -signal.SIGKILL:
        return Fault("oom", "KilledForMemory", "the kernel killed the worker for memory", held)
    return Fault("died", "WorkerDied", f"the worker died ({name}) without a record", held)


def step(what: Fault, job: Job, before: Sequence[Retry], shared: bool) -> Step:
    """What to do after a fault. `before`: the retries so far; `shared`: did other jobs run on its device?"""
    done = [entry.step for entry in before]
    if what.kind == "died":
        return "again" if done.count("again") < AGAIN else "give up"
    if what.kind == "device":
        return "elsewhere" if done.count("elsewhere") < AGAIN else "give up"
    if what.kind == "oom":
        if shared and "alone" not in done:
            return "alone"
        if what.name == "FixedBatch":
            return "give up"
        if isinstance(job, EvaluationJob) and done.count("halve") < HALVINGS:
            return "halve"
    return "give up"


def entry(what: Fault, chosen: Step) -> Retry:
    """A retry as the record of the job lists it."""
    return Retry(chosen, what.name, what.message, what.peak)


def halvings(before: Sequence[Retry]) -> int:
    """How often the passes of an evaluation were halved."""
    return sum(each.step == "halve" for each in before)


def final_record(what: Fault, before: Sequence[Retry]) -> Record:
    """The record of a job that is given up without one of its own. `before`: the retries."""
    state: State = "oom" if what.kind == "oom" else "timeout" if what.kind == "timeout" else "error"
    held = what.peak or PeakMemory()
    return Record(state, error=JobError(what.name, what.message), peak_memory_mb=held, retries=tuple(before))
