"""autoattack_fast leaves out images with a proof: the same outcomes, image by image, for less."""

from __future__ import annotations

import functools

import pytest
import torch
from nets import Unproved, digits, fit, mlp
from torch import Tensor

from attacks._proofs import TRIAL, proved_images
from attacks.autoattack_fast import AutoAttackFast
from attacks.interval import Interval
from bench.core.attack import Context
from bench.core.classifier import Classifier, Counted
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.noise.interval import METHODS

THREAT = Threat("Linf", Epsilon("0.02"))


@functools.cache
def _case() -> tuple[Classifier, Tensor, Tensor]:
    """A net of which CROWN proves a part of the robust images, and 60 digits."""
    model = Classifier(fit(mlp(16, 3), steps=80))
    _, _, x, y = digits()
    return model, x[:60], y[:60]


@pytest.mark.parametrize("audit", [0, 5])
def test_outcomes_are_those_of_the_whole_suite(audit: int) -> None:
    model, x, y = _case()
    attack = AutoAttackFast(THREAT, mode="quick", audit=audit)
    found = attack.evaluate(model, x, y, Context(3)).columns
    whole = AutoAttackFast(THREAT, mode="quick").evaluate(Unproved(model.net), x, y, Context(3)).columns
    assert torch.equal(found["correct"], whole["correct"])
    assert 0.1 < found["proved"].double().mean() < found["correct"].double().mean() < 1
    assert not whole["proved"].any()
    assert not (found["proved"] & ~whole["correct"]).any()
    if audit:
        assert not (found["proved"] & (found["audited"] | found["screened"])).any()
    else:
        assert torch.equal(found["stage"], whole["stage"])
        assert found["forwards"][0] < 0.8 * whole["forwards"][0]


def test_both_methods_prove() -> None:
    """What is proved is what one of the two evaluations proves, and each passes are counted."""
    model, x, y = _case()
    right = model.predict(x) == y
    x, y = x[right], y[right]
    each = (Interval(THREAT, method=method) for method in METHODS)
    proofs = [evaluation.evaluate(model, x, y, Context(0)).columns["correct"] for evaluation in each]
    counted = Counted(model)
    assert torch.equal(proved_images(counted, x, y, THREAT), proofs[0] | proofs[1])
    assert (proofs[1] & ~proofs[0]).any()
    assert counted.forwards > 2 * len(x)
    assert counted.backwards % 9 == 0
    assert counted.backwards > 0


def test_a_trial_that_proves_nothing_ends_it() -> None:
    model, x, y = _case()
    counted, hopeless = Counted(model), Threat("Linf", Epsilon("0.3"))
    assert not proved_images(counted, x, y, hopeless).any()
    assert (counted.forwards, counted.backwards) == (2 * TRIAL, 0)


def test_nothing_is_tried_where_nothing_can_be_proved() -> None:
    model, x, y = _case()
    counted = Counted(Unproved(model.net))
    assert not proved_images(counted, x, y, THREAT).any()
    assert (counted.forwards, counted.backwards) == (0, 0)
