"""Per-image outcomes of several evaluations combined: cells, the worst case, paired differences.

An image counts as robust if the model classifies it correctly without an attack and under every attack of the row.
All evaluations are cut to the longest prefix of the test set that each of them saw.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.results.evaluations import Evaluation, right_at
from bench.core.epsilon import Epsilon
from bench.core.stats import mean_std, paired_difference, wilson
from bench.records.evaluated_weights import apart
from bench.records.store import Store

if TYPE_CHECKING:
    import numpy as np

MEDIAN = "median: distance in the norm of eps, over images right when clean, to what was found; inf if nothing was"
MIXED = ("mixed test sets", "mixed weights")  # states of what cannot be compared image by image
ByAttack = dict[str, dict[int, Evaluation]]  # attack label -> seed -> the evaluation that counts


@dataclass(frozen=True)
class SeedValues:
    """One number of a row: a share in [0,1] for each seed.

    `values`: by seed. `n`: how many images the shares are over. `absent`: (state, reason) of the seeds without a value.
    `distance`: of a minimal-norm attack, the median distance of each seed.
    """

    values: dict[int, float]
    n: int
    absent: dict[int, tuple[str, str]]
    distance: dict[int, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean over seeds; NaN where there is no value."""
        return fmean(self.values.values()) if self.values else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds, 0 for one seed; NaN where there is no value."""
        return mean_std(list(self.values.values()))[1] if self.values else math.nan

    def without(self, seeds: Container[int]) -> SeedValues:
        """The same cell without these seeds."""
        return replace(self, values={seed: v for seed, v in self.values.items() if seed not in seeds})

    def only(self, seeds: Container[int]) -> SeedValues:
        """The same cell with these seeds only."""
        return replace(self, values={seed: v for seed, v in self.values.items() if seed in seeds})

    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the mean over n images; seeds share their images, so they do not increase n."""
        return wilson(round(self.mean * self.n), self.n) if self.values else (math.nan, math.nan)

    def median(self) -> str:
        """`median 0.43` (mean over seeds) for a minimal-norm attack; otherwise empty."""
        return f"median {fmean(self.distance.values()):.3g}" if self.distance else ""

    def state(self) -> str:
        """What the table shows where there is no number."""
        return ", ".join(sorted({state for state, _ in self.absent.values()})) or "not run"


def seed_accuracies(found: dict[int, Evaluation]) -> SeedValues:
    """One attack over its seeds.

    Args:
        found: The evaluation that counts, by seed.

    Returns:
        A `SeedValues` with the accuracy of each seed that is done; without values if evaluations of equally many images saw
        different ones.
    """
    done = {seed: e for seed, e in sorted(found.items()) if e.state == "done"}
    absent = {seed: (e.state, e.reason or "") for seed, e in found.items() if seed not in done}
    problem = _mixed((e.n, e.test_hash, e.key) for e in done.values())
    if problem:
        return SeedValues({}, 0, dict.fromkeys(found, (MIXED[0], problem)))
    distance = {s: d for s, e in done.items() if not math.isnan(d := e.median_distance)}
    n = min((e.n for e in done.values()), default=0)
    return SeedValues({s: e.accuracy for s, e in done.items()}, n, absent, distance)


def _mixed(subsets: Iterable[tuple[int, str | None, str]]) -> str | None:
    """What is wrong if evaluations of equally many images saw different ones (subsets of other sizes hash apart)."""
    seen: dict[int, tuple[str | None, str]] = {}
    for n, test_hash, key in subsets:
        other, first = seen.setdefault(n, (test_hash, key))
        if other != test_hash:
            return f"{first} saw test images {other}, {key} saw {test_hash}"
    return None


_NEEDED = ("index", "label", "correct", "broken_at", "select", "share", "select_at", "share_at")


class PerImage(NamedTuple):
    """Outcomes of one evaluation on a prefix of the test set, one value an image.

    `correct` (bool): by the deployed rule. For a stochastic model, shares in [0,1] of noise draws with the correct
    class: `select` on the draws that choose between attacks, `share` on separate draws that evaluate; else None.
    """

    correct: np.ndarray[Any, Any]
    select: np.ndarray[Any, Any] | None
    share: np.ndarray[Any, Any] | None

    def first(self, n: int) -> PerImage:
        """The outcomes on the first n images."""
        return PerImage(*(None if column is None else column[:n] for column in self))  # type: ignore[arg-type]


