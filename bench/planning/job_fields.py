"""The nested fields of a job: data set, plug-ins, threat, normalization. Their JSON names are part of job keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class JobThreat:
    """Norm and radius as text, which is exact. `bench.core.threat.Threat` is the same with tensor operations."""

    norm: str
    eps: str

    def to_json(self) -> dict[str, Any]:
        """The JSON object of a threat."""
        return {"norm": self.norm, "eps": self.eps}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> JobThreat:
        """The threat of a JSON object."""
        return cls(values["norm"], values["eps"])


@dataclass(frozen=True)
class PluginChoice:
    """A plug-in with all its settings and its revision. `sha256`: hash of the file of a user's own architecture."""

    name: str
    settings: dict[str, Any]
    revision: int = 1
    sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of a choice."""
        own = {} if self.sha256 is None else {"sha256": self.sha256}
        return {"name": self.name, "set": self.settings, "revision": self.revision, **own}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PluginChoice:
        """The choice of a JSON object."""
        return cls(values["name"], values["set"], values["revision"], values.get("sha256"))


@dataclass(frozen=True)
class DataChoice:
    """Data set, numbers of training and validation images, image size; `content`: hash of a folder's images."""

    name: str
    train: int
    validation: int
    size: int
    content: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of a choice."""
        return {name: value for name, value in vars(self).items() if name != "content" or value}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DataChoice:
        """The choice of a JSON object."""
        return cls(**values)


@dataclass(frozen=True)
class Normalization:
    """Mean and standard deviation of each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of a normalization."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Normalization:
        """The normalization of a JSON object."""
        return cls(tuple(values["mean"]), tuple(values["std"]))
