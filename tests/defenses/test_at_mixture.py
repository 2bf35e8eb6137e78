"""Mixture training against its formula, its limits, and what its attack leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import (
    assert_leaves_no_trace,
    assert_loss,
    assert_same,
    batch,
    cost,
    differ,
    dual_step,
    net,
    plain_weights,
    threat,
    weights_after,
)

from bench.core.threat import Norm
from defenses.at_mixture import ATMixture
from defenses.pgd_at import PGDAT


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("label", ["true", "pred", "least_likely"])
def test_fgsm_equals_the_formula(norm: Norm, label: Any) -> None:
    model, data = net(batch_norm=True), batch()
    adv = ATMixture(threat(norm), label=label).inner(model, data)
    x = data.x.clone().requires_grad_()
    logits = model.eval()(x)
    y = {"true": data.y, "pred": logits.argmax(1), "least_likely": logits.argmin(1)}[label]
    sign = -1 if label == "least_likely" else 1
    (grad,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)
    torch.testing.assert_close(adv, (data.x + sign * 0.05 * dual_step(norm, grad)).clamp(0, 1), rtol=0, atol=1e-8)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_loss_equals_the_formula(joint: bool, batch_norm: bool) -> None:
    defense, data = ATMixture(threat(), alpha=0.3, joint=joint), batch()
    model, reference = net(batch_norm), net(batch_norm)
    adv = defense.inner(model, data)
    if joint:
        both = reference(torch.cat([data.x, adv])).softmax(1)
        p, q = both[:10], both[10:]
    else:
        p, q = reference(data.x).softmax(1), reference(adv).softmax(1)
    rows = torch.arange(10)
    expected = -(0.3 * p[rows, data.y].log() + 0.7 * q[rows, data.y].log()).mean()
    assert_loss(defense.loss(model, data, adv), expected, model, reference)
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12)


def test_joint_batches_share_statistics() -> None:
    assert not differ(weights_after(ATMixture(threat())), weights_after(ATMixture(threat(), joint=False)))
    joint, apart = (weights_after(ATMixture(threat(), joint=j), batch_norm=True) for j in (True, False))
    assert differ(joint, apart)


@pytest.mark.parametrize("joint", [False, True])
def test_limits(joint: bool) -> None:
    assert_same(weights_after(ATMixture(threat(), alpha=1.0, joint=joint)), plain_weights())
    for batch_norm in (False, True):
        none = ATMixture(threat(eps="0"), joint=joint)
        assert_same(weights_after(none, batch_norm=batch_norm), plain_weights(batch_norm))
    assert differ(weights_after(ATMixture(threat(), joint=joint)), plain_weights())
    pgd: dict[str, Any] = {"steps": 4, "rel_step_size": 0.3, "start": "uniform", "attack_bn_mode": "train_frozen_stats"}
    mixture = ATMixture(threat(), alpha=0.0, joint=joint, **pgd)
    assert_same(weights_after(mixture), weights_after(PGDAT(threat(), **pgd)))


def test_two_batches_with_no_clean_weight_are_pgd_at_under_batch_norm() -> None:
    pgd: dict[str, Any] = {"steps": 4, "rel_step_size": 0.3, "start": "uniform", "attack_bn_mode": "train_frozen_stats"}
    mixture = ATMixture(threat(), alpha=0.0, joint=False, **pgd)
    assert_same(weights_after(mixture, batch_norm=True), weights_after(PGDAT(threat(), **pgd), batch_norm=True))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 8),
        ({"joint": False}, 8),
        ({"label": "pred"}, 9),
        ({"steps": 10, "rel_step_size": 0.25, "start": "uniform"}, 26),
    ],
)
def test_cost(settings: dict[str, Any], expected: int) -> None:
    hooks, work = cost(ATMixture(threat(), **settings))
    assert hooks == expected
    assert expected - 0.3 < work < expected  # the first layer needs no input gradient


@pytest.mark.parametrize("label", ["true", "least_likely"])
def test_the_attack_leaves_no_trace(label: Any) -> None:
    assert_leaves_no_trace(lambda model: ATMixture(threat(), label=label).inner(model, batch()))


def test_a_weak_attack_is_refused() -> None:
    with pytest.raises(ValueError, match="less than the budget"):
        ATMixture(threat(), steps=2, rel_step_size=0.25)