def _on_shared_prefix(store: Store, wanted: Iterable[tuple[str, float]]) -> list[PerImage]:
    """Outcomes of several evaluations on the same images.

    Args:
        wanted: Key of an evaluation and the budget to read it at (which matters for security curves only).

    Returns:
        The outcomes of each, on the longest prefix of the test set that all of them share.

    Raises:
        ValueError: They did not see the same images, or labels differ at the same index.
    """
    import numpy as np

    found: list[PerImage] = []
    subsets: list[tuple[int, str | None, str]] = []
    labels: list[tuple[np.ndarray[Any, Any], str]] = []
    for key, eps in wanted:
        samples, record = store.samples(key, _NEEDED), store.record(key) or {"metrics": {}}
        subsets.append((len(samples["index"]), record["metrics"].get("test_hash"), key))
        samples = in_order(samples)
        in_place = samples["index"] == np.arange(len(samples["index"]))
        n = len(in_place) if in_place.all() else int(in_place.argmin())
        select, share = (draw_shares(store, key, samples, name, eps) for name in ("select", "share"))
        found.append(PerImage(right_at(samples, eps), select, share).first(n))
        if "label" in samples:
            labels.append((samples["label"][:n], key))
    n = min(len(outcome.correct) for outcome in found)
    wrong = [key for values, key in labels if not np.array_equal(values[:n], labels[0][0][:n])]
    problem = _mixed(subsets) or (f"{labels[0][1]} and {wrong[0]} have other labels at the same index" if wrong else "")
    if problem:
        raise ValueError(problem)
    return [outcome.first(n) for outcome in found]


def in_order(samples: dict[str, Any]) -> dict[str, Any]:
    """The same columns sorted by index in the test set; unchanged if they are sorted."""
    index = samples["index"]
    if bool((index[1:] > index[:-1]).all()):
        return samples
    order = index.argsort(kind="stable")
    return {name: values[order] for name, values in samples.items()}


def draw_shares(store: Store, key: str, samples: dict[str, Any], name: str, eps: float) -> np.ndarray[Any, Any] | None:
    """Share of correct noise draws of each image; None for a deterministic model.

    Args:
        name: "select", the draws that choose between attacks, or "share", those that evaluate.
        eps: The budget, for a security curve.
    """
    if f"{name}_at" not in samples:
        return samples.get(name)
    job = store.evaluation(key)
    largest = [job.threat.eps] if job.threat else []
    budgets = sorted({float(Epsilon(each)) for each in (*job.attack.settings["budgets"], *largest)})
    column: np.ndarray[Any, Any] = samples[f"{name}_at"][:, budgets.index(eps)]
    return column


class Worst(NamedTuple):
    """Worst case of a row over the seeds that have every attack done.

    `cell`: by the deployed rule. `single`: the same with single noise draws, without values for a deterministic model.
    By seed: `keys`, the evaluations it is the minimum of; `right` (bool), which images are still robust; `share`, of a
    stochastic model, the share of single draws with the correct class.
    """

    cell: SeedValues
    single: SeedValues
    keys: dict[int, tuple[str, ...]]
    right: dict[int, np.ndarray[Any, Any]]
    share: dict[int, np.ndarray[Any, Any]]


def worst_case(store: Store, picked: ByAttack, seeds: tuple[int, ...], eps: float) -> Worst:
    """The worst case over clean images and all attacks of a row, image by image.

    Args:
        picked: The evaluation that counts for each attack and seed. An attack that no seed supports is left out; a
            certificate is never part of the minimum but must be of the same weights.
        seeds: The seeds of the row.
        eps: The budget of the row.

    Returns:
        The worst case of each seed that has every attack done; the cell gives the reason for the others.
    """

    def none(state: str, reason: str = "") -> Worst:
        return Worst(SeedValues({}, 0, dict.fromkeys(seeds, (state, reason))), SeedValues({}, 0, {}), {}, {}, {})

    attacks = {name: by for name, by in picked.items() if any(e.norm or e.attack == "clean" for e in by.values())}
    attacks = {name: by for name, by in attacks.items() if any(e.state != "unsupported" for e in by.values())}
    if not any(e.norm for by in attacks.values() for e in by.values()):
        return none("not attacked")
    done = ((seed, e.key) for by in picked.values() for seed, e in by.items() if e.state == "done")
    if problem := apart(store, done):
        return none(MIXED[1], problem)
    keys, absent = _complete_seeds(attacks, seeds)
    if not keys:
        return none("")._replace(cell=SeedValues({}, 0, absent))
    try:
        columns = _on_shared_prefix(store, [(key, eps) for chosen in keys.values() for key in chosen])
    except ValueError as other_images:
        return none(MIXED[0], str(other_images))
    n, left = len(columns[0].correct), iter(columns)
    if n == 0:
        return none("no shared images", "no prefix of the test set is shared")
    worst = {seed: _minimum([next(left) for _ in chosen]) for seed, chosen in keys.items()}
    right = {seed: robust for seed, (robust, _) in worst.items()}
    share = {seed: draws for seed, (_, draws) in worst.items() if draws is not None}
    cell, single = (SeedValues({s: float(of.mean()) for s, of in by.items()}, n, {}) for by in (right, share))
    return Worst(replace(cell, absent=absent), single, keys, right, share)


