"""Intervals and paired tests on per-sample outcomes. SciPy is imported inside the functions that need it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

SAME = 1e-9  # means over seeds that differ by less are equal up to rounding
_Z95 = 1.959963984540054
_Z975 = 2.241402727604947


def wilson(hits: int, n: int, z: float = _Z95) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927); at z=1.96 it covers about 95 %.

    Raises ValueError unless 0 <= hits <= n and n > 0.
    """
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"an interval needs 0 <= hits <= n and n > 0, got hits={hits}, n={n}")
    p, zz = hits / n, z * z
    center = (p + zz / (2 * n)) / (1 + zz / n)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return max(0.0, center - half), min(1.0, center + half)


def audited_interval(hits: int, n: int, unjudged: float) -> tuple[float, float]:
    """95 % interval of a share where a share `unjudged` of the n may be hits wrongly (a bound that holds with 97.5 %):
    the Wilson interval of the hits, at 97.5 % so that the two errors share the 5 %, and lower by the bound."""
    low, high = wilson(hits, n, _Z975 if unjudged else _Z95)
    return max(low - unjudged, 0.0), high


def clopper_pearson_lower(hits: int, n: int, alpha: float) -> float:
    """One-sided exact lower bound of a share: holds with probability >= 1 - alpha (Clopper and Pearson 1934)."""
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"a bound needs 0 <= hits <= n and n > 0, got hits={hits}, n={n}")
    if hits == 0:
        return 0.0
    from scipy.special import betaincinv

    return float(betaincinv(hits, n - hits + 1, alpha))


def clopper_pearson_upper(hits: int, n: int, alpha: float) -> float:
    """One-sided exact upper bound of a share; see `clopper_pearson_lower`."""
    return 1.0 - clopper_pearson_lower(n - hits, n, alpha)


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float, float]:
    """Difference of two shares on the *same* images, with its 95 % interval: (mean(a) - mean(b), low, high).

    The interval is Newcombe's hybrid score interval for paired proportions (1998, Statistics in Medicine 17, 2635-2650,
    method 10), which stays inside [-1, 1] and does not collapse when no image differs.
    """
    n = len(a)
    if n == 0 or n != len(b):
        raise ValueError(f"a paired difference needs two equally long, non-empty samples, got {n} and {len(b)}")
    both = sum(x and y for x, y in zip(a, b, strict=True))
    only_a, only_b = sum(map(bool, a)) - both, sum(map(bool, b)) - both
    neither = n - both - only_a - only_b
    p1, p2 = (both + only_a) / n, (both + only_b) / n
    l1, u1 = wilson(both + only_a, n)
    l2, u2 = wilson(both + only_b, n)
    margins = (both + only_a) * (neither + only_b) * (both + only_b) * (neither + only_a)
    phi = 0.0
    if margins:
        numerator = both * neither - only_a * only_b
        phi = (max(numerator - n / 2, 0) if numerator > 0 else numerator) / math.sqrt(margins)
    return _hybrid((p1, l1, u1), (p2, l2, u2), phi)


def independent_difference(a: Sequence[bool], b: Sequence[bool]) -> tuple[float, float, float]:
    """Difference of the shares of True in two samples of *different* images, with its 95 % interval, as above.

    The interval is Newcombe's hybrid score interval for independent proportions (1998, Statistics in Medicine 17,
    873-890, method 10). Raises ValueError for an empty sample.
    """
    if not len(a) or not len(b):
        raise ValueError(f"a difference needs two non-empty samples, got {len(a)} and {len(b)}")
    (p1, *first), (p2, *second) = ((sum(each) / len(each), *wilson(sum(each), len(each))) for each in (a, b))
    return _hybrid((p1, *first), (p2, *second), 0.0)


def _hybrid(one: Sequence[float], two: Sequence[float], phi: float) -> tuple[float, float, float]:
    """Difference of two shares, each given with its interval, and the interval of it; `phi` is their correlation."""
    (p1, l1, u1), (p2, l2, u2) = one, two
    d1, d2, e1, e2 = p1 - l1, u2 - p2, u1 - p1, p2 - l2
    low = math.sqrt(max(0.0, d1 * d1 - 2 * phi * d1 * d2 + d2 * d2))
    high = math.sqrt(max(0.0, e1 * e1 - 2 * phi * e1 * e2 + e2 * e2))
    return p1 - p2, max(-1.0, p1 - p2 - low), min(1.0, p1 - p2 + high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar p-value (1947) of two classifiers on the same images, from the numbers of images that
    only the first or only the second classifies correctly: under the null hypothesis a fair coin splits them."""
    if only_a + only_b == 0:
        return 1.0
    from scipy.special import bdtr  # the tail alone; scipy.stats takes a second to import

    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def bootstrap_difference(a: Sequence[float], b: Sequence[float], draws: int = 10_000) -> tuple[float, float, float]:
    """Difference of two means over the *same* images with its 95 % percentile bootstrap interval (Efron 1979).

    For shares of draws or means over seeds, which are not binary. Images are resampled with replacement from a fixed
    stream of random numbers: equal data give equal bounds. Where every image has the same difference the bootstrap
    interval has width 0, although n images leave an uncertainty: then Newcombe's interval is used for binary outcomes,
    for shares the Wilson bound of the share of images that may differ otherwise where 0 of n do.
    """
    import numpy as np

    n = len(a)
    if n == 0 or n != len(b):
        raise ValueError(f"a paired difference needs two equally long, non-empty samples, got {n} and {len(b)}")
    first, second = np.asarray(a, float), np.asarray(b, float)
    values, counts = np.unique(first - second, return_counts=True)
    if values[-1] - values[0] < SAME:
        if np.isin([first, second], (0.0, 1.0)).all():
            return paired_difference((first > 0).tolist(), (second > 0).tolist())
        found, spread = float(values.mean()), wilson(0, n)[1]
        return found, max(-1.0, found - spread), min(1.0, found + spread)
    # how often each distinct difference is drawn among n is multinomial: the same law, without n draws each time
    rng, sums = np.random.default_rng(0), np.empty(draws)
    step = max(1, 2_000_000 // len(values))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        sums[start : start + size] = rng.multinomial(n, counts / n, size=size) @ values
    low, high = np.quantile(sums / n, [0.025, 0.975])
    return float(values @ counts) / n, float(low), float(high)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; the deviation of one value is 0."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0
