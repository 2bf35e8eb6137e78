"""A record: what a job leaves behind. JSON names of record.json occur only here (`from_json`, `to_json`, `parse`).

Types are checked where a record is read: a field of another type makes the record damaged, and so nobody who uses one
has to expect it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from bench.atomic import parse_json
from bench.planning.schema import first_problem, upgraded
from bench.soundness.checks import Finding

if TYPE_CHECKING:
    from pydantic import TypeAdapter

FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # names of files in a record: never a path
Amount = Annotated[float, Interval(ge=0.0, le=1e15)]  # seconds, MB, passes: beyond it a record is damaged
State = Literal["done", "diverged", "unsupported", "error", "oom", "timeout"]
FINISHED = ("done", "diverged", "unsupported")  # states that the same command does not try again

_JSON_NAMES = {
    "failures": "retries",
    "retries": "attempts",
    "checkpoint_seconds": "keep_seconds",
    "defense_metrics": "defense",
    "predictor": "deploys",
    "metric": "measures",
}


class _Stored:
    """A part of a record: how pydantic finds its fields in JSON."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"alias_generator": lambda name: _JSON_NAMES.get(name, name)}


@dataclass(frozen=True)
class Provenance(_Stored):
    """Where a record comes from.

    `commit`, `dirty`: of the code, None where it is not in a checkout. `workers`: jobs that shared the device.
    `rows_per_pass`: images in one pass where an evaluation ran out of memory with more.
    """

    commit: str | None = None
    dirty: bool | None = None
    device: str | None = None
    workers: int | None = None
    threads: int | None = None
    versions: dict[str, str] | None = None
    plugin_sha256: str | None = None
    rows_per_pass: int | None = None


@dataclass(frozen=True)
class Time(_Stored):
    """When a job started (UTC, ISO 8601) and how many seconds it took, loading and saving included."""

    started: str | None = None
    seconds: Amount | None = None


@dataclass(frozen=True)
class PeakMemory(_Stored):
    """The most MB that a worker held, resident and on the GPU."""

    rss: Amount | None = None
    cuda: Amount | None = None


@dataclass(frozen=True)
class JobError(_Stored):
    """The exception that ended a job, or the name of what killed it."""

    type: str
    message: str
    traceback: str | None = None


@dataclass(frozen=True)
class Retry(_Stored):
    """Why a job ran again, and how (`step`, see bench.jobs.retries)."""

    step: str
    type: str
    message: str
    peak_memory_mb: PeakMemory | None = None


@dataclass(frozen=True, kw_only=True)
class Metrics(_Stored):
    """What a job measured; None for what it did not. `test_hash`: of its `n` test images."""

    n: int | None = None
    test_hash: str | None = None
    forwards_per_image: Amount | None = None
    backwards_per_image: Amount | None = None


@dataclass(frozen=True, kw_only=True)
class TrainMetrics(Metrics):
    """What a training measured, or the import of a user's model (`clean_accuracy`, on `clean_n` test images).

    `checkpoint_seconds` and `check_seconds` are not part of `train_seconds`; `resumed`: how often it went on from a
    checkpoint; `work_per_image_f`: work of a step per image, in forward passes; `sudden_drop_epoch`: the first epoch
    20 points below the best; `precision`: of the training passes (fp32, bf16, fp16), also where the recipe left it to a
    probe of the device; `origin`: where an imported checkpoint comes from, as hf:OWNER/REPO/FILE@COMMIT.
    """

    train_seconds: Amount | None = None
    check_seconds: Amount | None = None
    checkpoint_seconds: Amount | None = None
    resumed: int | None = None
    seconds_per_epoch: Amount | None = None
    epochs: int | None = None
    steps: int | None = None
    active_steps: dict[str, int] | None = None
    final_terms: dict[str, float | None] | None = None
    defense_metrics: dict[str, float | None] | None = None
    parameters: int | None = None
    predictor: str | None = None
    precision: str | None = None
    work_per_image_f: Amount | None = None
    inference_ms_per_image: Amount | None = None
    best_epoch: int | None = None
    best_validation: float | None = None
    last_validation: float | None = None
    sudden_drop_epoch: int | None = None
    validation_hash: str | None = None
    clean_accuracy: float | None = None
    clean_n: int | None = None
    origin: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationMetrics(Metrics):
    """What an evaluation measured. `metric`: the column that it measures instead of robustness; `sources`: keys of the
    evaluations whose images it used; `shards`: keys of those that it was put together from."""

    attack_seconds: Amount | None = None
    metric: str | None = None
    sources: tuple[str, ...] | None = None
    sources_without_images: tuple[str, ...] | None = None
    shards: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class AuditMetrics(Metrics):
    """What an audit found."""

    findings: tuple[Finding, ...] | None = None


