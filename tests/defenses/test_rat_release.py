"""The soft labels of RAT's released code, built by loops from its description, and the ablations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor

from defenses.rat_release import RATRelease, head_slope, soft_labels
from defenses.trades import TRADES

THREAT = toys.threat()
CHEAP: dict[str, Any] = {"steps": 3, "rel_step_size": 0.4}


def matrix(gap: Tensor, cc: float) -> list[list[float]]:
    """G of methods 5.2 (c), by loops; equal gaps give uniform rows."""
    a = [float(v - gap.min()) for v in gap]
    whole = sum(a)
    a = [v / whole for v in a] if whole else a
    rows = []
    for c in range(len(a)):
        rest = sum(a) - a[c]
        row = [cc * v / rest if rest else cc / (len(a) - 1) for v in a]
        row[c] = 1 - cc
        rows.append(row)
    return rows


def divergence(q: Tensor, p: Tensor) -> Tensor:
    """Mean KL(q || p), with 0 log 0 = 0."""
    parts = [b * (b / a).log() for a, b in zip(p.flatten(), q.flatten(), strict=True) if b > 0]
    return torch.stack(parts).sum() / len(p)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("settings", [{}, {"fix_q2": True}, {"smoothing": "uniform"}, {"cc": 0.3, "second": 0.4}])
def test_loss_and_gradients_equal_a_reference_from_the_description(settings: dict[str, Any], batch_norm: bool) -> None:
    defense, model, data = RATRelease(THREAT, alpha=0.3, beta=5.0, **settings), toys.net(batch_norm), toys.batch()
    adv = (data.x + 0.2 * torch.rand_like(data.x)).clamp(0, 1)
    slopes = []
    for x in (data.x, adv):  # two extra backward passes to read the last layer's gradient, as released
        loss = F.cross_entropy(model(x), data.y)
        slopes.append(torch.autograd.grad(loss, model.head.weight)[0].sum(1))
    t1n, t1a, t2n, t2a = slopes[0].abs(), slopes[1].abs(), slopes[0] * slopes[0], slopes[1] * slopes[1]
    gaps = [t1n - t1a, t1a - t1n, t2a - t2n, t2n - t2a if settings.get("fix_q2") else t2a - t2n]
    cc = settings.get("cc", 1 - 2 / 4)
    if settings.get("smoothing") == "uniform":
        gaps = [torch.zeros(4)] * 4
    q1, q1_mirror, q2, q2_clean = (torch.tensor(matrix(gap, cc), dtype=torch.float64)[data.y] for gap in gaps)
    p, moved = model(data.x).softmax(1), model(adv).softmax(1)
    first = 0.5 * (divergence(q1, moved) + divergence(q1_mirror, p))
    second = 0.5 * (divergence(q2, moved) + divergence(q2_clean, p))
    expected = 0.7 * F.cross_entropy(model(data.x), data.y) + 0.3 * first
    expected = expected + 0.3 * settings.get("second", 0.5) * second + 5 * divergence(p, moved)
    toys.assert_loss(defense.loss(model, data, adv), expected, model)


def test_the_slope_from_the_formula_equals_autograd() -> None:
    model, data = toys.net(batch_norm=True), toys.batch()
    h = model.body(data.x)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(data.x), data.y), model.head.weight)
    torch.testing.assert_close(head_slope(model.head(h), h, data.y), grad.sum(1), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_rows_are_distributions_and_equal_gaps_are_uniform(classes: int) -> None:
    torch.manual_seed(0)
    cc = 1 - 2 / classes
    one_hot = torch.zeros(classes)
    one_hot[1] = 3.0
    for gap in (torch.randn(classes), torch.full((classes,), 0.7), one_hot, -one_hot, 1e-30 * torch.rand(classes)):
        rows = soft_labels(gap, cc)
        assert bool(torch.isfinite(rows).all())
        assert float(rows.min()) >= 0
        torch.testing.assert_close(rows.sum(1), torch.ones(classes))
        torch.testing.assert_close(rows.diagonal(), torch.full((classes,), 1 - cc))
    even = soft_labels(torch.full((classes,), 0.7), cc)
    torch.testing.assert_close(even[0, 1:], torch.full((classes - 1,), cc / (classes - 1)))


def test_the_mass_taken_is_the_released_one_for_10_and_100_classes() -> None:
    for classes, cc in ((10, 0.8), (100, 0.98)):
        logits, h, y = torch.randn(8, classes), torch.rand(8, 5), torch.arange(8)
        for q in RATRelease(THREAT).targets(logits, logits + 0.1 * torch.randn_like(logits), h, h, y):
            torch.testing.assert_close(q[torch.arange(8), y], torch.full((8,), 1 - cc))


def test_equal_outputs_give_no_nan() -> None:
    model, data = toys.net(), toys.batch()
    terms = RATRelease(THREAT).loss(model, data, data.x)
    for grad in toys.gradients(torch.stack(list(terms.values())).sum(), model):
        assert bool(torch.isfinite(grad).all())


def test_limits_and_ablations() -> None:
    trades = toys.weights_after(TRADES(THREAT, **CHEAP), batch_norm=True)
    plain = RATRelease(THREAT, alpha=0.0, noise_std=0.0, **CHEAP)
    toys.assert_same(toys.weights_after(plain, batch_norm=True), trades)
    variants: list[dict[str, Any]] = [
        {},
        {"smoothing": "uniform"},
        {"fix_q2": True},
        {"alpha": 0.0},
        {"noise_std": 0.3},
    ]
    runs = [toys.weights_after(RATRelease(THREAT, **CHEAP, **each)) for each in variants]
    for place, one in enumerate(runs):
        assert all(toys.differ(one, other) for other in runs[:place])


def test_the_attack_sees_noise_on_the_convolutions_only_and_leaves_no_trace() -> None:
    defense, data = RATRelease(THREAT, noise_std=0.2, **CHEAP), toys.batch()
    toys.assert_leaves_no_trace(lambda model: defense.inner(model, data))
    model, noisy = toys.net(), copy.deepcopy(toys.net())
    torch.manual_seed(5)
    found = defense.inner(model, data)
    torch.manual_seed(5)
    with torch.no_grad():
        for layer in (noisy.first, noisy.second):
            for parameter in (layer.weight, layer.bias):
                parameter += 0.2 * torch.randn_like(parameter)
    assert torch.equal(found, TRADES(THREAT, **CHEAP).inner(noisy, data))


def test_awp_climbs_plain_trades() -> None:
    model, data = toys.net(), toys.batch()
    adv = data.x + 0.01
    ascent = RATRelease(THREAT, beta=5.0).ascent_loss(model, data, adv)
    toys.assert_loss(ascent, sum(TRADES(THREAT, beta=5.0).loss(model, data, adv).values()), model)  # type: ignore[arg-type]


def test_costs_what_trades_costs() -> None:
    units, work = toys.cost(RATRelease(THREAT))
    _, trades = toys.cost(TRADES(THREAT))
    assert (units, work) == (27, pytest.approx(trades, rel=0.02))
