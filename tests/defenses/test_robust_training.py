"""Both variants of robust training against the formula, each other, and finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import (
    Net,
    assert_leaves_no_trace,
    assert_loss,
    assert_same,
    batch,
    cost,
    differ,
    dual_step,
    gradients,
    net,
    plain_weights,
    threat,
    weights_after,
)

from bench.core.threat import Norm
from defenses.robust_training import RobustTraining

NORMS: list[Norm] = ["Linf", "L2", "L1"]


def dual(norm: Norm, g: Tensor) -> Tensor:
    return g.abs().sum() if norm == "Linf" else g.square().sum().sqrt() if norm == "L2" else g.abs().max()


def reference(model: Net, x: Tensor, y: Tensor, norm: Norm, eps: float) -> Tensor:
    """Image by image, so that nothing can mix: CE + eps ||grad CE||_dual."""
    total = torch.zeros((), dtype=x.dtype)
    for image, label in zip(x, y, strict=True):
        image = image.clone().requires_grad_()
        ce = -model(image[None]).log_softmax(1)[0, label]
        (g,) = torch.autograd.grad(ce, image, create_graph=True)
        total = total + ce + eps * dual(norm, g)
    return total / len(x)


@pytest.mark.parametrize("norm", NORMS)
def test_penalty_equals_the_formula(norm: Norm) -> None:
    model, data = net(), batch()
    defense = RobustTraining(threat(norm), variant="penalty")
    expected = reference(model, data.x, data.y, norm, 0.05)
    assert_loss(defense.loss(model, data, data.x), expected, model)


@pytest.mark.parametrize("norm", NORMS)
def test_penalty_holds_batch_statistics_constant(norm: Norm) -> None:
    """Under training BatchNorm the penalty is that of the net normalized by the batch's own statistics."""
    model, fixed, data = net(batch_norm=True), net(batch_norm=True), batch()
    terms = RobustTraining(threat(norm), variant="penalty").loss(model, data, data.x)
    z = fixed.first(data.x)
    fixed.norm.running_mean = z.mean((0, 2, 3)).detach()
    fixed.norm.running_var = z.var((0, 2, 3), unbiased=False).detach()
    fixed.eval()
    sizes = [reference(fixed, x[None], y[None], norm, 0.05) for x, y in zip(data.x, data.y, strict=True)]
    expected = torch.stack(sizes).mean() - F.cross_entropy(fixed(data.x), data.y)
    torch.testing.assert_close(terms["penalty"], expected, rtol=1e-10, atol=1e-12)
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("norm", NORMS)
def test_alternate_equals_the_formula(norm: Norm) -> None:
    defense, model, data = RobustTraining(threat(norm)), net(batch_norm=True), batch()
    adv = defense.inner(model, data)
    x = data.x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model.eval()(x), data.y, reduction="sum"), x)
    expected = (data.x + 0.05 * dual_step(norm, g)).clamp(0, 1)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-8)
    model.train()
    wanted = -model(expected).log_softmax(1)[torch.arange(10), data.y].mean()
    assert_loss(defense.loss(model, data, expected), wanted, model)


@pytest.mark.parametrize("norm", NORMS)
def test_the_variants_agree_to_second_order(norm: Norm) -> None:
    data, gaps = batch(low=0.3, high=0.7), []
    for eps in ("0.02", "0.01", "0.005"):
        found = []
        for variant in ("penalty", "alternate"):
            model = net()
            defense = RobustTraining(threat(norm, eps), variant=variant)  # type: ignore[arg-type]
            total = torch.stack(list(defense.loss(model, data, defense.inner(model, data)).values())).sum()
            found.append(torch.cat([total.detach()[None], *(g.flatten() for g in gradients(total, model))]))
        gap = found[0] - found[1]
        gaps.append((float(gap[0].abs()), float(gap[1:].norm())))
    for larger, smaller in itertools.pairwise(gaps):
        for one, other in zip(larger, smaller, strict=True):
            assert one / other == pytest.approx(4, rel=0.1)


def test_penalty_gradient_by_finite_differences() -> None:
    model, data = net(), batch()
    defense = RobustTraining(threat("L2"), variant="penalty")
    weight = model.second.weight

    def value() -> Tensor:
        return defense.loss(model, data, data.x)["penalty"]

    (grad,) = torch.autograd.grad(value(), weight)
    torch.manual_seed(4)
    direction = torch.randn_like(weight)
    base = weight.detach().clone()
    ends = []
    for sign in (1, -1):
        weight.data = base + sign * 1e-5 * direction
        ends.append(float(value().detach()))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float((grad * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("variant", ["penalty", "alternate"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_no_budget_is_plain_training(variant: Any, batch_norm: bool) -> None:
    plain = plain_weights(batch_norm)
    assert_same(weights_after(RobustTraining(threat(eps="0"), variant=variant), batch_norm=batch_norm), plain)
    assert differ(weights_after(RobustTraining(threat(), variant=variant), batch_norm=batch_norm), plain)


def test_cost() -> None:
    hooks, work = cost(RobustTraining(threat()))
    assert hooks == 5
    assert 4.8 < work < 5
    for batch_norm, expected in ((False, 6), (True, 9)):
        _, work = cost(RobustTraining(threat(), variant="penalty"), batch_norm)
        assert expected - 0.4 < work <= expected


@pytest.mark.parametrize("variant", ["penalty", "alternate"])
def test_the_attack_leaves_no_trace(variant: Any) -> None:
    assert_leaves_no_trace(lambda model: RobustTraining(threat(), variant=variant).inner(model, batch()))
