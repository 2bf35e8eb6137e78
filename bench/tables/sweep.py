"""Accuracy against a setting: rows of one defense that differ in this setting only, under the attacks that all share.

A series holds everything else fixed: data, model, recipe, the other settings. Its worst case is over the attacks that
each of its points was given, since more attacks alone lower a worst case.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from bench.core.epsilon import Epsilon
from bench.planning import catalog
from bench.planning.job import ModelJob, TrainJob
from bench.records.store import Store
from bench.results.grouping import flattened
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.results.worst_case import ByAttack, worst_case
from bench.tables.selection import NO_ROW, RowFilter

WORST, BUDGET, TRAINED = "worst case", "eps", "train_eps"


@dataclass(frozen=True)
class Point:
    """One value of the setting: its row, and a cell for each column of the series; `picked` are the evaluations of
    clean and of the shared attacks."""

    x: float
    row: Row
    cells: dict[str, SeedValues]
    picked: ByAttack


@dataclass(frozen=True)
class Series:
    """Points in order of `setting`, under one budget.

    - `fixed`: how the series differs from the other series of the same defense.
    - `seeds`: those that every point has (all, if there is none); means are over these, since seeds differ.
    - `left_out`: attacks that only some points had.
    - `standard`: the undefended baseline.
    """

    defense: str
    setting: str
    fixed: str
    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    left_out: tuple[str, ...]
    standard: Point | None

    @property
    def row(self) -> Row:
        """Any of its rows, for what they have in common."""
        return self.points[0].row

    @property
    def place(self) -> str:
        """`mnist, lenet5, Linf eps 0.1`."""
        row = self.row
        budget = "no attack" if not row.norm else row.norm if self.setting == BUDGET else f"{row.norm} eps {row.eps}"
        return f"{row.dataset}, {row.model}, {budget}"

    def mean(self, cell: SeedValues) -> SeedValues:
        """The cell over the seeds that every point has."""
        return cell.only(self.seeds)

    @property
    def columns(self) -> list[str]:
        """Clean, the shared attacks or certificates, the worst case."""
        return list(self.points[0].cells)


def value(job: ModelJob, setting: str) -> float | None:
    """The setting of a training as a number; None where it has none. Raises ValueError where it is no number."""
    found: Any
    if setting == TRAINED:
        found = job.threat.eps if job.threat else None
    elif setting.startswith("train."):
        found = job.training.get(setting.removeprefix("train."))
    else:
        found = {**_defaults(job.defense.name), **job.defense.settings}.get(setting)
    if found is None:
        return None
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return float(found)
    try:
        return float(Epsilon(found))
    except ValueError:
        raise ValueError(f"{setting} of {job.defense.name} is {found!r}; a sweep needs numbers") from None


def _defaults(defense: str, young: bool = True) -> dict[str, Any]:
    """Of the settings that are younger than the first records, which are at their default there; or of all."""
    plugin = catalog.find("defenses", defense)
    if plugin is None:
        return {}
    added = plugin.constant("settings_added_later", ())
    known = {field.name: field.default for field in plugin.fields} | plugin.constant("retired_settings", {})
    return {name: default for name, default in known.items() if name in added or not young}


def sweep(
    store: Store, rows: Iterable[Row], defense: str, setting: str, where: RowFilter, least: int = 2
) -> list[Series]:
    """Every series of a defense with at least `least` values of a setting: one of its own, `train_eps` (trained at),
    `eps` (attacked), or `train.lr` and the like.

    Raises LookupError where there is none, and says why.
    """
    asked = [row for row in rows if where.takes(row)]
    found = [row for row in asked if row.defense == defense]
    if not asked and where == RowFilter():
        raise LookupError(NO_ROW)
    if not found:
        known = sorted({row.defense for row in asked})
        said = catalog.suggest(defense, known) or f" Known: {', '.join(known) or 'none'}."
        raise LookupError(f"no row of defense '{defense}' with this data set, norm and eps.{said}")
    groups: dict[str, dict[float, Row]] = {}
    met: set[float] = set()
    for row in found:
        job = store.model_job(row.provenance.train_key)
        x = (row.eps_value if row.norm else None) if setting == BUDGET else value(job, setting)
        if x is not None:
            met.add(x)
            groups.setdefault(_group(job, row, setting), {})[x] = row
    if not met:
        raise LookupError(f"{defense} has no setting '{setting}'.{_settings(defense, setting)}")
    swept = {key: by for key, by in groups.items() if len(by) >= least}
    if not swept:
        values = ", ".join(f"{x:g}" for x in sorted(met))
        raise LookupError(f"{defense} has no two rows that differ in {setting} alone; its values: {values}")
    names = _disambiguate(list(swept), defense)
    plain = [row for row in asked if row.defense == "standard"]
    return [_series(store, defense, setting, names[key], by, plain) for key, by in swept.items()]


def _settings(defense: str, asked: str) -> str:
    plugin = catalog.find("defenses", defense)
    known = [*(field.name for field in (plugin.fields if plugin else ())), TRAINED, BUDGET]
    return catalog.suggest(asked, known) or f" Known: {', '.join(known)}."


def _group(job: ModelJob, row: Row, setting: str) -> str:
    """What is fixed in a series, as sorted JSON: all that a training is but for its seed and the setting."""
    own = {**_defaults(job.defense.name), **job.defense.settings}
    fixed = replace(job, defense=replace(job.defense, settings={k: v for k, v in own.items() if k != setting}))
    if isinstance(fixed, TrainJob) and fixed.threat and setting == TRAINED:
        fixed = replace(fixed, threat=replace(fixed.threat, eps=""))
    if isinstance(fixed, TrainJob) and setting.startswith("train."):
        training = {k: v for k, v in fixed.training.items() if k != setting.removeprefix("train.")}
        fixed = replace(fixed, training=training)
    budget = (row.norm, None if setting == BUDGET else row.eps)
    return json.dumps([fixed.without_seed(), row.provenance.selected, budget], sort_keys=True)


def _disambiguate(keys: list[str], defense: str) -> dict[str, str]:
    """In what the series differ from each other, apart from the budget: `structure=diag`."""
    flat = {key: flattened(json.loads(key)[0]) for key in keys}
    names = sorted(set().union(*flat.values()))
    differ = [name for name in names if len({str(facts.get(name)) for facts in flat.values()}) > 1]
    short = {name: name.removeprefix("defense.set.") for name in differ}
    usual = {name: str(default) for name, default in _defaults(defense, young=False).items()}
    told = {key: [(short[n], str(flat[key].get(n))) for n in differ] for key in keys}
    return {key: ", ".join(f"{n}={v}" for n, v in each if usual.get(n) != v) for key, each in told.items()}


def _series(store: Store, defense: str, setting: str, fixed: str, by: dict[float, Row], standard: list[Row]) -> Series:
    rows = [by[x] for x in sorted(by)]
    shared = set.intersection(*({*row.provenance.entries} for row in rows))
    left_out = sorted({name for row in rows for name in row.accuracy.attacks} - shared)
    points = tuple(point(store, x, by[x], shared) for x in sorted(by))
    baseline = next((row for row in standard if _same_footing(store, row, rows[0], setting)), None)
    anchor = point(store, 0.0, baseline, shared) if baseline is not None and setting != BUDGET else None
    seeds = set.intersection(*({*row.seeds} for row in rows)) or {seed for row in rows for seed in row.seeds}
    return Series(defense, setting, fixed, points, tuple(sorted(seeds)), tuple(left_out), anchor)


def point(store: Store, x: float, row: Row, shared: set[str]) -> Point:
    """The accuracies of a row under the evaluations in `shared` alone: clean, attacks, certificates, worst case."""
    accuracy, entries = row.accuracy, row.provenance.entries
    attacks = [name for name in sorted(shared) if name in accuracy.attacks]
    picked = {name: entries[name] for name in ("clean", *attacks) if name in entries and name in shared}
    cells = {"clean": accuracy.clean, **{name: accuracy.attacks[name] for name in attacks}}
    if row.norm and attacks:
        invalid = row.verdict == "INVALID"
        cells[WORST] = accuracy.worst if invalid else worst_case(store, picked, row.seeds, row.budget).accuracy
    if not row.norm:
        cells |= {f"certified at L2 {radius:g}": values for radius, values in sorted(accuracy.certified.items())}
    return Point(x, row, cells, picked)


def footing(job: ModelJob) -> dict[str, Any]:
    """What two trainings must have in common to be compared: data, model, recipe. (The warm-up of a budget that
    a defense does not use stands in no job.)"""
    training = {name: each for name, each in job.training.items() if name != "eps_warmup"}
    return {"data": job.data, "model": job.model, "recipe": job.recipe, "train": training}


def _same_footing(store: Store, row: Row, other: Row, setting: str) -> bool:
    budget = (row.norm, row.eps) == (other.norm, other.eps)
    a, b = footing(store.model_job(row.provenance.train_key)), footing(store.model_job(other.provenance.train_key))
    for facts in (a, b) if setting.startswith("train.") else ():
        facts["train"].pop(setting.removeprefix("train."), None)
    return budget and a == b


def with_anchor(series: Series) -> Series:
    """With `standard` as training at a budget of 0, which it is, in front."""
    if series.setting != TRAINED or series.standard is None or series.points[0].x == 0:
        return series
    return replace(series, points=(series.standard, *series.points))
