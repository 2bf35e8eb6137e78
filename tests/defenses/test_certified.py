"""IBP and CROWN-IBP: the loss from the formulas in float64, its limits and gradient, and what training buys."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import digits, mlp
from torch import Tensor, nn
from toys import Descent, assert_loss, assert_same, batch, cost, differ, net, plain_weights, threat, weights_after

from attacks.interval import Interval
from bench.core.attack import Context
from bench.core.defense import Batch
from bench.models.common import Inputs
from bench.plugins import build_model
from defenses._certified import CertifiedTraining
from defenses.crown_ibp import CrownIBP
from defenses.ibp import IBP

USUAL: dict[str, Any] = {"initial": "usual"}
KINDS: tuple[type[CertifiedTraining], ...] = (IBP, CrownIBP)


class Dense(nn.Module):
    """One hidden layer with ReLU on images 1 x 2 x 2, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x.flatten(1)).relu())


def _dense() -> Dense:
    torch.manual_seed(0)
    return Dense().double().train()


def _images(progress: float) -> Batch:
    torch.manual_seed(1)
    x = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    return Batch(x, torch.arange(5) % 3, torch.arange(5), 1, progress)


def _hidden_box(model: Dense, image: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The box of one image and that of its pre-activations."""
    low, high = (image.flatten() - eps).clamp(0, 1), (image.flatten() + eps).clamp(0, 1)
    up, down = model.first.weight.clamp_min(0), model.first.weight.clamp_max(0)
    return low, high, up @ low + down @ high + model.first.bias, up @ high + down @ low + model.first.bias


def _margin(model: Dense, image: Tensor, eps: float, y: int, j: int, method: str) -> Tensor:
    low, high, bottom, top = _hidden_box(model, image, eps)
    row, constant = model.head.weight[y] - model.head.weight[j], model.head.bias[y] - model.head.bias[j]
    if method == "interval":
        return (row.clamp_min(0) * bottom.relu() + row.clamp_max(0) * top.relu()).sum() + constant
    is_open = (bottom < 0) & (top > 0)
    above = torch.where(is_open, top / torch.where(is_open, top - bottom, 1.0), (bottom >= 0).double())
    below = torch.where(is_open, (top > -bottom).double(), above)
    slope = torch.where(row < 0, above, below)
    offset = torch.where(is_open & (row < 0), -above * bottom, 0.0)
    carried = (row * slope) @ model.first.weight
    constant = constant + (row * (slope * model.first.bias + offset)).sum()
    return (carried.clamp_min(0) * low + carried.clamp_max(0) * high).sum() + constant


def _reference(model: Dense, data: Batch, kind: type[CertifiedTraining], eps: float, ramp: float) -> Tensor:
    """kappa CE + (1 - kappa) log(1 + sum of exp(-m_j)), image by image."""
    share = min(data.progress / ramp, 1.0)
    kappa, losses = 1 - share / 2, []
    for image, y in zip(data.x, data.y.tolist(), strict=True):
        bounds = []
        for j in {0, 1, 2} - {y}:
            interval, crown = (_margin(model, image, share * eps, y, j, m) for m in ("interval", "crown"))
            bounds.append(interval if kind is IBP else (1 - share) * crown + share * interval)
        worst = torch.log1p(torch.stack([(-bound).exp() for bound in bounds]).sum())
        losses.append(kappa * -model(image[None]).log_softmax(1)[0, y] + (1 - kappa) * worst)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("progress", [0.0, 0.2, 0.5, 0.9])
def test_loss_equals_the_formula(kind: type[CertifiedTraining], progress: float) -> None:
    model, data = _dense(), _images(progress)
    expected = _reference(model, data, kind, 0.2, ramp=0.5)
    assert_loss(kind(threat(eps="0.2"), ramp=0.5).loss(model, data, data.x), expected, model)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_by_finite_differences(kind: type[CertifiedTraining]) -> None:
    model, data, defense = _dense(), _images(0.3), kind(threat(eps="0.2"))

    def value() -> Tensor:
        return torch.stack(list(defense.loss(model, data, data.x).values())).sum()

    weight = model.first.weight
    (grad,) = torch.autograd.grad(value(), weight)
    torch.manual_seed(4)
    direction, base, ends = torch.randn_like(weight), weight.detach().clone(), []
    for sign in (1, -1):
        weight.data = base + sign * 1e-6 * direction
        ends.append(float(value().detach()))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float((grad * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_without_a_budget_or_at_the_start_it_is_standard_training(
    kind: type[CertifiedTraining], batch_norm: bool
) -> None:
    """Behind the start BatchNorm's statistics are constants in the bound, so that eps 0 has another gradient there."""
    plain = plain_weights(batch_norm)
    if not batch_norm:
        assert_same(weights_after(kind(threat(eps="0"), **USUAL)), plain)
    assert_same(weights_after(kind(threat(), **USUAL), batch_norm=batch_norm, progress=0.0), plain)
    assert_same(weights_after(kind(threat(), kappa=1.0, **USUAL), batch_norm=batch_norm), plain)
    assert differ(weights_after(kind(threat(), **USUAL), batch_norm=batch_norm), plain)


def test_they_differ_on_the_ramp_and_agree_behind_it() -> None:
    model = _dense()
    for progress, agree in ((0.3, False), (0.9, True)):
        data = _images(progress)
        one, other = (kind(threat(eps="0.2")).loss(model, data, data.x)["bound"] for kind in KINDS)
        assert (abs(float((one - other).detach())) < 1e-12) == agree


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_move_once_a_step(kind: type[CertifiedTraining]) -> None:
    model, other, data = net(batch_norm=True), net(batch_norm=True), batch()
    kind(threat()).loss(model, data, data.x)
    other(data.x)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_small_weights_keep_the_box_of_a_layer() -> None:
    """N(0, 2 pi / n^2): the expected radius behind a layer and its ReLU is the radius before it."""
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4000, 500), nn.ReLU())
    layer = IBP(threat()).wrap(plain)[1]
    assert float(layer.weight.detach().std()) == pytest.approx(math.sqrt(2 * math.pi) / 4000, rel=0.02)
    assert float(layer.weight.detach().abs().sum(1).mean()) == pytest.approx(
        2, rel=0.02
    )  # and half of the units are closed
    before = copy.deepcopy(plain.state_dict())
    usual = IBP(threat(), **USUAL).wrap(plain)
    assert all(torch.equal(value, before[name]) for name, value in usual.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_training_makes_bounds_tight(kind: type[CertifiedTraining]) -> None:
    """On digits at eps .03 the certified accuracy of a trained net is high; of the same net without the bound, low."""
    train_x, train_y, x, y = digits()
    proved = {}
    for kappa in (0.5, 1.0):
        defense = kind(threat(eps="0.03"), kappa=kappa)
        torch.manual_seed(0)
        model = defense.wrap(mlp(32, 2)).train()
        updater = Descent(model)
        updater.optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for step in range(150):
            part = slice(step % 5 * 287, step % 5 * 287 + 287)
            index = torch.arange(287)
            defense.step(model, updater, Batch(train_x[part], train_y[part], index, step // 5, step / 150))
        evaluation = Interval(threat(eps="0.03"))
        proved[kappa] = evaluation.evaluate(defense.deploy(model.eval()), x, y, Context(0)).columns["correct"]
    assert float(proved[0.5].double().mean()) > 0.6 > 0.3 > float(proved[1.0].double().mean())


def test_a_net_without_bounds_is_refused() -> None:
    inputs = Inputs(3, 32, 10, (0.5,) * 3, (0.25,) * 3)
    model = build_model("vit_tiny", {"depth": 1, "dim": 24, "patch": 8}, inputs)
    with pytest.raises(ValueError, match="no interval bounds for"):
        IBP(threat()).check(model.eval(), torch.zeros(1, 3, 32, 32), 10)


def test_cost() -> None:
    _, work = cost(IBP(threat()))
    assert 0.8 * 9 < work <= 9


def test_label_smoothing_is_of_both_terms() -> None:
    model, data = _dense(), _images(0.9)
    smooth = Batch(data.x, data.y, data.index, 1, 0.9, smoothing=0.3)
    terms, plain = (IBP(threat(eps="0")).loss(model, each, each.x) for each in (smooth, data))
    expected = F.cross_entropy(model(data.x), data.y, label_smoothing=0.3)
    torch.testing.assert_close(2 * terms["bound"], expected)
    assert (terms["clean"] != plain["clean"]).all()