def _complete_seeds(
    attacks: ByAttack, seeds: tuple[int, ...]
) -> tuple[dict[int, tuple[str, ...]], dict[int, tuple[str, str]]]:
    """The evaluations of each seed that has all attacks done, and (state, reason) of the other seeds."""
    keys, absent = {}, {}
    for seed in seeds:
        states = {name: by[seed].state if seed in by else "not planned" for name, by in sorted(attacks.items())}
        lacking = [f"{name} {state}" for name, state in states.items() if state != "done"]
        if lacking:
            absent[seed] = ("incomplete", ", ".join(lacking))
        else:
            keys[seed] = tuple(sorted(by[seed].key for by in attacks.values()))
    return keys, absent


def _minimum(columns: list[PerImage]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """The worst case of each image over several evaluations.

    For a deterministic model an image is robust if it is correct in all of them. For a stochastic model we keep, for
    each image, the evaluation with the fewest correct draws among the draws that choose, and read its outcome on the
    separate draws that evaluate. A per-image minimum would reward chance: a random classifier would score near 0 %.

    Returns:
        Which images are robust (bool), and the share of single draws with the correct class; None for a deterministic
        model.
    """
    import numpy as np

    choosing = [column.select for column in columns if column.select is not None]
    shares = [column.share for column in columns if column.share is not None]
    if len(choosing) < len(columns) or len(shares) < len(columns):
        return np.logical_and.reduce([column.correct for column in columns]), None
    chosen, image = np.argmin(np.stack(choosing), axis=0), np.arange(len(choosing[0]))
    return np.stack([column.correct for column in columns])[chosen, image], np.stack(shares)[chosen, image]


def outcomes(store: Store, keys: Iterable[str], eps: float = 0.0) -> np.ndarray[Any, Any]:
    """Which images are robust in the worst case of these evaluations.

    Args:
        keys: The evaluations of one seed (`Row.keys`).
        eps: The budget, for security curves.

    Returns:
        A bool for each image of their shared prefix of the test set.

    Raises:
        ValueError: They saw different test sets.
    """
    return _minimum(_on_shared_prefix(store, [(key, eps) for key in keys]))[0]


class Paired(NamedTuple):
    """Difference of two worst-case accuracies on the same n images, with its 95 % interval; shares in [0,1]."""

    difference: float
    low: float
    high: float
    n: int


def paired(store: Store, keys_a: Iterable[str], keys_b: Iterable[str], eps: float = 0.0) -> Paired:
    """Worst case of evaluations `keys_a` minus that of `keys_b`, paired by image.

    Args:
        keys_a, keys_b: The evaluations of one seed each (`Row.keys`).
        eps: The budget, for security curves.

    Raises:
        ValueError: They share no images or saw different test sets.
    """
    a, b = list(keys_a), list(keys_b)
    columns = _on_shared_prefix(store, [(key, eps) for key in (*a, *b)])
    (first, _), (second, _) = _minimum(columns[: len(a)]), _minimum(columns[len(a) :])
    return Paired(*paired_difference(first.tolist(), second.tolist()), n=len(first))


def images(store: Store, groups: list[list[tuple[str, ...]]], eps: float) -> list[np.ndarray[Any, Any]]:
    """How often each image is robust over the seeds of several rows.

    Args:
        groups: For each row, the evaluations of each of its seeds.
        eps: The budget, for security curves.

    Returns:
        For each row, the share of its seeds in which an image is robust, over the shared prefix of the test set.

    Raises:
        ValueError: They saw different test sets.
    """
    import numpy as np

    columns = iter(_on_shared_prefix(store, [(key, eps) for seeds in groups for keys in seeds for key in keys]))
    return [np.mean([_minimum([next(columns) for _ in keys])[0] for keys in seeds], axis=0) for seeds in groups]
