"""Certification and clean accuracy as evaluations: columns, reproducibility, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks.certify import Certify
from attacks.clean import Clean
from attacks.pgd import PGD
from bench.core.attack import Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.smoothing import Smoothed
from bench.core.threat import Threat

NO_THREAT = Threat("Linf", Epsilon(0))


def _model(sigma: float = 0.25) -> tuple[Smoothed, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.rand(30, 1, 4, 4)
    with torch.no_grad():
        net[1].weight.mul_(4)
        y = net(x).argmax(1)
    return Smoothed(net.eval(), sigma, n_vote=100), x, y


def test_columns_and_their_meaning() -> None:
    model, x, y = _model()
    wrong = torch.arange(30) < 5
    y = torch.where(wrong, (y + 1) % 3, y)
    done: list[int] = []
    context = Context(1, lambda at, total, note: done.append(at))
    columns = Certify(NO_THREAT, n=500, batch_size=200).evaluate(model, x, y, context).columns
    assert set(columns) == {"correct", "radius", "prediction"}
    assert torch.equal(columns["correct"], columns["prediction"] == y)
    abstained = columns["prediction"] == -1
    assert (columns["radius"][abstained] == 0).all()
    assert (columns["radius"][~abstained] > 0).all()
    # a wrong prediction has a radius too: it is as stable as a right one, and counts nowhere
    assert (columns["radius"][wrong & ~abstained] > 0).any()
    assert not columns["correct"][abstained].any()
    assert done == list(range(1, 31))


def test_certified_accuracy_is_below_attacked_accuracy() -> None:
    model, x, y = _model()
    radius = 0.1
    columns = Certify(NO_THREAT, n=2000).evaluate(model, x, y, Context(1)).columns
    certified = columns["correct"] & (columns["radius"] >= radius)
    attack = PGD(Threat("L2", Epsilon(radius)), steps=10, rel_step_size=0.25)
    attacked = attack.evaluate(model, x, y, Context(1)).columns["correct"]
    assert 0 < certified.float().mean() <= attacked.float().mean()
    assert (attacked | ~certified).all()


def test_same_seed_same_certificate_and_no_trace() -> None:
    model, x, y = _model()
    model.train()
    state = torch.get_rng_state()
    judge = Certify(NO_THREAT, n=200, n0=20)
    one, other, third = (judge.evaluate(model, x[:5], y[:5], Context(seed)).columns for seed in (1, 1, 2))
    assert torch.equal(one["radius"], other["radius"])
    assert not torch.equal(one["radius"], third["radius"])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_certify_is_refused() -> None:
    with pytest.raises(ValueError, match="can certify nothing"):
        Certify(NO_THREAT, n=9, alpha=0.001)
    plain = Classifier(nn.Flatten())
    assert Certify(NO_THREAT).unsupported_reason(plain) == "needs a smoothed classifier"
    assert Certify(NO_THREAT).unsupported_reason(_model()[0]) is None


def test_clean_scores_by_the_models_own_rule() -> None:
    model, x, y = _model(sigma=1.0)
    columns = Clean(NO_THREAT).evaluate(model, x, y, Context(0)).columns
    assert set(columns) == {"correct", "select", "share", "vote", "always"}
    # at this noise level the vote abstains more often than the majority errs, and no image is right in every draw
    assert columns["correct"].sum() < columns["vote"].sum()
    assert not columns["always"].any()
    assert (columns["share"] < 1).all()
    plain = Clean(NO_THREAT).evaluate(Classifier(model.net), x, y, Context(0)).columns
    assert set(plain) == {"correct"}
    assert plain["correct"].all()
