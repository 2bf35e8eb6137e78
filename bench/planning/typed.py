"""What was typed on the command line. A module of its own, so that `bench --help` need not import pydantic and YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Options:
    """What was typed; None or empty means "not typed"."""

    spec: Path | None = None
    dataset: str | None = None
    size: int | None = None
    model: list[str] = field(default_factory=list)
    defense: list[str] = field(default_factory=list)
    attack: list[str] = field(default_factory=list)
    norm: str | None = None
    eps: list[str] = field(default_factory=list)
    train_eps: str | None = None
    epochs: int | None = None
    seeds: list[str] = field(default_factory=list)
    n: int | None = None
    train_n: int | None = None
    recipe: str | None = None
    set: list[str] = field(default_factory=list)
    grid: list[str] = field(default_factory=list)
    baseline: bool = True
    validation: int | None = None
    checks: str | None = None
