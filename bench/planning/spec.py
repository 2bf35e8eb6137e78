"""What the user writes: one strict model, filled from a YAML file or from command-line options alike.

Unknown and duplicate keys are refused with file, line and key: a misspelt `beta` must never train the default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from bench.core.epsilon import Epsilon, parse_eps
from bench.data import datasets
from bench.planning.catalog import describe, suggest
from bench.planning.strict_yaml import read

Name = Annotated[str, Len(1, 200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class DataSpec(_Strict):
    """`test` and `train`: how many images (null: all). `validation`: images split off train by a fixed seed.

    `split`: what attacks see; a search over settings belongs on the validation images, which are never ranked (`test`
    then counts those).
    `size` resizes a folder's images. `name`: see `bench list datasets`, or `folder:PATH`.
    """

    name: Name = "digits"
    test: Annotated[int, Gt(0)] | None = None
    train: Annotated[int, Gt(0)] | None = None
    validation: Annotated[int, Ge(0)] = 0
    split: Literal["test", "validation"] = "test"
    size: Annotated[int, Ge(4), Le(512)] | None = None


class ModelSpec(_Strict):
    """An architecture of `bench list models` and its settings."""

    name: Name
    set: dict[str, Any] = {}


class ThreatSpec(_Strict):
    """`eps` is the list attacked; defenses that use a threat train at `train_eps` (default: the largest of them)."""

    norm: Literal["Linf", "L2", "L1"] = "Linf"
    eps: Annotated[list[Epsilon], Len(1)]
    train_eps: Epsilon | None = None

    @field_validator("norm", mode="before")
    @classmethod
    def _norm(cls, value: Any) -> Any:
        return {"linf": "Linf", "l2": "L2", "l1": "L1"}.get(str(value).lower(), value)

    @field_validator("eps", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _possible(self) -> ThreatSpec:
        self.eps = sorted({parse_eps(eps, self.norm) for eps in self.eps})
        if self.train_eps is not None:
            parse_eps(self.train_eps, self.norm)
        return self


class TrainSpec(_Strict):
    """The shared recipe. A null is filled from the data set's default; `bench plan` prints what came out.

    `eps_warmup` and `lr_warmup` are fractions of training in which eps and learning rate rise from 0; `lr` is the peak
    of the schedule. `weight_decay_on: weights` spares biases and normalization layers. `grad_clip`: largest L2 norm of
    the gradient, 0 for none. `label_smoothing`: share of each label spread over all classes. `precision` is that of
    training passes; weights and evaluations are fp32.

    `average` deploys averaged weights: `ema` over updates (with `ema_decay`), `swa` over the ends of epochs after the
    fraction `swa_start` of training; `average_bn` gives them the training net's BatchNorm statistics (`live`, the
    default of ema) or those of one clean pass (`clean`, that of swa). `keep: best` also keeps the weights of the epoch
    best on the validation images, under PGD-10 at the training budget where the defense has one, looked at every
    `choose_every` epochs; best and last are both evaluated. `guard` stops and marks a collapsed run.
    """

    epochs: Annotated[int, Gt(0)] | None = None
    batch_size: Annotated[int, Gt(0)] | None = None
    optimizer: Literal["sgd", "adam"] | None = None
    lr: Annotated[float, Gt(0)] | None = None
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] | None = None
    schedule: Literal["constant", "step", "cosine", "one_cycle", "cyclic"] | None = None
    eps_warmup: Annotated[float, Ge(0), Le(1)] = 0.0
    augment: bool | None = None
    lr_warmup: Annotated[float, Ge(0), Le(1)] = 0.0
    weight_decay_on: Literal["all", "weights"] = "all"
    grad_clip: Annotated[float, Ge(0)] = 0.0
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    average: Literal["none", "ema", "swa"] = "none"
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.995
    swa_start: Annotated[float, Ge(0), Lt(1)] = 0.5
    average_bn: Literal["live", "clean"] | None = None
    keep: Literal["last", "best"] = "last"
    choose_every: Annotated[int, Gt(0)] = 1
    guard: bool = True

    # settings younger than the first records: left out of a job while at their default, so that old keys stay valid
    settings_added_later: ClassVar[tuple[str, ...]] = (
        *("lr_warmup", "weight_decay_on", "grad_clip", "label_smoothing", "precision"),
        *("average", "ema_decay", "swa_start", "average_bn", "keep", "choose_every", "guard"),
    )
    # settings that do nothing unless another one has one of these values
    idle: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "ema_decay": ("average", ("ema",)),
        "swa_start": ("average", ("swa",)),
        "average_bn": ("average", ("ema", "swa")),
        "choose_every": ("keep", ("best",)),
    }


class DefenseSpec(_Strict):
    """`set` gives settings; `grid` multiplies: one defense for each combination. Likewise a list of `train_eps`."""

    name: Name
    set: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    train_eps: list[Epsilon] | None = None

    @field_validator("train_eps", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return value if isinstance(value, list) or value is None else [value]


class AttackSpec(_Strict):
    """`n`: images of the test set (default: data.test). `seeds`: only the first so many of the run's seeds.

    `shards`: cut the images into so many jobs, whose results are put together; no verdict depends on it.
    """

    name: Name
    set: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    n: Annotated[int, Gt(0)] | None = None
    seeds: Annotated[int, Gt(0)] | None = None
    shards: Annotated[int, Gt(0)] | None = None


class Spec(_Strict):
    """A matrix of defenses against attacks on one data set under one norm.

    `checks`: soundness checks of every trained model: quick (256 images), full (1000) or off.
    """

    name: str = "run"
    data: DataSpec = DataSpec()
    models: Annotated[list[ModelSpec], Len(1)] | None = None
    seeds: Annotated[list[Annotated[int, Ge(0)]], Len(1)] = [0]
    threat: ThreatSpec
    recipe: Literal["shared", "paper"] = "shared"
    train: TrainSpec = TrainSpec()
    defenses: Annotated[list[DefenseSpec], Len(1)]
    attacks: Annotated[list[AttackSpec], Len(1)]
    checks: Literal["off", "quick", "full"] = "quick"

    @field_validator("models", "defenses", "attacks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """`[standard, {name: trades}]`: a bare name is an entry without settings."""
        return [{"name": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


# One shared recipe: small enough for a laptop on digits and MNIST, the field's usual one for BatchNorm nets on 32x32
# images, and Adam for plain nets there, which a rate of 0.1 makes diverge.
PLAIN_NETS = ("mlp", "lenet5", "small_cnn", "vit_tiny")
_ADAM = {"optimizer": "adam", "weight_decay": 0.0, "schedule": "constant"}
_SGD = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4, "schedule": "step", "epochs": 100, "batch_size": 128}
_PLAIN = {**_ADAM, "epochs": 20, "batch_size": 128, "lr": 1e-3}
SMALL_DATA = ("digits", "mnist", "fashion_mnist")
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {**_ADAM, "epochs": 20, "batch_size": 64, "lr": 2e-3},
    "mnist": {**_ADAM, "epochs": 4, "batch_size": 256, "lr": 1e-3},
    "fashion_mnist": {**_ADAM, "epochs": 10, "batch_size": 256, "lr": 1e-3},
    "svhn": {**_SGD, "lr": 0.01},
}
DEFAULT_EPS = {"digits": "0.1", "mnist": "0.1", "fashion_mnist": "0.1"}
DEFAULT_ATTACKS: tuple[dict[str, Any], ...] = (
    {"name": "clean"},
    {"name": "fgsm"},
    {"name": "pgd"},
    {"name": "pgd", "set": {"loss": "cw"}},
    {"name": "autoattack", "n": 100},
)


def recipe(spec: Spec, facts: datasets.Facts, model: str, paper: dict[str, Any]) -> dict[str, Any]:
    """Every training setting resolved: what the user set, else the paper's (`recipe: paper`), else the shared one."""
    own = {k: v for k, v in spec.train.model_dump().items() if k in spec.train.model_fields_set and v is not None}
    shared = _PLAIN if model in PLAIN_NETS and facts.name not in SMALL_DATA else RECIPES.get(facts.name, _SGD)
    base = {**TrainSpec().model_dump(), **shared, "augment": facts.augment}
    # through the schema once more: a plug-in's recipe is held to it too, and 1 and 1.0 make one key
    try:
        checked = TrainSpec.model_validate({**base, **(paper if spec.recipe == "paper" else {}), **own})
    except ValidationError as error:
        raise ValueError(describe(error, "recipe")) from None
    values = checked.model_dump()
    for name, (owner, wanted) in checked.idle.items():
        if values[name] != TrainSpec.model_fields[name].default and values[owner] not in wanted:
            raise ValueError(f"train.{name} is {values[name]}, but does nothing while train.{owner} is {values[owner]}")
    return {
        k: v
        for k, v in values.items()
        if k not in checked.settings_added_later or v != TrainSpec.model_fields[k].default
    }


