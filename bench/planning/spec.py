"""A spec, as the user writes it in a YAML file or with command-line options, and its validation.

Unknown and duplicate keys are errors with file, line and key: a misspelled `beta` must never train the default.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import BaseModel, ConfigDict, PlainValidator, ValidationError, field_validator, model_validator

from bench.core.epsilon import Epsilon, parse_eps
from bench.planning.catalog import check_numbers, family, suggest
from bench.planning.strict_yaml import read

Name = Annotated[str, Len(1, 200)]
EACH = "each"
TrainEps = Annotated[Epsilon | Literal["each"], PlainValidator(lambda value: EACH if value == EACH else Epsilon(value))]


def norm_named(value: Any) -> Any:
    """The norm in the spelling of a spec; anything else as it is."""
    return {"linf": "Linf", "l2": "L2", "l1": "L1"}.get(str(value).lower(), value)


class Strict(BaseModel):
    """A section of a YAML file: unknown keys, and numbers that another number is read as, are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    _numbers = field_validator("*", mode="before")(classmethod(check_numbers))


class _Entry(Strict):
    """A plug-in. `set` gives settings; `grid` lists values: one job for each combination of them."""

    name: Name
    set: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}

    def combinations(self) -> list[dict[str, Any]]:
        """The settings of each combination. Raises ValueError for a setting in both, or an empty list."""
        both = self.set.keys() & self.grid.keys()
        if both:
            raise ValueError(f"{self.name}: '{min(both)}' is in set and in grid; expected one of them")
        empty = [name for name, values in self.grid.items() if not values]
        if empty:
            raise ValueError(f"{self.name}: grid '{empty[0]}' is empty; expected a list of values")
        combined = itertools.product(*self.grid.values())
        return [{**self.set, **dict(zip(self.grid, values, strict=True))} for values in combined]


class DataSpec(Strict):
    """`name`: see `bench list datasets`, or `folder:PATH`; `size` resizes a folder's images.

    `test`: images that each attack gets (null: 1000, or all if there are fewer); `train`: training images (null: all).
    `validation`: images split off train by a fixed seed. `split`: the images that are attacked. Settings should be
    chosen on the validation images, which are never ranked.
    """

    name: Name = "digits"
    test: Annotated[int, Gt(0)] | None = None
    train: Annotated[int, Gt(0)] | None = None
    validation: Annotated[int, Ge(0)] = 0
    split: Literal["test", "validation"] = "test"
    size: Annotated[int, Ge(4), Le(512)] | None = None


class ModelSpec(Strict):
    """An architecture of `bench list models`, or `timm:NAME`, and its settings."""

    name: Name
    set: dict[str, Any] = {}

    @model_validator(mode="after")
    def _of_a_package(self) -> ModelSpec:
        self.name, own = family(self.name)
        self.set = {**own, **self.set}
        return self


class ThreatSpec(Strict):
    """`eps`: the budgets of the attacks. `train_eps`: that of adversarial training (default: the largest `eps`); `each`
    trains once for each `eps` and attacks that training at this eps only."""

    norm: Literal["Linf", "L2", "L1"] = "Linf"
    eps: Annotated[list[Epsilon], Len(1)]
    train_eps: TrainEps | None = None

    _norm = field_validator("norm", mode="before")(norm_named)

    @field_validator("eps", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _possible(self) -> ThreatSpec:
        self.eps = sorted({parse_eps(eps, self.norm) for eps in self.eps})
        if self.train_eps is not None and self.train_eps != EACH:
            parse_eps(self.train_eps, self.norm)
        return self


class TrainSpec(Strict):
    """The recipe of every training. A null is filled from the data set's default; `bench plan` prints the result.

    `eps_warmup` and `lr_warmup` are fractions of training in which eps and learning rate rise from 0; `lr` is the peak
    of the schedule. `weight_decay_on: weights` excludes biases and normalization layers. `grad_clip`: largest L2 norm
    of the gradient, 0 for none. `label_smoothing`: share of each label spread over all classes. `precision` is that of
    training passes; weights and evaluations are fp32. `auto` times one batch at the start of the training and takes
    bf16 where it is 1.5 times as fast as fp32 on that device; the record says which it was.

    `average` deploys averaged weights: `ema` over updates (with `ema_decay`), `swa` over the ends of epochs after the
    fraction `swa_start` of training; `average_bn` gives them the training net's BatchNorm statistics (`live`, the
    default of ema) or those of one clean pass (`clean`, that of swa). `keep: best` also saves the weights of the epoch
    with the best validation accuracy, measured every `choose_every` epochs, under PGD-10 if the defense trains at a
    budget; best and last are both evaluated. `guard` stops a training that collapsed and marks it.
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
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    average: Literal["none", "ema", "swa"] = "none"
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.995
    swa_start: Annotated[float, Ge(0), Lt(1)] = 0.5
    average_bn: Literal["live", "clean"] | None = None
    keep: Literal["last", "best"] = "last"
    choose_every: Annotated[int, Gt(0)] = 1
    guard: bool = True

    # newer than the first records: left out of a job while they have their default, so that old keys stay valid
    settings_added_later: ClassVar[tuple[str, ...]] = (
        *("lr_warmup", "weight_decay_on", "grad_clip", "label_smoothing", "precision"),
        *("average", "ema_decay", "swa_start", "average_bn", "keep", "choose_every", "guard"),
    )
    # settings without effect unless another one has one of these values
    idle: ClassVar[dict[str, tuple[str, tuple[str, ...]]]] = {
        "ema_decay": ("average", ("ema",)),
        "swa_start": ("average", ("swa",)),
        "average_bn": ("average", ("ema", "swa")),
        "choose_every": ("keep", ("best",)),
    }


class DefenseSpec(_Entry):
    """A defense, trained once for each combination of its settings and each `train_eps`."""

    train_eps: list[Epsilon] | None = None

    @field_validator("train_eps", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return value if isinstance(value, list) or value is None else [value]


class AttackSpec(_Entry):
    """An attack or other evaluation. `n`: number of images (default: data.test, one number for all attacks,
    since the worst case is over the images that all of them share). `seeds`: attack only the first so many seeds of the
    run. `shards`: split the images into so many jobs; the result does not depend on it."""

    n: Annotated[int, Gt(0)] | None = None
    seeds: Annotated[int, Gt(0)] | None = None
    shards: Annotated[int, Gt(0)] | None = None


class Spec(Strict):
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


def build(values: dict[str, Any], where: str = "", lines: dict[tuple[Any, ...], int] | None = None) -> Spec:
    """A checked Spec from plain values. Raises ValueError in one line: where, which key, what was expected."""
    try:
        return Spec.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = first["loc"]
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
    """The keys that a section of the spec may have."""
    tables: dict[Any, type[Strict]] = {
        "data": DataSpec, "models": ModelSpec, "threat": ThreatSpec, "train": TrainSpec,
        "defenses": DefenseSpec, "attacks": AttackSpec,
    }  # fmt: skip
    return list(tables.get(path[0] if path else None, Spec).model_fields)


def load(path: Path) -> Spec:
    """The Spec of a YAML file. Raises FileNotFoundError or ValueError in one line with file, line and key."""
    values, lines = read(path)
    return build(values, str(path), lines)
