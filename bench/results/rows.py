"""Data frame -> rows: one trained configuration, all its seeds together, under one budget."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from bench.results.facts import BY_VALIDATION, draws_of
from bench.results.evaluations import Evaluation
from bench.results.provisional import why_provisional
from bench.results.labels import disambiguate
from bench.results.cost import attack_seconds, busy, of_trainings, over_standard, standard_times
from bench.results.worst_case import SeedValues, ByAttack, seed_accuracies, worst_case
from bench.soundness.checks import Finding, Verdict
from bench.core.epsilon import Epsilon
from bench.core.stats import wilson
from bench.data import datasets
from bench.planning.job import IMPORTED
from bench.records.store import Store

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

RADII = (0.0, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Accuracy:
    """What the model of a row gets correct: shares in [0,1] by seed.

    - `clean`: without an attack. `attacks`: under each attack, by its label. `autoattack`: that of `attacks` which is
      AutoAttack with its authors' settings.
    - `worst`: correct on clean images and under every attack, for those of the seeds that have the full attack set;
      `single`: the same of a stochastic model by single noise draws in place of the deployed rule.
    - `certified`: by L2 radius, of the `certify` with most seeds done; `acr`: its average certified radius in pixel
      units, in which a wrong image counts as 0.
    - `collapsed`: seeds near chance. They are part of every mean; tables count them and show the mean of the others.
    - `robust`: for each seed in `worst` which images are robust (bool); `share`: of a stochastic model, the share of
      draws with the correct class.
    """

    clean: SeedValues
    autoattack: SeedValues
    attacks: dict[str, SeedValues]
    worst: SeedValues
    single: SeedValues
    certified: dict[float, SeedValues]
    acr: SeedValues
    collapsed: tuple[int, ...]
    robust: dict[int, np.ndarray[Any, Any]] = field(compare=False, repr=False)
    share: dict[int, np.ndarray[Any, Any]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Cost:
    """What a row cost, mean over its seeds; NaN where unknown.

    - `train_seconds`, `peak_memory_mb`: of the training; `train_work`: its steps in forward passes over the training
      images.
    - `attack_seconds`: of all evaluations of a seed together.
    - `ratio`: training time over that of `standard` on the same device, recipe and use of the machine.
    - `shared`: the machine did other jobs during some of the trainings.
    """

    train_seconds: float = math.nan
    train_work: float = math.nan
    attack_seconds: float = math.nan
    peak_memory_mb: float = math.nan
    ratio: float = math.nan
    shared: bool = False


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of a row come from.

    - `train_key`: key of the training, of the first seed. `keys`: of each seed in the worst case, its evaluations.
    - `entries`: for each attack label and seed the evaluation that counts.
    - `device`, `commit`: of trainings and attacks, joined where they differ.
    - `selected`: which images chose the epoch whose weights are evaluated.
    - `draws`: the most noise draws that an attack averages over in a step (EOT), 0 if none does.
    """

    train_key: str
    keys: dict[int, tuple[str, ...]]
    entries: ByAttack = field(compare=False, repr=False)
    device: str
    commit: str
    selected: str
    draws: int


@dataclass(frozen=True)
class Row:
    """One trained configuration (all seeds together) under one budget.

    `method`: the defense with the settings that tell it from other rows. `config`: as in `frame`. `provisional`: why
    the row is not ranked. `findings` and `verdict` are filled in by `bench.soundness.verdicts`: the most severe finding
    of each check over the seeds.
    """

    dataset: str
    model: str
    defense: str
    method: str
    norm: str | None
    eps: str | None
    eps_value: float
    train_eps: str
    recipe: str
    epochs: int
    deploys: str
    seeds: tuple[int, ...]
    config: str
    accuracy: Accuracy
    cost: Cost
    provenance: Provenance
    provisional: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    verdict: Verdict = "NOT CHECKED"


