"""The five kinds of jobs and their keys: jobs with equal content have equal keys, so specs share work.

A job holds every setting with its default filled in, and the keys of the jobs whose results it uses. The key is a hash
over its JSON, so no JSON name may change; these names occur only here, in `job_fields` and in `job_json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from bench.planning.job_fields import JSON_NAMES, STRICT, DataChoice, JobThreat, Normalization, PluginChoice, as_json
from bench.planning.labels import label, with_train_eps
from bench.planning.schema import SCHEMA

IMPORTED = "imported"  # the recipe of a user's model, whose training is unknown
KEYS = 1  # part of every key: raising it invalidates all earlier results
_OUTSIDE = ("needs", "parts", "key")  # fields that are not part of the content


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every job has.

    - `engine`: revision of the code that does jobs of this kind.
    - `seed`: of the training, and of what is done with its model.
    - `needs`: keys of the jobs whose results this one uses. The first is the model's and must be done; the others
      (evaluations whose adversarial images are used) must only have ended.
    - `parts`: shards that the result is put together from; not in the key, since they do not change the result.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    kind: ClassVar[str]
    engine: int
    seed: int
    needs: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps([KEYS, self.kind, self.content(), self.needs], sort_keys=True, separators=(",", ":"))
        object.__setattr__(self, "key", hashlib.sha256(text.encode()).hexdigest()[:12])

    @property
    def waits(self) -> tuple[str, ...]:
        """Every job that has to end before this one begins."""
        return (*self.needs, *self.parts)

    @property
    def model_key(self) -> str:
        """Key of the training or import whose model the job is about."""
        return self.needs[0] if self.needs else self.key

    def content(self) -> dict[str, Any]:
        """The JSON object that, with `kind` and `needs`, makes the key."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _OUTSIDE}
        return {JSON_NAMES.get(name, name): as_json(value) for name, value in own.items()}

    def without_seed(self) -> dict[str, Any]:
        """The content but for the seed: equal for jobs that only repeat each other."""
        return {name: value for name, value in self.content().items() if name != "seed"}

    def describe(self, model: str) -> str:
        """The job in a few words; `model` names the model."""
        return f"{self.kind} {model}"

    def to_json(self) -> dict[str, Any]:
        """The content of job.json."""
        parts = {"parts": list(self.parts)} if self.parts else {}
        about = {"schema": SCHEMA, "key": self.key, "kind": self.kind, "what": self.content()}
        return {**about, "needs": list(self.needs), **parts}


@dataclass(frozen=True, kw_only=True)
class TrainJob(_Job):
    """A training. `recipe`: name of the recipe; `training`: its settings (fields of `TrainSpec`)."""

    kind: ClassVar[str] = "train"
    data: DataChoice
    model: PluginChoice
    defense: PluginChoice
    threat: JobThreat | None
    recipe: str
    training: dict[str, Any]

    @property
    def epochs(self) -> int:
        """Passes over the training images."""
        return int(self.training["epochs"])

    @property
    def size(self) -> float:
        """Images that the job works on, over all epochs: its time is in proportion to them."""
        return float(self.epochs * self.data.train)

    def describe(self, model: str) -> str:
        """The job in a few words; `model` names the model."""
        return f"training {model}"

    def label(self) -> str:
        """The defense with its own settings and, where it trains against a threat, the radius."""
        return with_train_eps(label("defenses", self.defense.name, self.defense.settings), self.threat)


@dataclass(frozen=True, kw_only=True)
class ImportJob(_Job):
    """A user's model in the place of a training: hashes of its files, never a path.

    `checkpoint`: SHA-256 of the checkpoint, None where the model file brings its weights. `randomized`: the user
    declared the model stochastic. `defense.name` is the name of the model in tables.
    """

    kind: ClassVar[str] = "import"
    data: DataChoice
    model: PluginChoice
    defense: PluginChoice
    checkpoint: str | None
    normalization: Normalization | None
    randomized: bool
    threat: ClassVar[None] = None
    recipe: ClassVar[str] = IMPORTED
    epochs: ClassVar[int] = 0
    size: ClassVar[float] = 1.0

    @property
    def training(self) -> dict[str, Any]:
        """Settings of the training: none, since bench did not run it."""
        return {"epochs": self.epochs}

    def label(self) -> str:
        """The name that the user gave the model."""
        return label("defenses", self.defense.name, self.defense.settings)

    def content(self) -> dict[str, Any]:
        """The JSON object that, with `kind` and `needs`, makes the key: it has every field of a training."""
        checkpoint = None if self.checkpoint is None else {"sha256": self.checkpoint}
        trained = {"threat": self.threat, "recipe": self.recipe, "train": self.training}
        return {**super().content(), **trained, "checkpoint": checkpoint}


@dataclass(frozen=True, kw_only=True)
class _Evaluation(_Job):
    """One evaluation of one model on images of `split`, with its `last` or its `best` weights."""

    attack: PluginChoice
    threat: JobThreat | None
    n: int
    weights: str = "last"
    split: str = "test"

    @property
    def range(self) -> tuple[int, int]:
        """The first image and the one after the last."""
        return 0, self.n

    @property
    def size(self) -> float:
        """Images that the job works on: its time is in proportion to them."""
        first, last = self.range
        return float(last - first)

    def label(self) -> str:
        """The attack with the settings that differ from its defaults."""
        return label("attacks", self.attack.name, self.attack.settings)

    def describe(self, model: str) -> str:
        """The job in a few words; `model` names the model."""
        threat = f" {self.threat.norm} {self.threat.eps}" if self.threat else ""
        first, last = self.range
        images = "" if (first, last) == (0, self.n) else f" images {first} to {last - 1}"
        return f"{self.label()}{threat}{images} on {model}"

    def content(self) -> dict[str, Any]:
        """The JSON object that, with `kind` and `needs`, makes the key: `split` occurs only where it is not `test`."""
        return {name: value for name, value in super().content().items() if (name, value) != ("split", "test")}


@dataclass(frozen=True, kw_only=True)
class EvaluateJob(_Evaluation):
    """An evaluation on the first `n` images."""

    kind: ClassVar[str] = "evaluate"


@dataclass(frozen=True, kw_only=True)
class ShardJob(_Evaluation):
    """The part of an evaluation on `n` images that covers the images [first, last)."""

    kind: ClassVar[str] = "shard"
    images: tuple[int, int]

    @property
    def range(self) -> tuple[int, int]:
        """The first image and the one after the last."""
        return self.images


@dataclass(frozen=True, kw_only=True)
class AuditJob(_Job):
    """Soundness checks of a model (`part` is model) or of stored adversarial images (images), on `n` images."""

    kind: ClassVar[str] = "audit"
    part: str
    level: Literal["quick", "full"]
    threats: tuple[JobThreat, ...]
    n: int
    weights: str = "last"
    split: ClassVar[str] = "test"

    @property
    def size(self) -> float:
        """Images that the job works on: its time is in proportion to them."""
        return float(self.n)

    def label(self) -> str:
        """The part that is checked."""
        return self.part

    def describe(self, model: str) -> str:
        """The job in a few words; `model` names the model."""
        return f"soundness checks of the {self.part} of {model}"


Job = TrainJob | ImportJob | EvaluateJob | ShardJob | AuditJob
ModelJob = TrainJob | ImportJob  # gives a model
EvaluationJob = EvaluateJob | ShardJob  # gives per-image results
