"""Per-sample outcomes of several evaluations put together: cells, the worst case, paired differences."""

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
Picked = dict[str, dict[int, Evaluation]]  # attack label -> seed -> the evaluation that counts


@dataclass(frozen=True)
class Cell:
    """One entry of a row: a share in [0,1] for each seed, over `n` images, and (state, reason) of the other seeds; of a
    minimal-norm attack the median `distance` of each seed too."""

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

    def without(self, seeds: Container[int]) -> Cell:
        """The cell over the other seeds."""
        return replace(self, values={seed: v for seed, v in self.values.items() if seed not in seeds})

    def only(self, seeds: Container[int]) -> Cell:
        """The cell over these seeds."""
        return replace(self, values={seed: v for seed, v in self.values.items() if seed in seeds})

    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the mean at n images: seeds share their images, so they do not add to n."""
        return wilson(round(self.mean * self.n), self.n) if self.values else (math.nan, math.nan)

    def median(self) -> str:
        """`median 0.43`, mean over seeds, for a minimal-norm attack; else nothing."""
        return f"median {fmean(self.distance.values()):.3g}" if self.distance else ""

    def state(self) -> str:
        """What stands in the table where there is no number."""
        return ", ".join(sorted({state for state, _ in self.absent.values()})) or "not run"


def cell_of(found: dict[int, Evaluation]) -> Cell:
    """One attack over its seeds as a Cell; evaluations of equally many but different images give no number."""
    done = {seed: e for seed, e in sorted(found.items()) if e.state == "done"}
    absent = {seed: (e.state, e.reason or "") for seed, e in found.items() if seed not in done}
    problem = _mixed((e.n, e.test_hash, e.key) for e in done.values())
    if problem:
        return Cell({}, 0, dict.fromkeys(found, (MIXED[0], problem)))
    distance = {s: d for s, e in done.items() if not math.isnan(d := e.median_distance)}
    n = min((e.n for e in done.values()), default=0)
    return Cell({s: e.accuracy for s, e in done.items()}, n, absent, distance)


def _mixed(subsets: Iterable[tuple[int, str | None, str]]) -> str | None:
    """What is wrong if evaluations of equally many images saw different ones (subsets of other sizes hash apart)."""
    seen: dict[int, tuple[str | None, str]] = {}
    for n, test_hash, key in subsets:
        other, first = seen.setdefault(n, (test_hash, key))
        if other != test_hash:
            return f"{first} saw test images {other}, {key} saw {test_hash}"
    return None


_NEEDED = ("index", "label", "correct", "broken_at", "select", "share", "select_at", "share_at")


class Judged(NamedTuple):
    """One evaluation of a prefix of the test set: `correct` (bool); for a model that draws at test time the share of
    draws that are right, on draws that choose between attacks (`select`) and on others (`share`), else None."""

    correct: np.ndarray[Any, Any]
    select: np.ndarray[Any, Any] | None
    share: np.ndarray[Any, Any] | None


def _prefixes(store: Store, wanted: Iterable[tuple[str, float]]) -> list[Judged]:
    """Each evaluation, at a budget, on the largest prefix of the test set that all of them share, equally long.

    Raises ValueError where they did not see the same images.
    """
    import numpy as np

    found: list[Judged] = []
    labels, subsets = [], []
    for key, eps in wanted:
        samples, record = store.samples(key, _NEEDED), store.record(key) or {"metrics": {}}
        subsets.append((len(samples["index"]), record["metrics"].get("test_hash"), key))
        samples = in_order(samples)
        here = samples["index"] == np.arange(len(samples["index"]))
        n = len(here) if here.all() else int(here.argmin())
        draws = (drawn(store, key, samples, name, eps) for name in ("select", "share"))
        found.append(Judged(right_at(samples, eps)[:n], *draws))
        labels.append((samples["label"][:n], key) if "label" in samples else None)
    n = min(len(column.correct) for column in found)
    known = [pair for pair in labels if pair]
    wrong = [key for values, key in known if not np.array_equal(values[:n], known[0][0][:n])]
    problem = _mixed(subsets) or (f"{known[0][1]} and {wrong[0]} have other labels at the same index" if wrong else "")
    if problem:
        raise ValueError(problem)
    return [Judged(c.correct[:n], *(None if d is None else d[:n] for d in (c.select, c.share))) for c in found]


def in_order(samples: dict[str, Any]) -> dict[str, Any]:
    """The same columns in the order of the test set; as they are where they stand so."""
    index = samples["index"]
    if bool((index[1:] > index[:-1]).all()):
        return samples
    order = index.argsort(kind="stable")
    return {name: values[order] for name, values in samples.items()}


def drawn(store: Store, key: str, samples: dict[str, Any], name: str, eps: float) -> np.ndarray[Any, Any] | None:
    """Shares of draws under this name, of a security curve those at the budget; None for a deterministic model."""
    if f"{name}_at" not in samples:
        return samples.get(name)
    what = store.job(key).what
    budgets = sorted({float(Epsilon(each)) for each in (*what["attack"]["set"]["budgets"], what["threat"]["eps"])})
    column: np.ndarray[Any, Any] = samples[f"{name}_at"][:, budgets.index(eps)]
    return column


class Worst(NamedTuple):
    """Worst case of the seeds that have every attack, under the deployed rule and over single draws (`single` has no
    values for a deterministic model); the evaluations it is the minimum of; by seed, which images stand (bool) and the
    share of their single draws that do."""

    cell: Cell
    single: Cell
    keys: dict[int, tuple[str, ...]]
    right: dict[int, np.ndarray[Any, Any]]
    share: dict[int, np.ndarray[Any, Any]]


def worst_case(store: Store, picked: Picked, seeds: tuple[int, ...], eps: float) -> Worst:
    """The worst case over the clean evaluations and the attacks of a row, image by image; where there is none the cell
    says why. A certificate is not in it, but has to be of the same weights."""

    def none(state: str, reason: str = "") -> Worst:
        return Worst(Cell({}, 0, dict.fromkeys(seeds, (state, reason))), Cell({}, 0, {}), {}, {}, {})

    judged = {name: by for name, by in picked.items() if any(e.norm or e.attack == "clean" for e in by.values())}
    asked = {name: by for name, by in judged.items() if any(e.state != "unsupported" for e in by.values())}
    if not any(entry.norm for by in asked.values() for entry in by.values()):
        return none("not attacked")
    done = ((seed, e.key) for by in picked.values() for seed, e in by.items() if e.state == "done")
    if problem := apart(store, done):
        return none(MIXED[1], problem)
    keys, absent = {}, {}
    for seed in seeds:
        states = {name: by[seed].state if seed in by else "not planned" for name, by in sorted(asked.items())}
        lacking = [f"{name} {state}" for name, state in states.items() if state != "done"]
        if lacking:
            absent[seed] = ("incomplete", ", ".join(lacking))
        else:
            keys[seed] = tuple(sorted(by[seed].key for by in asked.values()))
    if not keys:
        return none("")._replace(cell=Cell({}, 0, absent))
    try:
        columns = _prefixes(store, [(key, eps) for chosen in keys.values() for key in chosen])
    except ValueError as other_images:
        return none(MIXED[0], str(other_images))
    n, left = len(columns[0].correct), iter(columns)
    if n == 0:
        return none("no shared images", "no prefix of the test set is shared")
    worst = {seed: _worst([next(left) for _ in chosen]) for seed, chosen in keys.items()}
    right = {seed: stands for seed, (stands, _) in worst.items()}
    share = {seed: draws for seed, (_, draws) in worst.items() if draws is not None}
    cell, single = (Cell({s: float(of.mean()) for s, of in by.items()}, n, {}) for by in (right, share))
    return Worst(replace(cell, absent=absent), single, keys, right, share)


def _worst(columns: list[Judged]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Which images stand under all evaluations, and the share of single draws that are right under the worst one.

    Where the model draws, the evaluation that counts for an image is the one with the fewest right draws among those
    kept for this choice; it is judged on other draws. The minimum itself would take randomness for success: a coin
    would have to come up heads under every attack.
    """
    import numpy as np

    choosing = [column.select for column in columns if column.select is not None]
    shares = [column.share for column in columns if column.share is not None]
    if len(choosing) < len(columns) or len(shares) < len(columns):
        return np.logical_and.reduce([column.correct for column in columns]), None
    chosen, place = np.argmin(np.stack(choosing), axis=0), np.arange(len(choosing[0]))
    return np.stack([column.correct for column in columns])[chosen, place], np.stack(shares)[chosen, place]


