"""Intervals and tests against published examples, SciPy and simulation."""

from __future__ import annotations

import math

import pytest
from scipy.stats import binom, binomtest

from bench.core.stats import clopper_pearson_lower, mcnemar, mean_std, paired_difference, wilson


@pytest.mark.parametrize("n", [50, 200, 1000])
def test_wilson_covers_about_95_percent(n: int) -> None:
    coverages = []
    for p in (0.05, 0.2, 0.45, 0.5, 0.9):
        inside = [k for k in range(n + 1) if wilson(k, n)[0] <= p <= wilson(k, n)[1]]
        coverages.append(binom.pmf(inside, n, p).sum())
    assert min(coverages) > 0.92
    assert sum(coverages) / len(coverages) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (7, 20), (20, 20), (440, 1000)])
def test_wilson_is_scipys(hits: int, n: int) -> None:
    exact = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits, n) == pytest.approx((exact.low, exact.high), abs=1e-12)


def _pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    rows = [(True, True)] * both + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * neither
    return [a for a, _ in rows], [b for _, b in rows]


# Newcombe, Statistics in Medicine 17 (1998) 2635-2650, table III, method 10 (score intervals, corrected phi)
@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((0, 30, 0, 0), 0.8395, 1.0),
    ],
)
def test_newcombes_published_intervals(table: tuple[int, int, int, int], low: float, high: float) -> None:
    difference, found_low, found_high = paired_difference(*_pairs(*table))
    assert difference == pytest.approx((table[1] - table[2]) / sum(table))
    assert (found_low, found_high) == pytest.approx((low, high), abs=1e-4)


def test_mcnemar_is_an_exact_binomial_test() -> None:
    a, b = _pairs(50, 12, 3, 35)
    assert mcnemar(a, b) == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)
    assert mcnemar(b, a) == mcnemar(a, b)
    assert mcnemar(a, a) == 1.0


def test_impossible_counts_are_refused() -> None:
    for bad in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="hits"):
            wilson(*bad)
        with pytest.raises(ValueError, match="hits"):
            clopper_pearson_lower(*bad, 0.05)
    with pytest.raises(ValueError, match="equally long"):
        paired_difference([True], [])
    with pytest.raises(ValueError, match="equally long"):
        paired_difference([], [])


def test_mean_and_deviation_over_seeds() -> None:
    assert mean_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_std([5.0]) == (5.0, 0.0)
