"""Joint probability to win, its bounds, and the bound of the expected cross-entropy, against draws and by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.noise import losses as ex

DRAWS = 100_000

pytestmark = pytest.mark.usefixtures("seeded")


def logits(n: int = 6, k: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Means, covariances and labels of `n` Gaussian logit vectors; half of the labels are the largest mean."""
    root = torch.randn(n, k, k, dtype=torch.float64) / 2
    mean = torch.randn(n, k, dtype=torch.float64)
    y = torch.where(torch.arange(n) % 2 == 0, mean.argmax(1), mean.argmin(1))
    return mean, root @ root.transpose(1, 2), y


def draws(mean: Tensor, covariance: Tensor) -> Tensor:
    root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(mean.shape[1], dtype=mean.dtype))
    noise = torch.randn(DRAWS, *mean.shape, dtype=mean.dtype)
    return mean + torch.einsum("bij,dbj->dbi", root, noise)


def wins(mean: Tensor, covariance: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rivals = ex.competitors(mean, y, 0)
    return ex.log_win(mean, ex.pair_variance(covariance, y, rivals), y, rivals), rivals


def test_bounds_hold_the_probability_to_win() -> None:
    mean, covariance, y = logits(20)
    truth = (draws(mean, covariance).argmax(2) == y).double().mean(0)
    each, rivals = wins(mean, covariance, y)
    assert (each.min(0).values.exp() >= truth - 0.01).all()
    assert (1 + each.expm1().sum(0) <= truth + 0.01).all()
    pairs = ex.pair_rows(mean, y, rivals).transpose(0, 1)
    genz = ex.joint_probability(mean, pairs @ covariance @ pairs.transpose(1, 2), y, rivals)
    torch.testing.assert_close(genz.double(), truth, atol=0.02, rtol=0)


def test_the_cross_entropy_bound_is_above_the_expectation_and_tight_without_noise() -> None:
    mean, covariance, y = logits(20)
    drawn = draws(mean, covariance)
    truth = torch.stack([F.cross_entropy(part, y, reduction="none") for part in drawn[:20_000]]).mean(0)
    bound = ex.cross_entropy_bound(mean, covariance, y)
    assert (bound >= truth - 0.02).all()
    assert (bound <= truth + covariance.diagonal(dim1=1, dim2=2).sum(1)).all()
    exact = ex.cross_entropy_bound(mean, torch.zeros_like(covariance), y)
    torch.testing.assert_close(exact, F.cross_entropy(mean, y, reduction="none"))


def test_the_cross_entropy_bound_by_hand() -> None:
    """Common noise on all logits cancels in the second bound, which is then the smaller one."""
    mean, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    common = torch.full((1, 2, 2), 0.8)
    assert ex.cross_entropy_bound(mean, common, y).item() == pytest.approx(math.log(1 + math.exp(-1)))
    apart = torch.diag_embed(torch.tensor([[0.0, 2.0]]))
    assert ex.cross_entropy_bound(mean, apart, y).item() == pytest.approx(math.log(math.e + math.e) - 1)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_a_joint_probability_never_ends_a_training(size: float) -> None:
    """Float32 covariances without full rank have negative eigenvalues by rounding, and a diverged net has none."""
    mean, y = torch.randn(3, 10) * math.sqrt(size), torch.zeros(3, dtype=torch.long)
    rivals = ex.competitors(mean, y, 0)
    root = torch.randn(3, 9, 2) * math.sqrt(size)
    pairs = root @ root.transpose(1, 2)
    pairs[2, 0, 0] = float("nan")
    found = ex.joint_probability(mean, pairs, y, rivals)
    assert found.isnan().tolist() == [False, False, True]
    gaps = (mean.gather(1, y[:, None]) - mean.gather(1, rivals))[:2]
    noise = torch.einsum("bjr,dbr->dbj", root[:2], torch.randn(DRAWS, 2, 2))
    truth = (noise < gaps).all(2).float().mean(0)
    torch.testing.assert_close(found[:2], truth, atol=0.03, rtol=0)
