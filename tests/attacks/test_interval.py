"""The evaluation `interval`: columns, its place below PGD and AutoAttack, the margin for rounding, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import digits, fit, mlp
from torch import Tensor, nn

from attacks.interval import Interval
from attacks.pgd import PGD
from bench.core.attack import Context, Unsupported
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.smoothing import Smoothed
from bench.core.threat import Threat
from bench.noise.interval import Method


def _threat(eps: str) -> Threat:
    return Threat("Linf", Epsilon(eps))


@pytest.fixture(scope="module")
def model() -> Classifier:
    return Classifier(fit(mlp(32, 1)))


@pytest.mark.parametrize("method", ["interval", "crown"])
def test_it_proves_what_no_attack_breaks(model: Classifier, method: Method) -> None:
    _, _, x, y = digits()
    threat, told = _threat("0.01"), list[int]()
    context = Context(1, lambda done, total, note: told.append(done))
    found = Interval(threat, method=method, batch_size=64).evaluate(model, x, y, context).columns
    attacked = PGD(threat, steps=20, restarts=2, loss="cw").evaluate(model, x, y, Context(1)).columns["correct"]
    assert set(found) == {"correct", "clean", "bound"}
    assert torch.equal(found["clean"], model.predict(x) == y)
    assert torch.equal(found["correct"], found["bound"] > 0)  # a wrong image is wrong in the ball too
    assert not (found["correct"] & ~attacked).any()
    assert 0.2 < found["correct"].float().mean() <= attacked.float().mean() < found["clean"].float().mean() + 1e-9
    assert told[-1] == 200


def test_crown_proves_more_here_and_more_budget_proves_less(model: Classifier) -> None:
    _, _, x, y = digits()

    def proved(eps: str, method: Method) -> Tensor:
        return Interval(_threat(eps), method=method).evaluate(model, x, y, Context(1)).columns["correct"]

    interval, crown, larger = proved("0.02", "interval"), proved("0.02", "crown"), proved("0.04", "interval")
    assert interval.sum() < crown.sum()
    assert larger.sum() < interval.sum()
    assert not (larger & ~interval).any()


def test_without_a_budget_the_bound_is_the_margin(model: Classifier) -> None:
    """Less what covers rounding and the tolerance of the check of attacks, which is little and never nothing."""
    _, _, x, y = digits()
    bound = Interval(_threat("0")).evaluate(model, x, y, Context(1)).columns["bound"]
    with torch.no_grad():
        z = model(x)
    own = z.gather(1, y[:, None]).squeeze(1)
    margin = own - z.masked_fill(F.one_hot(y, 10).bool(), -torch.inf).amax(1)
    assert (bound < margin).all()
    assert float((margin - bound).max()) < 0.01


def test_a_tie_in_float32_is_not_proved() -> None:
    """The margin is 1e-9 in exact arithmetic, and 0 in float32."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 1]]))
        net[1].bias.copy_(torch.tensor([1e-9, 0.0]))
    x, y = torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
    model = Classifier(net.eval())
    assert (model(x)[:, 0] == model(x)[:, 1]).any()
    assert not Interval(_threat("0")).evaluate(model, x, y, Context(1)).columns["correct"].any()


def test_what_it_does_not_apply_to() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    attack, x, y = Interval(_threat("0.1")), torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)
    assert "deterministic" in str(attack.unsupported_reason(Smoothed(net, 0.1, 10)))
    assert attack.unsupported_reason(Classifier(net)) is None
    with pytest.raises(Unsupported, match="LayerNorm"):
        attack.evaluate(Classifier(nn.Sequential(nn.Flatten(), nn.LayerNorm(64), net[1])), x, y, Context(1))
