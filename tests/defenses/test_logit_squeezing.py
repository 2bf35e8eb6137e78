"""Label smoothing and logit squeezing against the formula and their limits."""

from __future__ import annotations

import pytest
import torch
from toys import NONE, assert_loss, assert_same, batch, cost, differ, net, plain_weights, weights_after

from defenses.logit_squeezing import LogitSqueezing


@pytest.mark.parametrize("sigma", [0.0, 0.3])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_loss_equals_the_formula(sigma: float, batch_norm: bool) -> None:
    defense = LogitSqueezing(NONE, smoothing=0.2, beta=0.3, sigma=sigma)
    model, reference, data = net(batch_norm), net(batch_norm), batch()
    torch.manual_seed(9)
    noisy = defense.inner(model, data)
    torch.manual_seed(9)
    torch.testing.assert_close(noisy, data.x + sigma * torch.randn_like(data.x), rtol=0, atol=0)
    z = reference(noisy)
    expected = torch.zeros((), dtype=z.dtype)
    for i, label in enumerate(data.y.tolist()):
        log_p = z[i] - z[i].exp().sum().log()
        target = torch.full_like(log_p, 0.2 / 4)
        target[label] += 0.8
        expected = expected - (target * log_p).sum() + 0.3 * (z[i] ** 2).sum()
    assert_loss(defense.loss(model, data, noisy), expected / 10, model, reference)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_limits(batch_norm: bool) -> None:
    plain = plain_weights(batch_norm)
    off = LogitSqueezing(NONE, smoothing=0.0, beta=0.0)
    assert_same(weights_after(off, batch_norm=batch_norm), plain)
    for part in ({"beta": 0.0}, {"smoothing": 0.0}, {"smoothing": 0.0, "beta": 0.0, "sigma": 0.1}):
        assert differ(weights_after(LogitSqueezing(NONE, **part), batch_norm=batch_norm), plain)


def test_cost() -> None:
    hooks, work = cost(LogitSqueezing(NONE, sigma=0.1))
    assert hooks == 3
    assert 2.8 < work < 3
