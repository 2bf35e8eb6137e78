"""The Jacobian penalty against a loop over images, finite differences, and `noisy`, whose control it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import NONE, Net, assert_loss, assert_same, batch, cost, differ, net, plain_weights, weights_after

from defenses.jacobian_penalty import JacobianPenalty
from defenses.noisy import Noisy


def _norm(model: Net, image: Tensor, site: str) -> Tensor:
    """||J||_F^2 of one image, by torch's own Jacobian."""

    def behind(z: Tensor) -> Tensor:
        hidden = model.second(model.norm(z).tanh()).tanh().flatten(1)
        return model.head(hidden)[0]

    at = image[None] if site == "input" else model.first(image[None])
    function = (lambda x: behind(model.first(x))) if site == "input" else behind
    jacobian: Tensor = torch.func.jacrev(function)(at)
    return jacobian.square().sum()


@pytest.mark.parametrize("site", ["first", "input"])
@pytest.mark.parametrize("fit", ["squared", "ce"])
def test_exact_loss_equals_the_formula(site: Any, fit: Any) -> None:
    defense, model, data = JacobianPenalty(NONE, lam=0.3, site=site, probes=0, fit=fit), net(), batch()
    norms = torch.stack([_norm(model, image, site) for image in data.x])
    z = model(data.x)
    error = (z - F.one_hot(data.y, 4)).square().sum(1) if fit == "squared" else -z.log_softmax(1)[range(10), data.y]
    assert_loss(defense.loss(model, data, data.x), (error + 0.3 * norms).mean(), model)


@pytest.mark.parametrize("site", ["first", "input"])
def test_the_penalty_holds_batch_statistics_constant(site: Any) -> None:
    model, reference, data = net(batch_norm=True), net(batch_norm=True), batch()
    terms = JacobianPenalty(NONE, lam=1.0, site=site, probes=0).loss(model, data, data.x)
    z = reference.first(data.x)
    reference.norm.running_mean = z.mean((0, 2, 3)).detach()
    reference.norm.running_var = z.var((0, 2, 3), unbiased=False).detach()
    reference.eval()
    expected = torch.stack([_norm(reference, image, site) for image in data.x]).mean()
    torch.testing.assert_close(terms["jacobian"], expected, rtol=1e-10, atol=1e-12)
    assert model.norm.num_batches_tracked == 1


def test_penalty_by_finite_differences() -> None:
    """Value from differences of the logits, gradient from differences of the value."""
    defense, model, data = JacobianPenalty(NONE, lam=1.0, site="input", probes=0), net(), batch(2)
    total = 0.0
    with torch.no_grad():
        for pixel in range(36):
            step = torch.zeros(36, dtype=torch.float64)
            step[pixel] = 1e-5
            slope = (model(data.x + step.view(1, 1, 6, 6)) - model(data.x - step.view(1, 1, 6, 6))) / 2e-5
            total += float(slope.square().sum()) / 2
    value = defense.loss(model, data, data.x)["jacobian"]
    assert float(value.detach()) == pytest.approx(total, rel=1e-7)
    weight = model.second.weight
    (grad,) = torch.autograd.grad(value, weight)
    torch.manual_seed(4)
    direction, base, ends = torch.randn_like(weight), weight.detach().clone(), []
    for sign in (1, -1):
        weight.data = base + sign * 1e-5 * direction
        ends.append(float(defense.loss(model, data, data.x)["jacobian"].detach()))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((grad * direction).sum()), rel=1e-6)


def test_probes_are_unbiased_and_fresh() -> None:
    model, data = net(), batch(4)
    exact = JacobianPenalty(NONE, lam=1.0, probes=0).loss(model, data, data.x)["jacobian"]
    defense = JacobianPenalty(NONE, lam=1.0, probes=2)
    torch.manual_seed(10)
    draws = torch.stack([defense.loss(model, data, data.x)["jacobian"].detach() for _ in range(150)])
    assert draws.unique().numel() > 20
    assert float(draws.mean()) == pytest.approx(float(exact.detach()), abs=4 * float(draws.std()) / 150**0.5)


@pytest.mark.parametrize("site", ["first", "input"])
def test_it_is_the_squared_error_term_of_noisy(site: Any) -> None:
    """lam = sigma^2, exact: E||Y - t||^2 of the linearized net under noise of that sigma."""
    noisy = Noisy(NONE, sigma=0.4, site=site, structure="jacobian", rows=0, probes=0, w_prob=0.0)
    model, data = noisy.wrap(net()), batch()
    expected = noisy.loss(model, data, data.x)["mse"]
    terms = JacobianPenalty(NONE, lam=0.16, site=site, probes=0).loss(model, data, data.x)
    torch.testing.assert_close(terms["fit"] + terms["jacobian"], expected, rtol=1e-6, atol=0)  # sigma is a float32


@pytest.mark.parametrize("batch_norm", [False, True])
def test_limits(batch_norm: bool) -> None:
    plain = plain_weights(batch_norm)
    assert_same(weights_after(JacobianPenalty(NONE, lam=0.0, fit="ce"), batch_norm=batch_norm), plain)
    assert differ(weights_after(JacobianPenalty(NONE, lam=0.1, fit="ce"), batch_norm=batch_norm), plain)


@pytest.mark.parametrize(
    ("settings", "batch_norm", "expected"),
    [({}, False, 6), ({"probes": 3}, False, 12), ({"probes": 0}, False, 15), ({}, True, 9)],
)
def test_cost(settings: dict[str, Any], batch_norm: bool, expected: int) -> None:
    _, work = cost(JacobianPenalty(NONE, site="input", **settings), batch_norm)
    assert 0.94 * expected < work <= expected
