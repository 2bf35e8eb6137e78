"""A published result and how ours is computed, as a YAML file: the figures, their source, a spec or a model's files.

The files of the project lie in specs/reproduce/. The section `spec` has the fields of an ordinary spec, of one budget
and, where there is no section `model`, of one defense. Torch-free; `bench.commands.reproduce` runs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len
from pydantic import ValidationError, model_validator

from bench.atomic import file_hash
from bench.planning import catalog, shipped_specs
from bench.planning.spec import Name, Spec, Strict, build
from bench.planning.strict_yaml import read

FOLDER = shipped_specs.folder() / "reproduce"
WORST = "worst case"
Percent = Annotated[float, Ge(0), Le(100)]
Prose = Annotated[str, Len(1, 1000)]


class Published(Strict):
    """One published figure: an accuracy in percent over the first `n` test images.

    `of`: `clean`, the label of an attack in the tables, or `worst case`. Ours has to be within `tolerance` points of
    `value`; or at least `at_least`, a certified accuracy, which no attack can undercut.
    """

    of: Name
    value: Percent | None = None
    at_least: Percent | None = None
    n: Annotated[int, Gt(0)]
    tolerance: Annotated[float, Ge(0)] = 0.0

    @model_validator(mode="after")
    def _one(self) -> Published:
        if (self.value is None) == (self.at_least is None):
            raise ValueError(f"'{self.of}' needs either a value or at_least")
        return self

    def holds(self, ours: float) -> bool:
        """Is our accuracy, in percent, in agreement? Both sides are rounded to a hundredth, as papers print them."""
        if self.at_least is not None:
            return round(ours - self.at_least + self.tolerance, 2) >= 0
        assert self.value is not None
        return round(abs(ours - self.value), 2) <= self.tolerance


class ModelFiles(Strict):
    """A published model: its net (`FILE.py:FUNCTION`) and checkpoint by name, the hash of the checkpoint, and `obtain`:
    where the checkpoint is from and what the function has to build."""

    file: Name
    checkpoint: Name
    sha256: Annotated[str, Len(64, 64)]
    obtain: Prose

    def problem(self, folder: Path | None) -> str:
        """Why the model cannot be loaded from this folder, in one line; empty if it can."""
        if folder is None:
            return f"no folder of models: --zoo or BENCH_ZOO names one with {self.checkpoint} and {self.file}"
        for name in (self.checkpoint, self.file.partition(":")[0]):
            if not (folder / name).is_file():
                return f"no {name} in {folder}; {self.obtain}"
        at = folder / self.checkpoint
        found = str(file_hash(at))
        if found != self.sha256:
            return f"{at} has SHA-256 {found[:12]}..., expected {self.sha256[:12]}...: other weights"
        return ""


class Reproduction(Strict):
    """What is published (`source`: paper, table or repository), and how ours is computed: `spec`, and the files of
    `model` unless we train it. `tolerance` says why the tolerances are what they are, `deviations` what differs.
    `needs: gpu` marks what takes days without one."""

    title: Name
    source: Prose
    published: Annotated[list[Published], Len(1)]
    tolerance: Prose
    deviations: Prose
    needs: Literal["cpu", "gpu"] = "cpu"
    model: ModelFiles | None = None
    spec: dict[str, Any]


def names() -> list[str]:
    """The reproductions that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(named: str) -> tuple[str, Reproduction, Spec]:
    """Name, content and spec of a reproduction. `named`: one of `names()`, or a YAML file.

    Raises LookupError for an unknown name, FileNotFoundError or ValueError in one line with file and key.
    """
    path = Path(named) if named.endswith((".yaml", ".yml")) else FOLDER / f"{named}.yaml"
    if path.parent == FOLDER and not path.is_file():
        raise LookupError(f"no reproduction '{named}'.{catalog.suggest(named, names())} Known: {', '.join(names())}")
    values, lines = read(path)
    try:
        found = Reproduction.model_validate(values)
    except ValidationError as error:
        raise ValueError(catalog.describe(error, str(path))) from None
    inner = {place[1:]: line for place, line in lines.items() if place[:1] == ("spec",)}
    filled = {"name": path.stem, **({"defenses": ["standard"]} if found.model else {}), **found.spec}
    spec = build(filled, str(path), inner)
    rows = sum(len(defense.combinations()) for defense in spec.defenses)
    if rows > 1 or len(spec.threat.eps) > 1:
        raise ValueError(f"{path}: spec has {rows} defenses and {len(spec.threat.eps)} budgets; expected one of each")
    return path.stem, found, spec
