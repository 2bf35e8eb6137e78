"""Randomized smoothing: certificates against truth, bounds against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import beta as beta_law
from scipy.stats import binomtest, chisquare, norm
from torch import Tensor, nn

from bench.core.smoothing import Smoothed, check_certifiable, votes_needed
from bench.core.stats import clopper_pearson_lower


class _Line(nn.Module):
    """Two classes on either side of the hyperplane w x = 0: distances and vote probabilities are known."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.register_buffer("w", w)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w
        return torch.stack([score, -score], dim=1)


class _Always(nn.Module):
    """The same class everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0, 0.0]).expand(len(x), 3)


class _Coin(nn.Module):
    """Each of two classes half of the time."""

    def forward(self, x: Tensor) -> Tensor:
        side = (x.flatten(1)[:, 0] > 0).float()
        return torch.stack([side, 1 - side, torch.full_like(side, -1)], dim=1)


def test_a_certificate_never_exceeds_the_true_distance() -> None:
    torch.manual_seed(0)
    w = torch.randn(9, dtype=torch.float64)
    x = 0.3 * torch.randn(60, 1, 3, 3, dtype=torch.float64)
    score = x.flatten(1) @ w
    found = Smoothed(_Line(w), sigma=0.25).certify(x, n0=50, n=2000, alpha=0.001, batch_size=500)
    sure = found.prediction >= 0
    distance = score.abs() / w.norm()
    # for a linear model the ideal radius is the distance itself, so the bound's confidence is all that is lost
    assert (found.radius <= distance + 1e-12).all()
    assert (found.prediction[sure] == (score < 0).long()[sure]).all()
    assert (found.radius[~sure] == 0).all()
    assert sure.float().mean() > 0.5
    ideal = torch.tensor(norm.cdf(distance / 0.25))
    assert ((found.p_lower < ideal) & (ideal - found.p_lower < 0.1))[sure].all()


def test_unanimous_draws_give_alpha_to_the_one_over_n() -> None:
    found = Smoothed(_Always(), sigma=0.5).certify(torch.zeros(2, 1, 2, 2), n0=10, n=1000, alpha=0.001, batch_size=300)
    assert found.prediction.tolist() == [1, 1]
    bound = 0.001 ** (1 / 1000)
    assert found.p_lower.tolist() == pytest.approx([bound, bound], rel=1e-12)
    assert found.radius.tolist() == pytest.approx([0.5 * norm.ppf(bound)] * 2, rel=1e-9)


def test_a_coin_makes_it_abstain() -> None:
    torch.manual_seed(0)
    coin = Smoothed(_Coin(), sigma=1.0)
    x = torch.zeros(20, 1, 2, 2)
    assert (coin.predict(x) == -1).float().mean() > 0.9
    found = coin.certify(x, n0=20, n=500, alpha=0.001, batch_size=500)
    assert (found.prediction == -1).all()
    assert (found.radius == 0).all()


def test_draws_are_fresh_and_not_clipped() -> None:
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.clone())
            return torch.zeros(len(x), 3)

    model = Smoothed(Spy(), sigma=0.5, n_vote=2)
    image = torch.zeros(1, 1, 8, 8)
    model.certify(image, n0=4, n=50, alpha=0.001, batch_size=30)
    draws = torch.cat(seen)
    assert [len(part) for part in seen] == [30, 24]  # both kinds of draws are one stream
    assert len(draws.unique(dim=0)) == 54  # the draws that choose the class are not those that count it
    assert draws.min() < 0
    assert draws.std().item() == pytest.approx(0.5, rel=0.05)
    seen.clear()
    model.predict(image)
    assert not torch.equal(seen[0], seen[1])


class _Sign(nn.Module):
    """Class 1 where pixel 0 is positive, 2 where also pixel 1 is, else 0: counts that no symmetry makes right."""

    def forward(self, x: Tensor) -> Tensor:
        one, two = (x.flatten(1)[:, :2] > 0).unbind(1)
        label = one.long() * (1 + two.long())
        return nn.functional.one_hot(label, 3).to(x.dtype)


def _naive(model: Smoothed, x: Tensor, n0: int, n: int) -> Tensor:
    """Counts by a loop over images and draws, in the order in which the paper takes them."""
    counts = torch.zeros(len(x), 2, 3, dtype=torch.int64)
    for b, image in enumerate(x):
        for draw in range(n0 + n):
            noisy = image + model.sigma * torch.randn(image.shape)
            counts[b, int(draw >= n0), int(model.net(noisy[None]).argmax())] += 1
    return counts


def test_counts_are_those_of_a_loop_over_images_and_draws() -> None:
    torch.manual_seed(0)
    x = 0.3 * torch.randn(5, 1, 4, 4)  # 16 values: the CPU's generator gives the same numbers however they are cut
    model = Smoothed(_Sign(), sigma=0.5)
    torch.manual_seed(1)
    expected = _naive(model, x, n0=7, n=60)
    assert (expected.sum(2) == torch.tensor([7, 60])).all()
    for batch_size in (1, 10, 67, 100, 1000):
        torch.manual_seed(1)
        assert torch.equal(model.counts(x, 7, 60, batch_size), expected), batch_size
    torch.manual_seed(1)
    found = model.certify(x, n0=7, n=60, alpha=0.05)
    label = expected[:, 0].argmax(1)
    hits = expected[:, 1].gather(1, label[:, None])[:, 0]
    bounds = [clopper_pearson_lower(int(k), 60, 0.05) for k in hits]
    assert found.p_lower.tolist() == bounds
    assert found.prediction.tolist() == [int(c) if p > 0.5 else -1 for c, p in zip(label, bounds, strict=True)]
    assert found.radius.tolist() == pytest.approx([0.5 * norm.ppf(p) if p > 0.5 else 0 for p in bounds])
    assert {int(c) for c in found.prediction} > {-1}  # some abstain, some do not


def test_counts_follow_the_law_of_the_noise() -> None:
    torch.manual_seed(0)
    x = torch.tensor([[0.2, -0.1], [-0.3, 0.4], [0.0, 0.0]]).view(3, 1, 1, 2)
    counts = Smoothed(_Sign(), sigma=0.5).counts(x, 1, 20_000, 1000)[:, 1]
    one, two = norm.cdf(x.flatten(1).numpy() / 0.5).T
    ideal = np.stack([1 - one, one * (1 - two), one * two], axis=1)
    for seen, expected in zip(counts.numpy(), ideal, strict=True):
        assert chisquare(seen, 20_000 * expected).pvalue > 1e-4


def test_the_class_is_chosen_by_other_draws_than_those_that_count_it() -> None:
    """Over a coin the choice says nothing of the count: half of the hits on average. A choice by the very draws that
    count would be right more often than not: 0.5 + 0.4 / sqrt(n)."""
    torch.manual_seed(0)
    counts = Smoothed(_Coin(), sigma=1.0).counts(torch.zeros(4000, 1, 1, 1), 25, 25, 1000)
    chosen = counts[:, 0].argmax(1, keepdim=True)
    share = counts[:, 1].gather(1, chosen).double() / 25
    assert float(share.mean()) == pytest.approx(0.5, abs=5 * 0.1 / 4000**0.5)
    own = counts[:, 0].gather(1, chosen).double() / 25
    assert float(own.mean()) > 0.55


def test_the_report_counts_images_as_their_draws_are_done() -> None:
    for batch_size in (3, 50, 1000):
        done: list[int] = []
        Smoothed(_Coin(), sigma=1.0).counts(torch.zeros(6, 1, 1, 1), 10, 30, batch_size, done.append)
        assert done == [1, 2, 3, 4, 5, 6]


def test_a_linear_model_of_two_classes_gets_all_that_its_draws_allow() -> None:
    """There the ideal radius is the distance, so p is known: the bound must come from a count that p explains."""
    torch.manual_seed(1)
    w = torch.randn(16)
    x = 0.2 * torch.randn(40, 1, 4, 4)
    n = 3000
    counts = Smoothed(_Line(w), sigma=0.5).counts(x, 100, n, 1000)
    distance = (x.flatten(1) @ w).abs() / w.norm()
    label = (x.flatten(1) @ w < 0).long()
    hits = counts[:, 1].gather(1, label[:, None])[:, 0].tolist()
    ideal = norm.cdf(distance.numpy() / 0.5).tolist()
    assert all(binomtest(k, n, p).pvalue > 1e-5 for k, p in zip(hits, ideal, strict=True))


@pytest.mark.parametrize(("n", "alpha"), [(1, 0.6), (20, 0.05), (100, 0.001)])
def test_the_vote_is_the_two_sided_binomial_test(n: int, alpha: float) -> None:
    table = votes_needed(n, alpha)
    for total in range(n + 1):
        for first in range((total + 1) // 2, total + 1):
            accepted = total > 0 and binomtest(first, total, 0.5).pvalue <= alpha
            assert (first >= table[total]) == accepted, (first, total)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (1, 10), (7, 10), (10, 10), (99_000, 100_000), (100_000, 100_000)])
@pytest.mark.parametrize("alpha", [0.05, 0.001])
def test_clopper_pearson_is_scipys(hits: int, n: int, alpha: float) -> None:
    bound = clopper_pearson_lower(hits, n, alpha)
    exact = binomtest(hits, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert bound == pytest.approx(exact, abs=1e-12)
    if hits:
        assert bound == pytest.approx(beta_law.ppf(alpha, hits, n - hits + 1), rel=1e-9)
        assert binomtest(hits, n, bound, alternative="greater").pvalue == pytest.approx(alpha, rel=1e-6)


def test_impossible_settings_are_refused() -> None:
    check_certifiable(10, 0.001)
    with pytest.raises(ValueError, match="can certify nothing"):
        check_certifiable(9, 0.001)
    with pytest.raises(ValueError, match="sigma > 0"):
        Smoothed(_Always(), sigma=0)
