"""The nested fields of a job: data set, plug-ins, threat, normalization. Their JSON names are part of job keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

# fields of jobs and of the classes below whose JSON name differs from the Python name
JSON_NAMES = {
    "settings": "set",
    "training": "train",
    "normalization": "normalise",
    "randomized": "randomised",
}


# how `bench.planning.job_json` checks the types of a job that it has read
STRICT = {"revalidate_instances": "always", "strict": True, "allow_inf_nan": False}


def json_names(fields_of: type[Any]) -> dict[str, str]:
    """The field of a dataclass that each JSON name stands for."""
    return {JSON_NAMES.get(field.name, field.name): field.name for field in dataclasses.fields(fields_of)}


def as_json(value: Any) -> Any:
    """A field's value as JSON: a tuple is a list, a nested field an object."""
    if isinstance(value, tuple):
        return [as_json(each) for each in value]
    return value.to_json() if isinstance(value, JsonField) else value


class JsonField:
    """Base of the dataclasses below. In JSON, a field is left out while it has its default None."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    def to_json(self) -> dict[str, Any]:
        """The JSON object of this field."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        own = {name: value for name, value in vars(self).items() if value is not None or defaults[name] is not None}
        return {JSON_NAMES.get(name, name): as_json(value) for name, value in own.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The field of a JSON object. Raises KeyError or TypeError where the object has other names."""
        names = json_names(cls)
        return cls(**{names[name]: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


@dataclass(frozen=True)
class JobThreat(JsonField):
    """Norm and radius as text, which is exact. `bench.core.threat.Threat` is the same with tensor operations."""

    norm: str
    eps: str


@dataclass(frozen=True)
class PluginChoice(JsonField):
    """A plug-in with all its settings and its revision. `sha256`: hash of the file of a user's own architecture."""

    name: str
    settings: dict[str, Any]
    revision: int = 1
    sha256: str | None = None


@dataclass(frozen=True)
class DataChoice(JsonField):
    """Data set, numbers of training and validation images, image size; `content`: hash of a folder's images."""

    name: str
    train: int
    validation: int
    size: int | None
    content: str | None = None


@dataclass(frozen=True)
class Normalization(JsonField):
    """Mean and standard deviation of each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
