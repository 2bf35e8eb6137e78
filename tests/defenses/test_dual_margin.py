"""Dual-margin training against the formula, the exact fall of a linear net by brute force, and its limits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_robust_training import NORMS
from test_robust_training import dual as dual_norm
from torch import Tensor, nn
from toys import Net, assert_loss, assert_same, batch, cost, differ, net, plain_weights, threat, weights_after

from bench.core.defense import Batch
from bench.core.threat import Norm
from defenses.dual_margin import DualMargin
from defenses.input_gradient_penalty import InputGradientPenalty


def _fall(norm: Norm, g: Tensor, u: Tensor, eps: float, box: bool) -> Tensor:
    """Pixel by pixel."""
    if norm != "Linf" or not box:
        return eps * dual_norm(norm, g)
    pairs = zip(g.flatten(), u.flatten(), strict=True)
    return torch.stack([slope.abs() * min(eps, float(at if slope > 0 else 1 - at)) for slope, at in pairs]).sum()


def _reference(model: Net, u: Tensor, y: Tensor, norm: Norm, box: bool, eps: float = 0.05) -> Tensor:
    """Image by image, so that nothing can mix: log(1 + exp(D - s))."""
    total = torch.zeros((), dtype=u.dtype)
    for image, label in zip(u, y, strict=True):
        image = image.clone().requires_grad_()
        z = model(image[None])[0]
        rivals = torch.stack([z[j] for j in range(4) if j != label])
        s = z[label] - rivals.exp().sum().log()
        (g,) = torch.autograd.grad(s, image, create_graph=True)
        total = total + (1 + (_fall(norm, g, image.detach(), eps, box) - s).exp()).log()
    return total / len(u)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", [True, False])
def test_the_loss_equals_the_formula(norm: Norm, box: bool) -> None:
    model, data = net(), batch()
    defense = DualMargin(threat(norm), box=box)
    u = defense.inner(model, data)
    assert_loss(defense.loss(model, data, u), _reference(model, u, data.y, norm, box), model)


def test_smoothed_labels_are_those_of_the_logits_that_are_left() -> None:
    model, data = net(), batch()
    data = Batch(data.x, data.y, data.index, data.epoch, data.progress, smoothing=0.2)
    terms = DualMargin(threat(), box=False).loss(model, data, data.x)
    x = data.x.clone().requires_grad_()
    z = model(x)
    rows = torch.arange(10)
    s = z[rows, data.y] - z.masked_fill(F.one_hot(data.y, 4).bool(), -torch.inf).logsumexp(1)
    (g,) = torch.autograd.grad(s.sum(), x, create_graph=True)
    left = z - 0.05 * g.abs().flatten(1).sum(1)[:, None] * F.one_hot(data.y, 4)
    targets = 0.8 * F.one_hot(data.y, 4).double() + 0.2 / 4
    assert_loss(terms, -(targets * left.log_softmax(1)).sum(1).mean(), model)


@pytest.mark.parametrize("box", [True, False])
def test_the_gradient_holds_batch_statistics_constant(box: bool) -> None:
    """Under training BatchNorm the fall is that of the net normalized by the batch's own statistics."""
    model, reference, data = net(batch_norm=True), net(batch_norm=True), batch()
    terms = DualMargin(threat(), box=box).loss(model, data, data.x)
    z = reference.first(data.x)
    reference.norm.running_mean = z.mean((0, 2, 3)).detach()
    reference.norm.running_var = z.var((0, 2, 3), unbiased=False).detach()
    reference.eval()
    torch.testing.assert_close(terms["ce"], _reference(reference, data.x, data.y, "Linf", box), rtol=1e-10, atol=1e-12)
    assert model.norm.num_batches_tracked == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("box", [True, False])
def test_the_fall_of_a_linear_net_is_the_largest_in_ball_and_box(norm: Norm, box: bool) -> None:
    """By brute force over the corners of the polytope; in L2 over many points of the sphere."""
    torch.manual_seed(0)
    eps, linear = 0.3, nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double()
    u, y = torch.rand(6, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1])
    u[0, 0, 0, 0], u[1, 0, 1, 1] = 0.0, 1.0
    defense = DualMargin(threat(norm, "0.3"), box=box)
    loss = defense.loss(linear, Batch(u, y, y, 0, 0.5), u)["ce"]
    if norm == "Linf":
        corners = eps * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    elif norm == "L1":
        corners = eps * torch.cat([torch.eye(4), -torch.eye(4)]).double()
    else:
        corners = eps * F.normalize(torch.randn(20_000, 4, dtype=torch.float64))
    moved = u[:, None] + corners.view(-1, 1, 2, 2)
    if box and norm == "Linf":
        moved = moved.clamp(0, 1)
    z = linear(moved.flatten(0, 1)).unflatten(0, (6, -1))
    margins = torch.stack([z[i, :, label] - z[i, :, 1 - label] for i, label in enumerate(y)])
    expected = F.softplus(-margins.amin(1)).mean()
    torch.testing.assert_close(loss, expected, rtol=2e-3 if norm == "L2" else 1e-12, atol=0)
    if norm == "L2":
        assert loss >= expected


@pytest.mark.parametrize("norm", NORMS)
def test_it_bounds_the_input_gradient_penalty_from_above(norm: Norm) -> None:
    """The softplus is convex: CE + eps ||grad CE||_* is its tangent at s."""
    model, data = net(), batch()
    for eps in ("0.01", "0.1", "1"):
        ball = threat(norm, eps)
        above = DualMargin(ball, box=False).loss(model, data, data.x)["ce"]
        below = torch.stack(list(InputGradientPenalty(ball).loss(model, data, data.x).values())).sum()
        assert above > below


def test_the_random_point() -> None:
    model, data = net(), batch()
    assert DualMargin(threat(), eta=0).inner(model, data) is data.x
    for norm in NORMS:
        ball = threat(norm)
        torch.manual_seed(3)
        u = DualMargin(ball, eta=2).inner(model, data)
        torch.manual_seed(3)
        torch.testing.assert_close(u, (data.x + 2 * ball.sample(data.x)).clamp(0, 1))
        sizes = ball.norm_of(u - data.x)
        assert sizes.max() <= 0.1 + 1e-12
        assert sizes.max() > 0.05
        assert u.min() >= 0
        assert u.max() <= 1


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("box", [True, False])
def test_no_budget_is_plain_training(batch_norm: bool, box: bool) -> None:
    plain = plain_weights(batch_norm)
    kinds: dict[str, Any] = {"batch_norm": batch_norm}
    assert_same(weights_after(DualMargin(threat(eps="0"), box=box), **kinds), plain)
    assert differ(weights_after(DualMargin(threat(), box=box), **kinds), plain)


def test_an_image_at_the_edge_of_the_box_has_no_room() -> None:
    """Where every pixel stands at the side to which the margin would fall, D is 0."""
    gradient = torch.tensor([1.0, -2.0, 3.0, -4.0]).view(1, 1, 2, 2)
    u = (gradient < 0).float()
    assert DualMargin(threat(eps="0.3")).fall(gradient, u) == 0
    assert DualMargin(threat(eps="0.3"), box=False).fall(gradient, u) == pytest.approx(3)
    assert DualMargin(threat("L2", "0.3")).fall(gradient, u) == pytest.approx(0.3 * 30**0.5)


def test_cost() -> None:
    for batch_norm, expected in ((False, 6), (True, 9)):
        _, work = cost(DualMargin(threat()), batch_norm)
        assert expected - 0.4 < work <= expected
