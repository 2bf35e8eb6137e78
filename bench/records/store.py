"""Reads and writes results/: one folder per job. record.json is written last, by a rename, so that no job is half done.

results/<key>/{job.json, log.txt, train.jsonl, progress.json, weights-{last,best}.safetensors,
adversarial.safetensors, samples.npz, record.json}. The record holds the SHA-256 of weights, samples and images. When a
job runs again, its damaged files are moved to results/quarantine/ with the reason; they are not deleted and not used.
Published records are read from packs, results/<name>.zip (bench.records.packs), unless the job has a folder with
job.json or record.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Container, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.atomic import parse_json, read_json, write_json
from bench.core.epsilon import Epsilon
from bench.planning.job import EvaluationJob, Job, ModelJob
from bench.planning.job_json import from_json
from bench.planning.schema import SCHEMA, NewerSchemaError
from bench.records import attempts
from bench.records.job_files import JobFiles
from bench.records.npz import ColumnCache
from bench.records.packs import JOB, RECORD, SAMPLES
from bench.records.record import FILE, FINISHED, Record, checksum, parse, to_json, weights_file

__all__ = [
    "FILE", "FINISHED", "IMAGES", "JOB", "QUARANTINE", "RECORD", "SAMPLES", "SHARED", "Store", "checksum",
    "weights_file",
]  # fmt: skip
IMAGES, QUARANTINE = "adversarial.safetensors", "quarantine"
SHARED = "shared"  # while a job runs: the most jobs that shared its device at a time


@dataclass(frozen=True)
class Scope:
    """What a store is restricted to (`bench.results.scope`): keys of jobs, budgets (empty: all), and both in words."""

    keys: Set[str]
    budgets: Set[Epsilon]
    about: str


class Store(JobFiles):
    """A results folder. Reading needs read access only; every write is atomic.

    `scope`: only these of its jobs are listed; others can be read by their key. `read_only`: nothing may be written.
    Jobs, records and columns are read once and shared by all callers, who must not change them; records that are
    written later appear in a new store.
    """

    def __init__(self, root: Path, read_only: bool = False, scope: Scope | None = None) -> None:
        super().__init__(root)
        self.read_only, self.scope = read_only, scope
        self._jobs: dict[str, Job] = {}
        self._records: dict[str, Record | None] = {}
        self._columns = ColumnCache()

    def snapshot(self) -> Store:
        """A read-only store of this folder; itself if it is one."""
        return self if self.read_only else Store(self.root, read_only=True)

    def keys(self) -> list[str]:
        """Every job in scope that has a folder or is in a pack, sorted."""
        return [key for key in super().keys() if self.scope is None or key in self.scope.keys]

    def prepare(self) -> list[str]:
        """Create the folder and check that it can be written; returns `damages`. Raises OSError in one line.

        Raises NewerSchemaError, before anything is written, if a newer version wrote any file.
        """
        self._refuse_read_only()
        damages = self.damages()
        for name, kind in self.odd_places().items():
            self.set_aside(name, "", f"it is {kind}; a job has a folder there")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise OSError(f"cannot write results folder {self.root}: {error.strerror}; choose --results-dir") from None
        return damages

    def _refuse_read_only(self) -> None:
        if self.read_only:
            raise ValueError(f"{self.root} was opened read-only; nothing may be written to it")

    def add(self, job: Job) -> None:
        """Write job.json, if it is missing, damaged or names other shards; a packed job needs none."""
        self._refuse_read_only()
        if self.packed(job.key) and self._known(job.key) == job:
            return
        folder = self.folder(job.key)
        folder.mkdir(exist_ok=True)
        if (known := self._known(job.key)) == job:
            return
        if known is None and self.has(job.key, JOB):
            self.set_aside(job.key, JOB, "damaged, or of another job")
        write_json(folder / JOB, job.to_json())

    def mark_run(self, keys: Iterable[str]) -> None:
        """Give the job.json of these jobs one and the same time, that of the run which has them to do."""
        now = time.time_ns() // 1000 * 1000  # file systems store no finer one
        for key in keys:
            with contextlib.suppress(OSError):  # packed, or the file of another user
                os.utime(self.folder(key) / JOB, ns=(now, now))

    def run_of(self, key: str) -> int | None:
        """The time of the last run that had this job to do; None if it is unknown."""
        with contextlib.suppress(OSError):
            return (self.place(key) / JOB).stat().st_mtime_ns
        return None

    def _known(self, key: str) -> Job | None:
        try:
            return self.job(key)
        except (LookupError, ValueError):
            return None

    def job(self, key: str) -> Job:
        """The job of a key. Raises LookupError if there is none, ValueError if job.json is damaged."""
        if key in self._jobs:
            return self._jobs[key]
        path, data = self.folder(key) / JOB, self.read(key, JOB)
        if data is None:
            raise LookupError(f"no job {key} in {self.root}")
        try:
            job = from_json(parse_json(data))
        except NewerSchemaError as error:
            if self.record(key) is None:
                raise
            # its record was written by this version, so the schema number is damaged
            raise ValueError(f"{path} is damaged ({error}); `bench run` writes it again") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); `bench run` writes it again") from None
        if job.key != key:
            raise ValueError(f"{path} holds job {job.key}; `bench run` writes it again")
        if self.read_only:
            self._jobs[key] = job
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

    def record(self, key: str) -> Record | None:
        """The record of a job, in whatever state; None if there is none or it is damaged."""
        if key in self._records:
            return self._records[key]
        self.place(key)
        record, damage = self._parsed(key)
        if damage:
            self._refuse_pack(key, RECORD, damage)
        if self.read_only:
            self._records[key] = record
        return record

    def damage(self, key: str) -> str | None:
        """What is wrong with the record.json of a job, which the text names; None if nothing is."""
        _, damage = self._parsed(key)
        return damage and f"{key}/{RECORD} is damaged: {damage}"

    def _parsed(self, key: str) -> tuple[Record | None, str | None]:
        try:
            data = self.read(key, RECORD)
            return (None if data is None else parse(data, key)), None
        except ValueError as error:
            return None, str(error).replace(f"{self.place(key) / RECORD} ", "it ")

    def damages(self) -> list[str]:
        """A line for each job folder, job.json and record.json that is passed over since it is damaged, and how."""
        found = [f"{self.root / name} is {kind}; a job has a folder there" for name, kind in self.odd_places().items()]
        for key in self.keys():
            try:
                self.job(key)
            except LookupError:
                pass
            except ValueError as problem:
                found.append(str(problem))
            if self.record(key) is None and (damage := self.damage(key)):
                found.append(f"{self.root}/{damage}")
        return found

    def _refuse_pack(self, key: str, name: str, damage: str = "its content does not match its checksum") -> None:
        """Raises PackError if the damaged file of a job is in a pack: one damaged file makes the pack unusable."""
        if self.packed(key):
            raise self.packs[key].error(f"{key}/{name} is damaged: {damage}")

    def done(self, key: str) -> bool:
        """Has the job a record of a final state? After errors the same command tries it again."""
        record = self.record(key)
        return record is not None and record.state in FINISHED

    def intact(self, key: str) -> bool:
        """Has the job a record of a final state, with undamaged samples? Copies may lack weights and images."""
        record = self.record(key)
        if record is None or record.state not in FINISHED:
            return False
        return SAMPLES not in record.files or self.matches(key, SAMPLES, record)

    def reopen(self, key: str) -> None:
        """Prepare another run of a job: quarantine damaged and odd files, count a failure, remove the record.

        A packed job gets a folder with its job.json, which is read from then on; the pack is not changed.
        """
        self._refuse_read_only()
        path, record = self.folder(key) / RECORD, self.record(key)
        for name, kind in self.odd_files(key).items():  # the job would write through a link, and wait for a FIFO
            self.set_aside(key, name, f"it is {kind}; results hold regular files only")
        if self.packed(key):
            path.parent.mkdir(exist_ok=True)
            write_json(path.parent / JOB, self.job(key).to_json())
        if record is None:
            if damage := self.damage(key):
                self.set_aside(key, RECORD, damage)
            return
        for name, damage in self.damaged(key, record).items():
            self.set_aside(key, name, damage)
        if record.state != "done":
            attempts.count_failure(self.folder(key))
        path.unlink(missing_ok=True)

    def set_aside(self, key: str, name: str, reason: str) -> None:
        """Move a damaged file of a job, or its folder (an empty name), to a new folder in results/quarantine/."""
        if (self.root / QUARANTINE).is_symlink():
            raise ValueError(f"{self.root / QUARANTINE} is a link; results hold real files only")
        place = self.root / QUARANTINE / f"{key}-{secrets.token_hex(4)}"
        place.mkdir(parents=True)
        write_json(place / "reason.json", {"key": key, "file": name, "reason": reason})
        path = self.root / key / name
        with contextlib.suppress(FileNotFoundError):
            path.replace(place / path.name)

    def quarantined(self) -> list[dict[str, str]]:
        """Key, file and reason of each quarantined file."""
        found = []
        for path in sorted((self.root / QUARANTINE).glob("*/reason.json")):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                reason = read_json(path)
                found.append({name: str(reason[name]) for name in ("key", "file", "reason")})
        return found

    def put(self, job: Job, record: Record) -> None:
        """Write record.json, with which the job has ended."""
        self._refuse_read_only()
        record = replace(record, failures=attempts.failures(self.folder(job.key)))
        values = {"schema": SCHEMA, "key": job.key, "kind": job.kind, **to_json(record)}
        write_json(self.folder(job.key) / RECORD, {**values, "checksum": checksum(values)})

    def jobs(self) -> dict[str, Job]:
        """Every readable job by key; jobs with a damaged job.json are left out."""
        found: dict[str, Job] = {}
        for key in self.keys():
            job = self._known(key)
            if job is not None:
                found[key] = job
        return found

    def records(self) -> Iterator[tuple[Job, Record]]:
        """Every job with its record, ordered by key. Damaged records are left out: the next run repeats their jobs."""
        for key, job in self.jobs().items():
            record = self.record(key)
            if record is not None:
                yield job, record

    def progress(self, key: str) -> dict[str, Any]:
        """The last progress report of the worker: numbers, `note` and `device`; empty before the first."""
        path = self.place(key) / "progress.json"
        try:
            values = read_json(path)
        except (OSError, ValueError):
            return {}
        kinds = {"note": str, "device": str}  # all else is a number
        whole = values if isinstance(values, dict) else {}
        return {name: value for name, value in whole.items() if isinstance(value, kinds.get(name, (int, float)))}

    def samples(self, key: str, only: Container[str] | None = None) -> dict[str, Any]:
        """Per-sample columns of an evaluation, or those named in `only`, as NumPy arrays.

        Raises ValueError if the file is damaged.
        """
        columns = self._columns if self.read_only else ColumnCache()
        found = columns.columns(key, only, lambda: self.content(key))
        if len({len(values) for values in found.values()}) > 1:
            raise ValueError(f"{self.folder(key) / SAMPLES} has columns of different lengths; run the job again")
        return found if self.read_only else {name: values.copy() for name, values in found.items()}

    def content(self, key: str) -> bytes:
        """The bytes of samples.npz as its record names them. Raises ValueError if the file is damaged."""
        record = self.record(key)
        expected = record.files.get(SAMPLES) if record is not None else None
        data = (self.read(key, SAMPLES) or b"") if expected is not None else b""
        if expected is None or expected != hashlib.sha256(data).hexdigest():
            self._refuse_pack(key, SAMPLES)
            raise ValueError(f"{self.folder(key) / SAMPLES} does not match its record; run the job again")
        return data
