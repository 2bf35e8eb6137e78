"""Evaluations -> rows: one trained configuration, all its seeds together, under one budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bench.core.epsilon import Epsilon
from bench.planning.job import IMPORTED
from bench.records.store import Store
from bench.results.certificates import RADII, certificates
from bench.results.cost import Cost, cost_of, standard_times
from bench.results.evaluations import EvaluationResult
from bench.results.facts import BY_VALIDATION, draws_of
from bench.results.grouping import grouped
from bench.results.labels import disambiguate, named
from bench.results.learning import collapsed_seeds, unlearned_seeds
from bench.results.provisional import why_provisional
from bench.results.seed_values import SeedValues, seed_accuracies
from bench.results.worst_case import ByAttack, worst_case
from bench.soundness.checks import Finding, Verdict

if TYPE_CHECKING:
    import numpy as np

ACCURACY = "_accuracy"  # how the name of a measure ends that is a share of images
AUDITED = 100  # images that the full suite must judge where it judges a sample


@dataclass(frozen=True)
class Accuracy:
    """What the model of a row gets correct: shares in [0,1] by seed.

    - `clean`: without an attack. `attacks`: under each attack, by its label. `autoattack`: that of `attacks` which is
      AutoAttack with its authors' settings.
    - `worst`: correct on clean images and under every attack, for those of the seeds that have the full attack set;
      `single`: the same of a stochastic model by single noise draws in place of the deployed rule.
    - `proved`: by label, what an evaluation proves at the row's budget, a lower bound of robust accuracy.
    - `measured`: by label, shares that an evaluation measures beside robustness, such as accuracy under corruption.
    - `certified`: by L2 radius, of the `certify` with most seeds done; `acr`: its average certified radius in pixel
      units, in which a wrong image counts as 0.
    - `collapsed`: seeds far below the others, and those in `unlearned`. They are part of every mean; tables count them
      and show the mean of the others. `unlearned`: seeds that are no better than a guess, with what shows it.
    - `robust`: for each seed in `worst` which images are robust (bool); `share`: of a stochastic model, the share of
      draws with the correct class.
    """

    clean: SeedValues
    autoattack: SeedValues
    attacks: dict[str, SeedValues]
    worst: SeedValues
    single: SeedValues
    proved: dict[str, SeedValues]
    measured: dict[str, SeedValues]
    certified: dict[float, SeedValues]
    acr: SeedValues
    collapsed: tuple[int, ...]
    unlearned: dict[int, str]
    robust: dict[int, np.ndarray[Any, Any]] = field(compare=False, repr=False)
    share: dict[int, np.ndarray[Any, Any]] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Provenance:
    """Where the numbers of a row come from.

    - `train_key`: key of the training, of the first seed. `keys`: of each seed in the worst case, its evaluations.
    - `entries`: for each attack label and seed the evaluation that counts; `measured`: likewise beside robustness.
    - `device`, `commit`: of trainings and attacks, joined where they differ.
    - `selected`: which images chose the epoch whose weights are evaluated.
    - `draws`: the most noise draws that an attack averages over in a step (EOT), 0 if none does.
    """

    train_key: str
    keys: dict[int, tuple[str, ...]]
    entries: ByAttack = field(compare=False, repr=False)
    measured: ByAttack = field(compare=False, repr=False)
    device: str
    commit: str
    selected: str
    draws: int


@dataclass(frozen=True)
class Row:
    """One trained configuration (all seeds together) under one budget.

    `method`: the defense with the settings in which it differs from other rows; `name`: with the architecture too, if
    most rows of the same data set and budget have another. `config`: hash of the training job without its seed, of the
    attacked weights and of the split. `provisional`: why the row is ranked behind the others, with a dagger.
    `findings` and `verdict` are filled in by `bench.soundness.verdicts`: the most severe finding of each check over
    the seeds.
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
    name: str = ""

    @property
    def evaluations(self) -> list[EvaluationResult]:
        """The evaluations that count, of every attack and seed."""
        return [entry for by_seed in self.provenance.entries.values() for entry in by_seed.values()]

    @property
    def in_worst_case(self) -> list[EvaluationResult]:
        """Those of the evaluations that the worst case is the minimum of."""
        counted = {key for keys in self.provenance.keys.values() for key in keys}
        return [entry for entry in self.evaluations if entry.key in counted]

    @property
    def budget(self) -> float:
        """The radius attacked as a number; 0 for a row without attacks."""
        return self.eps_value if self.norm else 0.0


def rows(store: Store, known: Iterable[EvaluationResult], radii: Iterable[float] = RADII) -> list[Row]:
    """One Row for each trained configuration and budget, ordered by method.

    Args:
        store: Where the evaluations are from.
        known: The evaluations. Of those that measure something other than robustness, only accuracies have a column,
            in rows that others make.
        radii: L2 radii of certified accuracy; rows attacked in L2 have their budget as one more.

    Returns:
        Rows whose worst case of a seed is the share of images that are correct under clean *and* every attack at this
        budget, over the longest prefix of the test set that all of them, in all counted seeds, share. A seed counts if
        every attack of the row is done; an attack that no seed supports is left out and shown as unsupported. Attacks
        and seeds of which nothing has run, as after a run that was stopped or changed, are no part of a row.
    """
    listed = list(known)
    attacking = [entry for entry in listed if entry.measures is None]
    measured = grouped((e for e in listed if (e.measures or "").endswith(ACCURACY)), lambda entry: entry.config)
    times = standard_times(attacking)
    found = []
    for config, planned in grouped(attacking, lambda entry: entry.config).items():
        group, beside = _ran(planned), _pick(_ran(measured.get(config, [])))
        budgets: set[tuple[str | None, str | None]] = {(e.norm, e.eps) for e in group if e.norm}
        budgets = budgets or {(None, None) for _ in group}
        for budget in sorted(budgets, key=lambda b: (b[0] or "", Epsilon(b[1] or 0))):
            # clean and certify do not depend on the budget and belong to every row
            entries = [e for e in group if e.norm is None or (e.norm, e.eps) == budget]
            found.append(_row(store, entries, beside, times, radii))
    return sorted(named(disambiguate(store, found)), key=lambda row: (row.method, row.config))