def build(values: dict[str, Any], where: str = "", lines: dict[tuple[Any, ...], int] | None = None) -> Spec:
    """A checked Spec from plain values. Raises ValueError in one line: where, which key, what was expected."""
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = tuple(p for p in first["loc"])
        line = next((lines[path[:k]] for k in range(len(path), 0, -1) if lines and path[:k] in lines), None)
        place = f"{where}, line {line}: " if line else f"{where}: " if where else ""
        raise ValueError(f"{place}{_explain(first, path)}") from None


def _explain(first: Any, path: tuple[Any, ...]) -> str:
    key = ".".join(str(p) for p in path)
    if first["type"] == "extra_forbidden":
        known = _known(path[:-1])
        return f"unknown key '{path[-1]}' in {'.'.join(map(str, path[:-1])) or 'the spec'}." + (
            f"{suggest(str(path[-1]), known)} Known: {', '.join(known)}" if known else ""
        )
    if first["type"] in ("too_short", "missing"):
        return f"{key} is {'missing' if first['type'] == 'missing' else 'empty'}; expected at least one entry"
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if isinstance(first["input"], (dict, list)) else f", got {first['input']!r}")


def _known(path: tuple[Any, ...]) -> list[str]:
    """Keys allowed at a place of the spec."""
    tables: dict[str, type[_Strict]] = {
        "data": DataSpec, "models": ModelSpec, "threat": ThreatSpec, "train": TrainSpec,
        "defenses": DefenseSpec, "attacks": AttackSpec,
    }  # fmt: skip
    return list((tables[str(path[0])] if path and str(path[0]) in tables else Spec).model_fields)


def load(path: Path) -> Spec:
    """The Spec of a YAML file. Raises FileNotFoundError or ValueError in one line with file, line and key."""
    values, lines = read(path)
    return build(values, str(path), lines)
