"""Values of two settings with equal accuracy: sigma of a defense and the budget of adversarial training.

For each column that both sides have, the least b at which side B is as robust (or as inaccurate on clean images) as
side A is at a. B's accuracies are made monotone first, by the least-squares fit that never turns (isotonic regression):
robust accuracy rises with b, clean accuracy falls. Between two values of b the fit is a straight line. A column in
which B does not move that way has no map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.core.stats import SAME
from bench.records.store import Store
from bench.results.worst_case import minima
from bench.soundness.checks import Verdict
from bench.tables.sweep import WORST, Point, Series, footing

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

DRAWS = 2000


@dataclass(frozen=True)
class Match:
    """At `a` side A has this accuracy in `column`, over n images; B reaches it at `b`, 95 % interval `low` to `high`.

    b is -inf if B is beyond it at its smallest value, inf if no value of B reaches it. The interval is a percentile
    bootstrap over images, drawn for both sides at once; it does not include the variation between training seeds.
    `seeds` and `verdict`: of A's point; the match of an UNSOUND point may be wrong too.
    """

    column: str
    a: float
    accuracy: float
    b: float
    low: float
    high: float
    n: int
    seeds: tuple[int, ...]
    verdict: Verdict


def rising(values: Array) -> Array:
    """The nearest non-decreasing sequence in least squares, along the last axis (Barlow et al. 1972)."""
    import numpy as np
    from scipy.optimize import isotonic_regression

    return np.apply_along_axis(lambda sequence: isotonic_regression(sequence).x, -1, values)


def reached(x: Sequence[float], fit: Array, target: Array) -> Array:
    """Least x at which the piecewise linear curve through a rising `fit` (... len(x)) is at `target` (...).

    -inf where the curve begins above it, inf where it ends below.
    """
    import numpy as np

    where = np.asarray(x, float)
    upper = np.sum(fit < target[..., None], axis=-1)  # the first place at or above the target
    inner = np.clip(upper, 1, len(where) - 1)
    low, high = (np.take_along_axis(fit, place[..., None], -1)[..., 0] for place in (inner - 1, inner))
    step = np.where(high > low, (target - low) / np.where(high > low, high - low, 1.0), 0.0)
    found = where[inner - 1] + step * (where[inner] - where[inner - 1])
    found = np.where((upper == 0) & (fit[..., 0] > target), -math.inf, np.where(upper == 0, where[0], found))
    return np.where(upper == len(where), math.inf, found)


def matches(store: Store, a: Series, b: Series) -> list[Match]:
    """Every point of A by every column that both sides have. Raises ValueError where they saw other images."""
    shared = [name for name in a.points[0].picked if all(name in p.picked for p in (*a.points, *b.points))]
    attacked = [name for name in shared if name != "clean"]
    columns = {name: [name] for name in shared} | ({WORST: shared} if len(attacked) > 1 else {})
    return [each for name, members in columns.items() for each in _column(store, a, b, name, members)]


def _column(store: Store, a: Series, b: Series, name: str, members: list[str]) -> list[Match]:
    import numpy as np

    keys = _on_shared_seeds([_keys(point, members) for point in (*a.points, *b.points)])
    ours, theirs = ([k for k, by in zip(range(lo, hi), keys[lo:hi], strict=True) if by] for lo, hi in _spans(a, b))
    if not ours or len(theirs) < 2:
        return []
    groups = [list(keys[k].values()) for k in (*ours, *theirs)]
    by_seed = iter(minima(store, [each for seeds in groups for each in seeds], a.row.budget))
    right = np.stack([np.mean([next(by_seed).robust for _ in seeds], axis=0) for seeds in groups])
    sign = -1.0 if name == "clean" else 1.0
    means = sign * np.concatenate([right.mean(axis=1)[None], _resampled(right)])
    fit = rising(means[:, len(ours) :])
    if fit[0, 0] == fit[0, -1]:  # constant or falling: the fit has no inverse
        return []
    x = [b.points[k - len(a.points)].x for k in theirs]
    found = []
    for place, k in enumerate(ours):
        at = reached(x, fit, means[:, place])
        low, high = np.quantile(at[1:], [0.025, 0.975], method="inverted_cdf")
        accuracy = float(right[place].mean())
        point = a.points[k]
        bounds = float(at[0]), float(low), float(high)
        found.append(Match(name, point.x, accuracy, *bounds, right.shape[1], tuple(sorted(keys[k])), point.row.verdict))
    return found


def _spans(a: Series, b: Series) -> tuple[tuple[int, int], tuple[int, int]]:
    return (0, len(a.points)), (len(a.points), len(a.points) + len(b.points))


def _keys(point: Point, members: list[str]) -> dict[int, tuple[str, ...]]:
    """Of each seed that has all of these done, the evaluations."""
    if point.row.verdict == "INVALID":
        return {}
    asked = [point.picked[name] for name in members]
    seeds = [s for s in point.row.seeds if all(s in by and by[s].state == "done" for by in asked)]
    return {seed: tuple(by[seed].key for by in asked) for seed in seeds}


def _on_shared_seeds(keys: list[dict[int, tuple[str, ...]]]) -> list[dict[int, tuple[str, ...]]]:
    """The seeds that every point with any has, on both sides; all, if there is none: accuracies of one training seed
    are closer to each other than to those of another."""
    shared = set.intersection(*found) if (found := [{*by} for by in keys if by]) else set()
    return [{seed: by[seed] for seed in by if not shared or seed in shared} for by in keys]


def _resampled(right: Array) -> Array:
    """Means (DRAWS x points) over images drawn again with replacement, from a fixed stream of random numbers.

    A point at which all images are alike (0 of n) would have the same mean in every draw, though n images cannot be
    that sure: its draws are bounds of Wilson's interval at normal z, so that 95 % of them fill his interval.
    """
    import numpy as np

    n, rng = right.shape[1], np.random.default_rng(0)
    found, step = np.empty((DRAWS, len(right))), max(1, 2_000_000 // n)
    for start in range(0, DRAWS, step):
        size = min(step, DRAWS - start)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size)
        found[start : start + size] = counts @ right.T / n
    alike = np.flatnonzero(np.ptp(right, axis=1) < SAME)
    z, p = np.random.default_rng(1).standard_normal((DRAWS, len(right)))[:, alike], right[alike, 0]
    found[:, alike] = (p + z * z / (2 * n) + z * np.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)) / (1 + z * z / n)
    return found


def partner(store: Store, a: Series, candidates: list[Series]) -> Series | None:
    """Of B's series the one with most values among those trained and attacked as A was; None where there is none."""
    footing_a = footing(store.model_job(a.row.provenance.train_key))

    def fits(b: Series) -> bool:
        budget = (a.row.norm, a.row.eps) == (b.row.norm, b.row.eps)
        return (
            budget
            and footing(store.model_job(b.points[-1].row.provenance.train_key)) == footing_a
            and len(b.points) > 1
        )

    return max(filter(fits, candidates), key=lambda b: len(b.points), default=None)
