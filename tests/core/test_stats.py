"""Intervals and tests against published examples, SciPy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, bootstrap

from bench.core.stats import (
    audited_interval,
    bootstrap_difference,
    clopper_pearson_lower,
    clopper_pearson_upper,
    independent_difference,
    mcnemar,
    mean_std,
    paired_difference,
    wilson,
)


@pytest.mark.parametrize(("hits", "n"), [(0, 60), (0, 100), (3, 100), (100, 100)])
def test_the_upper_bound_is_scipys(hits: int, n: int) -> None:
    exact = binomtest(hits, n, alternative="less").proportion_ci(0.95).high
    assert clopper_pearson_upper(hits, n, 0.05) == pytest.approx(exact)


def test_the_interval_of_an_audit_is_lower_by_the_share_that_was_not_judged() -> None:
    assert audited_interval(600, 1000, 0.0) == wilson(600, 1000)
    exact = binomtest(600, 1000).proportion_ci(0.975, method="wilson")
    assert audited_interval(600, 1000, 0.02) == pytest.approx((exact.low - 0.02, exact.high), abs=1e-12)
    assert audited_interval(10, 1000, 0.02)[0] == 0.0


def test_the_interval_of_an_audit_covers_both_errors() -> None:
    """A suite breaks a share p of what survives a screen; 100 of these are judged. The interval holds the share that is
    robust to the suite in 95 % of the runs, also where the screen misses just so much that the audit rarely sees it."""
    draw, n, inside = np.random.default_rng(0), 1000, 0
    truth, missed = 0.6, 0.03  # robust to the suite; of the survivors of the screen, broken by the suite
    for _ in range(2000):
        robust = draw.binomial(n, truth)
        survivors = robust + draw.binomial(n - robust, truth * missed / (1 - missed) / (1 - truth))
        if draw.hypergeometric(survivors - robust, robust, 100):
            low, high = audited_interval(robust, n, 0.0)  # the suite judges all
        else:
            unjudged = (survivors - 100) / n * clopper_pearson_upper(0, 100, 0.025)
            low, high = audited_interval(survivors, n, unjudged)
        inside += low <= truth <= high
    assert inside / 2000 >= 0.95


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
    assert mcnemar(12, 3) == pytest.approx(2 * sum(math.comb(15, k) for k in range(4)) / 2**15)
    assert mcnemar(3, 12) == mcnemar(12, 3)
    assert mcnemar(0, 0) == 1.0


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 1), (5, 5), (9, 2), (2, 9), (40, 71), (700, 500), (0, 2000)])
def test_mcnemar_is_scipys(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert mcnemar(only_a, only_b) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_wilson_covers_what_it_promises_in_simulation(p: float) -> None:
    hits = np.random.default_rng(1).binomial(1000, p, 20_000)
    values, counts = np.unique(hits, return_counts=True)
    inside = [wilson(int(k), 1000)[0] <= p <= wilson(int(k), 1000)[1] for k in values]
    assert 0.94 < counts @ inside / counts.sum() < 0.965


def test_mcnemar_holds_its_level_and_has_power() -> None:
    """Two nets of equal accuracy, right on other images, are called different in at most 5 % of the data sets."""

    def rejected(shares: list[float]) -> float:
        tables = np.random.default_rng(2).multinomial(1000, shares, size=4000)
        return float(np.mean([mcnemar(int(a), int(b)) < 0.05 for _, a, b, _ in tables]))

    assert 0.02 < rejected([0.4, 0.1, 0.1, 0.4]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 4000)
    assert rejected([0.4, 0.13, 0.07, 0.4]) > 0.9


def test_mcnemar_never_exceeds_its_level() -> None:
    """Exactly, for each number of images that one alone gets right: under equal chances at most 5 % are rejected."""
    for m in range(1, 120):
        rejected = [k for k in range(m + 1) if mcnemar(k, m - k) < 0.05]
        assert binom.pmf(rejected, m, 0.5).sum() < 0.05
        # and no test with a wider region would do
        wider = max((k for k in rejected if k < m / 2), default=-1) + 1
        assert 2 * binom.cdf(wider, m, 0.5) >= 0.05


def test_bootstrap_is_scipys() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.binomial(100, 0.6, 400) / 100, rng.binomial(100, 0.5, 400) / 100
    difference, low, high = bootstrap_difference(a, b)
    scipys = bootstrap((a - b,), np.mean, method="percentile", n_resamples=5000, rng=4).confidence_interval
    assert difference == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx((scipys.low, scipys.high), abs=4e-4)
    assert bootstrap_difference(a, b) == (difference, low, high)  # nothing hidden moves it
    assert bootstrap_difference(b, a)[0] == pytest.approx(-difference)


@pytest.mark.parametrize(("hits_a", "hits_b"), [(0, 0), (100, 100), (0, 100), (100, 0)])
def test_a_bootstrap_of_images_that_are_all_alike_has_newcombes_interval(hits_a: int, hits_b: int) -> None:
    """Drawing 0 of 100 again gives 0 of 100 for ever."""
    a, b = ([1.0] * hits + [0.0] * (100 - hits) for hits in (hits_a, hits_b))
    found = bootstrap_difference(a, b)
    assert found == paired_difference(*([value > 0 for value in column] for column in (a, b)))
    assert found[2] - found[1] > 0.05
    if hits_a == hits_b:
        assert found == (0.0, pytest.approx(-0.037, abs=1e-4), pytest.approx(0.037, abs=1e-4))


def test_equal_shares_of_draws_leave_room_for_images_that_differ() -> None:
    a = np.random.default_rng(3).binomial(100, 0.6, 400) / 100
    margin = wilson(0, 400)[1]
    assert bootstrap_difference(a, a) == (0.0, -margin, margin)
    thirds = bootstrap_difference(a + 1 / 3, a)  # differences that are one number but for rounding
    assert thirds == pytest.approx((1 / 3, 1 / 3 - margin, 1 / 3 + margin))
    assert bootstrap_difference([0.9975] * 400, [0.0] * 400)[2] == 1.0
    assert bootstrap_difference([0.0] * 400, [0.9975] * 400)[1] == -1.0


def test_bootstrap_covers_the_difference_of_shares() -> None:
    rng, covered = np.random.default_rng(5), 0
    for _ in range(400):
        hard = rng.beta(2, 2, 300)  # images differ: both are right more often on easy ones
        a, b = rng.binomial(100, hard) / 100, rng.binomial(100, 0.8 * hard) / 100
        _, low, high = bootstrap_difference(a, b, draws=500)
        covered += low <= 0.1 <= high
    assert 0.91 < covered / 400 < 0.98


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
    with pytest.raises(ValueError, match="equally long"):
        bootstrap_difference([], [])


def test_mean_and_deviation_over_seeds() -> None:
    assert mean_std([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert mean_std([5.0]) == (5.0, 0.0)


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [((56, 70), (48, 80), 0.0524, 0.3339), ((9, 10), (3, 10), 0.1705, 0.8090), ((10, 10), (0, 20), 0.6791, 1.0)],
)
def test_the_interval_of_an_independent_difference_is_newcombes(
    a: tuple[int, int], b: tuple[int, int], low: float, high: float
) -> None:
    """Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10."""
    first, second = ([i < hits for i in range(n)] for hits, n in (a, b))
    difference = a[0] / a[1] - b[0] / b[1]
    assert independent_difference(first, second) == pytest.approx((difference, low, high), abs=5e-5)
    assert independent_difference(second, first) == pytest.approx((-difference, -high, -low), abs=5e-5)
    with pytest.raises(ValueError, match="non-empty"):
        independent_difference(first, [])
