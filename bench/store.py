"""results/ on disk <-> records. One folder a job; record.json is written last, by rename, so half-done is not done.

results/<key>/{job.json, log.txt, train.jsonl, progress.json, weights-{last,best}.safetensors,
adversarial.safetensors, samples.npz, record.json}. The record carries checksums of the files beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import IO, Any

from bench.job import SCHEMA, Job

IMAGES, SAMPLES = "adversarial.safetensors", "samples.npz"
SHARED = "shared"  # while a job runs: the most jobs that were on its device at a time
KEY = re.compile(r"[0-9a-f]{12}")
FINISHED = ("done", "diverged", "unsupported")  # states that the same command does not try again


class Store:
    """A results folder. Readers need nothing but read access; every write is atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Create the folder and prove that it can be written. Raises OSError in one line."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise OSError(f"cannot write results folder {self.root}: {error.strerror}; choose --results-dir") from None

    def folder(self, key: str) -> Path:
        """The folder of a job. Raises ValueError unless the key is 12 hexadecimal digits (it becomes a path)."""
        if not KEY.fullmatch(key):
            raise ValueError(f"'{key}' is no job key; expected 12 hexadecimal digits")
        folder = self.root / key
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link; job folders must be real ones")
        return folder

    def keys(self) -> list[str]:
        """Every job there is a folder for, sorted."""
        folders = self.root.iterdir() if self.root.is_dir() else []
        return sorted(p.name for p in folders if KEY.fullmatch(p.name) and p.is_dir() and not p.is_symlink())

    def add(self, job: Job) -> None:
        """Write down what a job is, once (again where the file is damaged, or names other shards)."""
        folder = self.folder(job.key)
        folder.mkdir(exist_ok=True)
        try:
            known = self.job(job.key) == job
        except (LookupError, ValueError):
            known = False
        if not known:
            write_json(folder / "job.json", job.to_json())

    def job(self, key: str) -> Job:
        """The job of a key. Raises LookupError where there is none, ValueError where job.json is damaged."""
        path = self.folder(key) / "job.json"
        if not path.is_file():
            raise LookupError(f"no job {key} in {self.root}")
        try:
            job = Job.from_json(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); `bench run` writes it again") from None
        if job.key != key:
            raise ValueError(f"{path} holds job {job.key}; `bench run` writes it again")
        return job

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a job that ended, whatever its state; None while there is none or it is damaged."""
        path = self.folder(key) / "record.json"
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        if not isinstance(record, dict) or record.get("schema") != SCHEMA or record.get("key") != key:
            return None
        return record if record.get("checksum") == _checksum(record) else None

    def done(self, key: str) -> bool:
        """Is there a complete record that stands (errors do not: they are stored for reading and tried again)?"""
        record = self.record(key)
        return record is not None and record["state"] in FINISHED

    def put(self, job: Job, state: str, content: dict[str, Any]) -> None:
        """Write record.json, last and by rename: from here on the job is over."""
        about = {"schema": SCHEMA, "key": job.key, "kind": job.kind, "state": state}
        record = _finite({**about, **content})
        write_json(self.folder(job.key) / "record.json", {**record, "checksum": _checksum(record)})

    def jobs(self) -> dict[str, Job]:
        """Every readable job by key: a damaged job.json hurts only itself."""
        found: dict[str, Job] = {}
        for key in self.keys():
            with contextlib.suppress(LookupError, ValueError):
                found[key] = self.job(key)
        return found

    def records(self) -> Iterator[tuple[Job, dict[str, Any]]]:
        """Every job that ended, with its record, by key. Damaged ones have not ended: a run does them again."""
        for key, job in self.jobs().items():
            record = self.record(key)
            if record is not None:
                yield job, record

    def progress(self, key: str) -> dict[str, Any]:
        """What the worker said last; empty while it said nothing."""
        path = self.folder(key) / "progress.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def samples(self, key: str, only: Container[str] | None = None) -> dict[str, Any]:
        """Per-sample columns of an evaluation, or those named in `only`, as NumPy arrays.

        Raises ValueError if the file is damaged.
        """
        import numpy as np

        path = self.folder(key) / SAMPLES
        record = self.record(key)
        expected = record["files"].get(SAMPLES) if record is not None else None
        if expected is None or expected != file_hash(path):
            raise ValueError(f"{path} does not match its record; run the job again")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if only is None or name in only}


def write_json(path: Path, values: Any) -> None:
    """Sorted, indented JSON by write_atomic, so that equal content gives equal bytes."""
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Temp file, fsync, rename, fsync of the folder: a reader sees the old file or the whole new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def weights_file(which: str) -> str:
    """Name of the file with a training's `last` weights, or with the `best` ones by validation."""
    return f"weights-{which}.safetensors"


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file, None where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _finite(values: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them, so that an odd metric never costs a record."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _checksum(record: dict[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
