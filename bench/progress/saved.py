"""What a stopped job has kept: its checkpoints, read from their headers. Torch-free."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from bench.atomic import open_regular, parse_json
from bench.planning.job import Job, TrainJob
from bench.records.store import Store
from bench.terminal import counted

LONGEST = 2**26  # bytes of a header


def saved_seconds(store: Store, job: Job) -> float:
    """Seconds of work in the checkpoints of a stopped job, which it does not repeat unless the code has changed."""
    return sum((_seconds(header) for header in _headers(store, job)), 0.0)


def kept(store: Store, job: Job) -> str:
    """What the checkpoints of a stopped job hold: `12 of 200 epochs kept`, `300 of 1000 images kept`."""
    text, done = "", 0
    for header in _headers(store, job):
        if isinstance(job, TrainJob):
            done, step = _position(header)
            text = f", and {counted(step, 'step')} of the next" if step else ""
        elif "label" in header:  # a finished block
            done += _length(header["label"])
        else:
            text = ", and the attack on the next ones so far"
    size = counted(job.epochs, "epoch") if isinstance(job, TrainJob) else counted(int(job.size), "image")
    return f"{done} of {size} kept{text}" if done or text else "nothing kept"


def _headers(store: Store, job: Job) -> list[dict[str, Any]]:
    """The headers of the checkpoints (bench.training.checkpoint): shapes of tensors by name, and `__metadata__`."""
    found = []
    for path in sorted((store.place(job.key) / "blocks").glob("*.safetensors")):
        with contextlib.suppress(OSError, ValueError), open_regular(path) as file:
            found.append(parse_json(file.read(min(int.from_bytes(file.read(8), "little"), LONGEST))))
    return [header for header in found if isinstance(header, dict)]


def _seconds(header: dict[str, Any]) -> float:
    try:
        facts = header["__metadata__"]
        return float(facts["seconds"] if "seconds" in facts else json.loads(facts["state"])["now"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return 0.0


def _position(header: dict[str, Any]) -> tuple[int, int]:
    """Completed epochs of a training, and steps of the next one."""
    try:
        progress = json.loads(header["__metadata__"]["state"])["progress"]
        return len(progress["lines"]), int(progress["step"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return 0, 0


def _length(tensor: Any) -> int:
    try:
        return int(tensor["shape"][0])
    except (ValueError, LookupError, TypeError, RecursionError):
        return 0