def outcomes(store: Store, keys: Iterable[str], eps: float = 0.0) -> np.ndarray[Any, Any]:
    """Which images of the shared prefix of the test set are right in the worst case of these evaluations (a seed's
    `Row.keys`), in the order of the test set. Raises ValueError where they saw different test sets."""
    return _worst(_prefixes(store, [(key, eps) for key in keys]))[0]


class Paired(NamedTuple):
    """Difference of two worst-case accuracies on the same n images, with its 95 % interval; shares in [0,1]."""

    difference: float
    low: float
    high: float
    n: int


def paired(store: Store, keys_a: Iterable[str], keys_b: Iterable[str], eps: float = 0.0) -> Paired:
    """Worst case of evaluations `keys_a` minus that of `keys_b` (`Row.keys` of a seed), image by image.

    `eps`: the budget, asked of security curves alone. Raises ValueError where they share no images or saw different
    test sets.
    """
    a, b = list(keys_a), list(keys_b)
    columns = _prefixes(store, [(key, eps) for key in (*a, *b)])
    (first, _), (second, _) = _worst(columns[: len(a)]), _worst(columns[len(a) :])
    return Paired(*paired_difference(first.tolist(), second.tolist()), n=len(first))


def images(store: Store, groups: list[list[tuple[str, ...]]], eps: float) -> list[np.ndarray[Any, Any]]:
    """For each group of seeds (each the evaluations of a worst case) the share of its seeds in which an image stands,
    on the prefix of the test set that all share. Raises ValueError where they saw different test sets."""
    import numpy as np

    columns = iter(_prefixes(store, [(key, eps) for seeds in groups for keys in seeds for key in keys]))
    return [np.mean([_worst([next(columns) for _ in keys])[0] for keys in seeds], axis=0) for seeds in groups]
