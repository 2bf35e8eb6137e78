"""Randomised smoothing: certificates against truth, bounds against SciPy."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import beta as beta_law
from scipy.stats import binomtest, norm
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
    assert [len(part) for part in seen] == [4, 30, 20]
    assert len(draws.unique(dim=0)) == 54  # the draws that choose the class are not those that count it
    assert draws.min() < 0
    assert draws.std().item() == pytest.approx(0.5, rel=0.05)
    seen.clear()
    model.predict(image)
    assert not torch.equal(seen[0], seen[1])


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
