"""results/ on disk <-> records. One folder a job; record.json is written last, by rename, so half-done is not done.

results/<key>/{job.json, log.txt, train.jsonl, progress.json, weights-{last,best}.safetensors,
adversarial.safetensors, samples.npz, record.json}. The record carries checksums of the files beside it. What is damaged
is moved to results/quarantine/ with the reason when its job is done again, never deleted and never used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import secrets
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from bench.atomic import file_hash, write_json
from bench.planning.job import SCHEMA, EvaluationJob, Job, ModelJob, NewerSchemaError, from_json, upgraded

IMAGES, SAMPLES = "adversarial.safetensors", "samples.npz"
RECORD, JOB, RETRIES, QUARANTINE = "record.json", "job.json", "retries.json", "quarantine"
SHARED = "shared"  # while a job runs: the most jobs that were on its device at a time
KEY = re.compile(r"[0-9a-f]{12}")
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # what a record may name beside itself: never a path
FINISHED = ("done", "diverged", "unsupported")  # states that the same command does not try again


class Store:
    """A results folder. Readers need nothing but read access; every write is atomic."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Create the folder and prove that it can be written. Raises OSError in one line.

        Raises NewerSchemaError, before anything is written, where a newer version wrote any of it.
        """
        for key in self.keys():
            self.record(key)
            self._known(key)
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
        refuse_links(folder)
        if self._known(job.key) == job:
            return
        if (folder / JOB).exists() and self._known(job.key) is None:
            self.set_aside(job.key, JOB, "damaged, or of another job")
        write_json(folder / JOB, job.to_json())

    def _known(self, key: str) -> Job | None:
        try:
            return self.job(key)
        except (LookupError, ValueError):
            return None

    def job(self, key: str) -> Job:
        """The job of a key. Raises LookupError where there is none, ValueError where job.json is damaged."""
        path = self.folder(key) / JOB
        if not path.is_file():
            raise LookupError(f"no job {key} in {self.root}")
        try:
            job = from_json(json.loads(path.read_text(encoding="utf-8")))
        except NewerSchemaError as error:
            if self.record(key) is None:
                raise
            # a record of today stands beside it, so the number is damage
            raise ValueError(f"{path} is damaged ({error}); `bench run` writes it again") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); `bench run` writes it again") from None
        if job.key != key:
            raise ValueError(f"{path} holds job {job.key}; `bench run` writes it again")
        return job

    def model_job(self, key: str) -> ModelJob:
        """The training or import of a key. Raises what `job` raises, ValueError for a job of another kind."""
        job = self.job(key)
        if not isinstance(job, ModelJob):
            raise ValueError(f"job {key} is of kind {job.kind}; expected a training or an import")
        return job

    def evaluation(self, key: str) -> EvaluationJob:
        """The evaluation or shard of a key. Raises what `job` raises, ValueError for a job of another kind."""
        job = self.job(key)
        if not isinstance(job, EvaluationJob):
            raise ValueError(f"job {key} is of kind {job.kind}; expected an evaluation")
        return job

    def record(self, key: str) -> dict[str, Any] | None:
        """The record of a job that ended, whatever its state; None while there is none or it is damaged."""
        path = self.folder(key) / RECORD
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        if not isinstance(record, dict) or record.get("key") != key or record.get("checksum") != checksum(record):
            return None
        files = record.get("files", {})
        if not isinstance(files, dict) or not all(FILE.fullmatch(name) for name in files):
            return None
        with contextlib.suppress(ValueError):
            return upgraded(record)
        return None

    def done(self, key: str) -> bool:
        """Is there a complete record that stands (errors do not: they are stored for reading and tried again)?"""
        record = self.record(key)
        return record is not None and record["state"] in FINISHED

    def intact(self, key: str) -> bool:
        """Does a record stand whose samples lie there undamaged? (Weights and images may be left out of a copy.)"""
        record = self.record(key)
        if record is None or record["state"] not in FINISHED:
            return False
        return SAMPLES not in record["files"] or record["files"][SAMPLES] == file_hash(self.folder(key) / SAMPLES)

    def reopen(self, key: str) -> None:
        """Before a job is done again: set aside what is damaged, count what had failed, take the record away."""
        path, record = self.folder(key) / RECORD, self.record(key)
        if record is None:
            if path.exists():
                self.set_aside(key, RECORD, "its content does not match its checksum")
            return
        for name in damaged(self.folder(key), record):
            self.set_aside(key, name, "its SHA-256 is not the one in record.json")
        if record["state"] != "done":
            write_json(self.folder(key) / RETRIES, {"count": self._retries(key) + 1})
        path.unlink(missing_ok=True)

    def set_aside(self, key: str, name: str, reason: str) -> None:
        """Move a damaged file of a job to a place of its own in results/quarantine/."""
        if (self.root / QUARANTINE).is_symlink():
            raise ValueError(f"{self.root / QUARANTINE} is a link; results hold real files only")
        place = self.root / QUARANTINE / f"{key}-{secrets.token_hex(4)}"
        place.mkdir(parents=True)
        write_json(place / "reason.json", {"key": key, "file": name, "reason": reason})
        with contextlib.suppress(FileNotFoundError):
            (self.folder(key) / name).replace(place / name)

    def quarantined(self) -> list[dict[str, str]]:
        """What was set aside: key, file and reason of each."""
        found = []
        for path in sorted((self.root / QUARANTINE).glob("*/reason.json")):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads(path.read_text(encoding="utf-8")))
        return found

    def _retries(self, key: str) -> int:
        try:
            return int(json.loads((self.folder(key) / RETRIES).read_text(encoding="utf-8"))["count"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def put(self, job: Job, state: str, content: dict[str, Any]) -> None:
        """Write record.json, last and by rename: from here on the job is over."""
        about = {"schema": SCHEMA, "key": job.key, "kind": job.kind, "state": state}
        retries = self._retries(job.key)
        record = _finite({**about, **content, **({"retries": retries} if retries else {})})
        write_json(self.folder(job.key) / RECORD, {**record, "checksum": checksum(record)})

    def jobs(self) -> dict[str, Job]:
        """Every readable job by key: a damaged job.json hurts only itself."""
        found: dict[str, Job] = {}
        for key in self.keys():
            job = self._known(key)
            if job is not None:
                found[key] = job
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

        with np.load(io.BytesIO(self.content(key)), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files if only is None or name in only}

    def content(self, key: str) -> bytes:
        """The bytes of samples.npz as its record says they are. Raises ValueError if the file is damaged."""
        path, record = self.folder(key) / SAMPLES, self.record(key)
        expected = record["files"].get(SAMPLES) if record is not None else None
        data = path.read_bytes() if expected is not None and path.is_file() else b""
        if expected is None or expected != hashlib.sha256(data).hexdigest():
            raise ValueError(f"{path} does not match its record; run the job again")
        return data


def refuse_links(folder: Path) -> None:
    """A job would write through a link, to wherever it leads. Raises ValueError where one lies in its folder."""
    for path in (*folder.iterdir(), *(folder / "blocks").glob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link; results hold real files only. Remove it")


def damaged(folder: Path, record: dict[str, Any]) -> list[str]:
    """Names of the files of a record that lie there with another content than it says."""
    found = {name: file_hash(folder / name) for name in record["files"]}
    return sorted(name for name, has in found.items() if has not in (None, record["files"][name]))


def weights_file(which: str) -> str:
    """Name of the file with a training's `last` weights, or with the `best` ones by validation."""
    return f"weights-{which}.safetensors"


def _finite(values: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them, so that an odd metric never costs a record."""
    if isinstance(values, dict):
        return {name: _finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def checksum(record: dict[str, Any]) -> str:
    """Over all that a record says, but for the checksum itself."""
    content = {name: value for name, value in record.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