def _ran(entries: list[EvaluationResult]) -> list[EvaluationResult]:
    """Without the attacks and seeds of one configuration that were only planned."""
    ran = [e for e in entries if e.state != "missing"]
    attacks, seeds = {(e.attack_label, e.norm, e.eps) for e in ran}, {e.seed for e in ran}
    return [e for e in entries if (e.attack_label, e.norm, e.eps) in attacks and e.seed in seeds]


def _row(
    store: Store, entries: list[EvaluationResult], beside: ByAttack, times: dict[Any, float], radii: Iterable[float]
) -> Row:
    picked = _pick(entries)
    first = min(entries, key=lambda e: (e.norm is None, e.seed, e.key))
    seeds = tuple(sorted({e.seed for e in entries}))
    one = {name: next(iter(found.values())) for name, found in picked.items()}  # for what its seeds have in common
    under_budget = {name: seed_accuracies(found) for name, found in picked.items() if one[name].norm}
    attacks = {name: values for name, values in under_budget.items() if not one[name].proves}
    evaluated_clean = next((found for name, found in picked.items() if one[name].attack == "clean"), {})
    clean, unlearned = seed_accuracies(evaluated_clean), unlearned_seeds(store, evaluated_clean)
    certify = [by for name, by in sorted(picked.items()) if not one[name].norm and one[name].attack != "clean"]
    certified, acr = certificates(store, certify, {*radii, *([first.eps_value] if first.norm == "L2" else [])})
    worst = worst_case(store, picked, seeds, first.eps_value if first.norm else 0.0)
    settings = {name: store.evaluation(one[name].key).attack.settings for name in attacks}
    suites = [values for name, values in attacks.items() if _is_autoattack(one[name], settings[name])]
    draws = {name: draws_of(one[name].attack, settings[name]) for name in attacks}
    lost = collapsed_seeds([clean, *attacks.values(), worst.accuracy])
    accuracy = Accuracy(
        clean=clean,
        autoattack=next((values for values in suites if values.values), suites[0] if suites else SeedValues()),
        attacks=attacks,
        worst=worst.accuracy,
        single=worst.single,
        proved={name: values for name, values in under_budget.items() if one[name].proves},
        measured={name: seed_accuracies(by_seed) for name, by_seed in beside.items()},
        certified=certified,
        acr=acr,
        collapsed=tuple(sorted({*unlearned, *lost})),
        unlearned=unlearned,
        robust=worst.robust,
        share=worst.share,
    )
    most_draws = max(draws.values(), default=0)
    provenance = Provenance(
        train_key=first.train_key,
        keys=worst.keys,
        entries=picked,
        measured=beside,
        device=_joined(name for e in entries for name in (e.train_device, e.device)),
        commit=_joined(e.commit and e.commit + (" (dirty)" if e.dirty is True else "") for e in entries),
        selected=_selected(first),
        draws=most_draws if most_draws > 1 and first.deploys != "deterministic" else 0,
    )
    row = Row(
        **{name: getattr(first, name) for name in ("dataset", "model", "defense", "norm", "eps", "eps_value")},
        **{name: getattr(first, name) for name in ("recipe", "epochs", "deploys", "config")},
        method=first.defense_label,
        train_eps=_train_eps(first),
        seeds=seeds,
        accuracy=accuracy,
        cost=cost_of(entries, picked, times),
        provenance=provenance,
    )
    return replace(row, provisional=why_provisional(row, draws))


def _pick(entries: list[EvaluationResult]) -> ByAttack:
    """The evaluation that counts for each attack and seed: newest revision, then done, then most images."""

    def order(entry: EvaluationResult) -> tuple[list[int], bool, int, str]:
        version = [int(part) for part in entry.attack_version.split(".")]
        return version, entry.state == "done", entry.n, entry.key

    picked: ByAttack = {}
    for entry in sorted(entries, key=order):
        picked.setdefault(entry.attack_label, {})[entry.seed] = entry
    return picked


def _is_autoattack(entry: EvaluationResult, settings: dict[str, Any]) -> bool:
    """The suite of its authors in full, or in its law; `rand` and custom suites have their own column only."""
    if entry.attack == "autoattack_fast":
        enough = not entry.unjudged or (entry.audited or 0) >= AUDITED
        return settings.get("mode", "full") == "full" and enough
    return entry.attack == "autoattack" and settings.get("version", "standard") in ("standard", "plus")


def _selected(entry: EvaluationResult) -> str:
    if entry.recipe == IMPORTED:
        return "unknown"
    return "validation" if entry.defense_label.endswith(BY_VALIDATION) else "last epoch"


def _train_eps(entry: EvaluationResult) -> str:
    if entry.train_eps is None:
        return "–"
    same = entry.train_norm == entry.norm or entry.norm is None
    return entry.train_eps if same else f"{entry.train_norm} {entry.train_eps}"


def _joined(names: Iterable[str | None]) -> str:
    return "; ".join(sorted({name for name in names if name})) or "unknown"