def rows(store: Store, known: Iterable[Evaluation], radii: Iterable[float] = RADII) -> list[Row]:
    """One Row for each trained configuration and budget, ordered by method.

    `radii`: L2 radii at which certified accuracy is taken; the budget of an L2 row is one beside them.

    Worst case of a seed: share of images correct under clean *and* every attack at this budget, over the largest prefix
    of the test set that all of them, in all counted seeds, share. A seed counts if it has every attack of the row
    done; an attack that no seed supports is left out of the set and shown as unsupported.
    """
    groups: dict[str, list[Evaluation]] = {}
    for entry in known:
        if entry.measures is None:  # what measures something other than robustness is in no accuracy
            groups.setdefault(entry.config, []).append(entry)
    times = standard_times([entry for group in groups.values() for entry in group])
    found, asked = [], tuple(radii)
    for group in groups.values():
        budgets: set[tuple[str | None, str | None]] = {(e.norm, e.eps) for e in group if e.norm} or {(None, None)}
        for budget in sorted(budgets, key=lambda b: (b[0] or "", Epsilon(b[1] or 0))):
            # clean and certify do not depend on the budget: they stand in every row
            entries = [e for e in group if e.norm is None or (e.norm, e.eps) == budget]
            found.append(_row(store, entries, times, asked))
    return sorted(disambiguate(store, found), key=lambda row: (row.method, row.config))


def _row(store: Store, entries: list[Evaluation], times: dict[tuple[Any, ...], float], radii: tuple[float, ...]) -> Row:
    picked = _pick(entries)
    first = min(entries, key=lambda e: (e.norm is None, e.seed, e.key))
    seeds = tuple(sorted({e.seed for e in entries}))
    attacks = {name: found for name, found in picked.items() if _any(found).norm}
    clean = {name: found for name, found in picked.items() if _any(found).attack == "clean"}
    certify = [found for name, found in sorted(picked.items()) if not _any(found).norm and name not in clean]
    certify.sort(key=lambda found: -sum(e.state == "done" for e in found.values()))
    certified, acr = _certified(store, certify[0], _radii(first, radii)) if certify else ({}, SeedValues({}, 0, {}))
    by_attack = {name: seed_accuracies(found) for name, found in attacks.items()}
    eps = first.eps_value if first.norm else 0.0
    worst, single, keys, robust, share = worst_case(store, picked, seeds, eps)
    suites = [by_attack[name] for name, found in attacks.items() if _is_autoattack(store, _any(found))]
    clean_values = seed_accuracies(next(iter(clean.values()), {}))
    draws = {name: _draws(store, found) for name, found in attacks.items()}
    accuracy = Accuracy(
        clean=clean_values,
        autoattack=next((each for each in suites if each.values), suites[0] if suites else SeedValues({}, 0, {})),
        attacks=by_attack,
        worst=worst,
        single=single,
        certified=certified,
        acr=acr,
        collapsed=_collapsed(first.dataset, clean_values, [clean_values, *by_attack.values(), worst], seeds),
        robust=robust,
        share=share,
    )
    cost = Cost(
        train_seconds=of_trainings(entries, lambda e: e.train_seconds),
        train_work=of_trainings(entries, lambda e: e.work_per_image_f * e.epochs),
        attack_seconds=attack_seconds(picked),
        peak_memory_mb=of_trainings(entries, lambda e: e.peak_memory_mb),
        ratio=over_standard(entries, times),
        shared=any(busy(e) for e in entries),
    )
    provenance = Provenance(
        train_key=first.train_key,
        keys=keys,
        entries=picked,
        device=_joined(name for e in entries for name in (e.train_device, e.device)),
        commit=_joined(e.commit and e.commit + (" (dirty)" if e.dirty is True else "") for e in entries),
        selected=_selected(first),
        draws=_most(draws) if first.deploys != "deterministic" else 0,
    )
    row = Row(
        **{name: getattr(first, name) for name in ("dataset", "model", "defense", "norm", "eps", "eps_value")},
        **{name: getattr(first, name) for name in ("recipe", "epochs", "deploys", "config")},
        method=first.defense_label,
        train_eps=_train_eps(first),
        seeds=seeds,
        accuracy=accuracy,
        cost=cost,
        provenance=provenance,
    )
    return replace(row, provisional=why_provisional(row, draws))