@dataclass(frozen=True)
class Record(_Stored):
    """The result of a job.

    - `state`: done; diverged (NaN or Inf in training or evaluation); unsupported (the attack does not apply to the
      model, for the `reason` given); error, oom (out of memory) and timeout, after which the same command tries again.
    - `files`: SHA-256 of each file beside the record, by name.
    - `energy_joules`: that the GPU used meanwhile, where NVML tells it and no other job of bench was on it.
    - `weights_sha256`: of the weights that an evaluation or an audit used.
    - `failures`: how often the job had failed before; `retries`: what was tried in the run that ended it.
    - `kind`: of the job, filled in when the record is read.
    """

    state: State
    metrics: Metrics = Metrics()
    files: dict[str, str] = field(default_factory=dict, kw_only=True)
    time: Time = field(default=Time(), kw_only=True)
    provenance: Provenance = field(default=Provenance(), kw_only=True)
    peak_memory_mb: PeakMemory = field(default=PeakMemory(), kw_only=True)
    energy_joules: Amount | None = field(default=None, kw_only=True)
    weights_sha256: str | None = field(default=None, kw_only=True)
    error: JobError | None = field(default=None, kw_only=True)
    reason: str | None = field(default=None, kw_only=True)
    failures: int = field(default=0, kw_only=True)
    retries: tuple[Retry, ...] = field(default=(), kw_only=True)
    kind: str = field(default="", kw_only=True)

    @property
    def problem(self) -> str | None:
        """Why the job is not done, in one line; None where it is."""
        if self.state == "done":
            return None
        error = ": ".join(filter(None, (self.error.type, self.error.message))) if self.error else "no reason stored"
        return self.reason or error


@dataclass(frozen=True)
class TrainRecord(Record):
    """The result of a training or an import."""

    metrics: TrainMetrics = TrainMetrics()


@dataclass(frozen=True)
class EvaluationRecord(Record):
    """The result of an evaluation or a shard of one."""

    metrics: EvaluationMetrics = EvaluationMetrics()


@dataclass(frozen=True)
class AuditRecord(Record):
    """The result of an audit."""

    metrics: AuditMetrics = AuditMetrics()


_KINDS: dict[str, type[Record]] = {
    **dict.fromkeys(("train", "import"), TrainRecord),
    **dict.fromkeys(("evaluate", "shard"), EvaluationRecord),
    "audit": AuditRecord,
}
# fields that are written also where they have their default, as null or an empty value; all others are left out then
_ALWAYS = {"metrics", "commit", "dirty", "rss", "cuda"}


def train_metrics(record: Record | None) -> TrainMetrics:
    """The metrics of a training or an import; empty ones where there is no such record."""
    return record.metrics if isinstance(record, TrainRecord) else TrainMetrics()


def evaluation_metrics(record: Record | None) -> EvaluationMetrics:
    """The metrics of an evaluation; empty ones where there is no such record."""
    return record.metrics if isinstance(record, EvaluationRecord) else EvaluationMetrics()


def audit_findings(record: Record | None) -> tuple[Finding, ...]:
    """The findings of an audit; empty where there is no such record."""
    return (record.metrics.findings or ()) if isinstance(record, AuditRecord) else ()


def parse(data: bytes, key: str) -> Record:
    """The record of job `key` from the content of its file.

    Raises ValueError with what is damaged, NewerSchemaError where a newer version wrote it.
    """
    try:
        values: Any = parse_json(data)
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("key") != key or values.get("checksum") != checksum(values):
        raise ValueError("its content does not match its checksum")
    record = from_json(upgraded(values))
    for name in record.files:
        if not FILE.fullmatch(name):
            raise ValueError(f"files holds {name!a}, which is not a file name")
    return record


def from_json(values: dict[str, Any]) -> Record:
    """The record of a JSON object. Raises ValueError that names a field of another type."""
    from pydantic import ValidationError

    try:
        return _adapter(str(values.get("kind"))).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise first_problem(error) from None


@functools.cache
def _adapter(kind: str) -> TypeAdapter[Record]:
    """The reader of the records of a kind of jobs, which checks types: "1" is not a number."""
    from pydantic import TypeAdapter

    return TypeAdapter(_KINDS.get(kind, Record))


def to_json(record: Record) -> dict[str, Any]:
    """The JSON object of a record without schema, key, kind and checksum, with null for NaN and infinity."""
    values: dict[str, Any] = _plain(dataclasses.replace(record, kind=""))
    if train_metrics(record).best_epoch is not None:
        values["metrics"].setdefault("sudden_drop_epoch", None)
    return values


def retries_from_json(values: list[Any]) -> list[Retry]:
    """The retries of a JSON list. Raises ValueError that names a field of another type."""
    return list(from_json({"state": "error", "attempts": values}).retries)


def retries_to_json(entries: list[Retry]) -> list[dict[str, Any]]:
    """Retries as a JSON list."""
    return [_plain(entry) for entry in entries]


def checksum(values: dict[str, Any]) -> str:
    """Checksum of all fields of a record.json but the checksum itself."""
    content = {name: value for name, value in values.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def weights_file(which: str) -> str:
    """Name of the file with a training's `last` weights, or with the `best` ones by validation."""
    return f"weights-{which}.safetensors"


def _plain(value: Any) -> Any:
    """A value as JSON."""
    if isinstance(value, Finding):
        return _plain(value.to_json())
    if dataclasses.is_dataclass(value):
        own = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {_JSON_NAMES.get(f.name, f.name): _plain(v) for f, v in own if f.name in _ALWAYS or v != f.default}
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
