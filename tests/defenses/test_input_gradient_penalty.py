"""The input gradient penalty against the formula, and against `robust_training`, with which it coincides at x."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_robust_training import NORMS, reference
from toys import assert_loss, assert_same, batch, cost, differ, net, plain_weights, threat, weights_after

from bench.core.threat import Norm
from defenses.input_gradient_penalty import InputGradientPenalty
from defenses.robust_training import RobustTraining


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_loss_at_a_random_point_equals_the_formula(norm: Norm, strength: float) -> None:
    model, data = net(), batch()
    defense = InputGradientPenalty(threat(norm), eta=1.0, strength=strength)
    u = defense.inner(model, data)
    assert not torch.equal(u, data.x)
    assert_loss(defense.loss(model, data, u), reference(model, u, data.y, norm, 0.05 * strength), model)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_at_the_images_it_is_robust_training(norm: Norm, batch_norm: bool) -> None:
    found = weights_after(InputGradientPenalty(threat(norm)), batch_norm=batch_norm)
    assert_same(found, weights_after(RobustTraining(threat(norm), variant="penalty"), batch_norm=batch_norm), atol=0)


def test_limits() -> None:
    plain = plain_weights()
    assert_same(weights_after(InputGradientPenalty(threat(eps="0"), eta=2.0)), plain)
    assert_same(weights_after(InputGradientPenalty(threat(), strength=0.0)), plain)
    assert differ(weights_after(InputGradientPenalty(threat())), plain)
    model, data = net(), batch()
    u = InputGradientPenalty(threat(), eta=1.0).inner(model, data)
    terms = InputGradientPenalty(threat(), eta=1.0, strength=0.0).loss(model, data, u)
    assert_loss(terms, F.cross_entropy(model(u), data.y), model)


def test_cost() -> None:
    for batch_norm, expected in ((False, 6), (True, 9)):
        _, work = cost(InputGradientPenalty(threat()), batch_norm)
        assert expected - 0.4 < work <= expected