def _pick(entries: list[Evaluation]) -> ByAttack:
    """The evaluation that counts for each attack and seed: newest revision, then done, then most images."""

    def order(entry: Evaluation) -> tuple[list[int], bool, int, str]:
        version = [int(part) for part in entry.attack_version.split(".")]
        return version, entry.state == "done", entry.n, entry.key

    picked: ByAttack = {}
    for entry in sorted(entries, key=order):
        picked.setdefault(entry.attack_label, {})[entry.seed] = entry
    return picked


def _any(found: dict[int, Evaluation]) -> Evaluation:
    """One of the evaluations of an attack, for what its seeds have in common."""
    return next(iter(found.values()))


def _draws(store: Store, found: dict[int, Evaluation]) -> int:
    entry = _any(found)
    return draws_of(entry.attack, store.evaluation(entry.key).attack.settings)


def _most(draws: dict[str, int]) -> int:
    """The most draws of the model's noise that a step of one of these attacks averages over; 0 where none does."""
    most = max(draws.values(), default=0)
    return most if most > 1 else 0


def _selected(entry: Evaluation) -> str:
    """By which images the weights were chosen."""
    if entry.recipe == IMPORTED:
        return "unknown"
    return "validation" if entry.defense_label.endswith(BY_VALIDATION) else "last epoch"


def _joined(names: Iterable[str | None]) -> str:
    return "; ".join(sorted({name for name in names if name})) or "unknown"


def _train_eps(entry: Evaluation) -> str:
    if entry.train_eps is None:
        return "–"
    same = entry.train_norm == entry.norm or entry.norm is None
    return str(entry.train_eps) if same else f"{entry.train_norm} {entry.train_eps}"


def _radii(entry: Evaluation, radii: tuple[float, ...]) -> list[float]:
    return sorted({*radii, *([entry.eps_value] if entry.norm == "L2" else [])})


def _is_autoattack(store: Store, entry: Evaluation) -> bool:
    """The suite of its authors in full; `rand` and custom suites have their own column only."""
    version = store.evaluation(entry.key).attack.settings.get("version", "standard")
    return entry.attack == "autoattack" and version in ("standard", "plus")


def _certified(store: Store, found: dict[int, Evaluation], radii: list[float]) -> tuple[dict[float, SeedValues], SeedValues]:
    """Share of images that are right with a certificate of at least each radius, and mean radius x [right]."""
    cell = seed_accuracies(found)
    shares: dict[float, dict[int, float]] = {radius: {} for radius in radii}
    means = dict[int, float]()
    for seed in cell.values:
        samples = store.samples(found[seed].key, ("correct", "radius"))
        if "radius" not in samples:
            none = SeedValues({}, 0, dict.fromkeys(found, ("no certificate", "")))
            return dict.fromkeys(radii, none), none
        right, reach = samples["correct"].astype(bool), samples["radius"]
        for radius in radii:
            shares[radius][seed] = float((right & (reach >= radius)).mean())
        means[seed] = float((right * reach).mean())
    return {radius: replace(cell, values=values) for radius, values in shares.items()}, replace(cell, values=means)


def _collapsed(dataset: str, clean: SeedValues, cells: list[SeedValues], seeds: tuple[int, ...]) -> tuple[int, ...]:
    """Seeds at chance on clean images, or in some column below a tenth of the mean of the others, beyond noise."""
    facts = datasets.KNOWN.get(dataset)
    found = {seed for seed, value in clean.values.items() if facts and value <= 1.5 / facts.classes}
    for cell in cells:
        for seed, value in cell.values.items():
            others = [v for s, v in cell.values.items() if s != seed]
            if others and value < fmean(others) / 10 and wilson(round(value * cell.n), cell.n)[1] < fmean(others):
                found.add(seed)
    return tuple(seed for seed in seeds if seed in found)
