"""The strong adversary against a loop over images and classes, on a linear model, and by its cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
from defenses.lsa import LSA

NORMS: list[Norm] = ["Linf", "L2", "L1"]


def _push(scores: nn.Module, at: Tensor, y: Tensor, norm: Norm, linearise: str) -> Tensor:
    """Image by image and class by class: the perturbation of norm 1."""
    rows = []
    for row, label in zip(at, y.tolist(), strict=True):
        row = row.detach().clone().requires_grad_()
        z = scores(row[None])[0]
        if linearise == "loss":
            (g,) = torch.autograd.grad(-z.log_softmax(0)[label], row)
            rows.append(dual_step(norm, g[None])[0])
            continue
        best: tuple[float, Tensor] | None = None
        for j in range(len(z)):
            if j == label:
                continue
            (g,) = torch.autograd.grad(z[j] - z[label], row, retain_graph=True)
            dual = g.abs().sum() if norm == "Linf" else g.norm() if norm == "L2" else g.abs().max()
            distance = ((z[label] - z[j]) / dual).item()
            if best is None or distance < best[0]:
                best = (distance, dual_step(norm, g[None])[0])
        assert best is not None
        rows.append(best[1])
    return torch.stack(rows)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("linearise", ["scores", "loss"])
def test_input_adversary_equals_a_loop(norm: Norm, linearise: Any) -> None:
    defense, model, data = LSA(threat(norm), linearise=linearise), net(batch_norm=True), batch(30)
    adv = defense.inner(model, data)
    push = _push(model.eval(), data.x, data.y, norm, linearise)
    torch.testing.assert_close(adv, (data.x + 0.05 * push).clamp(0, 1), rtol=0, atol=1e-8)
    model.train()
    expected = -model(adv).log_softmax(1)[torch.arange(30), data.y].mean()
    assert_loss(defense.loss(model, data, adv), expected, model)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("linearise", ["scores", "loss"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_head_adversary_equals_a_loop(norm: Norm, linearise: Any, batch_norm: bool) -> None:
    defense = LSA(threat(norm), linearise=linearise, layer="head", head_eps=0.7)
    model, reference, data = net(batch_norm), net(batch_norm), batch()
    assert defense.inner(model, data) is data.x
    h = reference.body(data.x)
    push = _push(reference.head, h, data.y, norm, linearise)
    expected = -reference.head(h + 0.7 * push).log_softmax(1)[torch.arange(10), data.y].mean()
    terms = defense.loss(model, data, data.x)
    assert_loss(terms, expected, model, reference)
    assert len(model.head._forward_pre_hooks) == 0


@pytest.mark.parametrize("norm", NORMS)
def test_scores_cross_the_nearest_boundary_of_a_linear_model(norm: Norm) -> None:
    """In a linear model the distance is exact: 1.01 of it flips the label, 0.99 does not."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4)).double()
    x = 0.4 + 0.2 * torch.rand(20, 1, 6, 6, dtype=torch.float64)
    y, weight, z = model(x).argmax(1), model[1].weight.detach(), model(x).detach()
    for i in range(20):
        label = int(y[i])
        gaps = weight[label] - weight
        sizes = gaps.abs().sum(1) if norm == "Linf" else gaps.norm(dim=1) if norm == "L2" else gaps.abs().amax(1)
        distance = min(float((z[i, label] - z[i, j]) / sizes[j]) for j in range(4) if j != label)
        for factor, flips in ((1.01, True), (0.99, False)):
            defense = LSA(threat(norm, str(distance * factor)))
            moved = x[i : i + 1] + defense.threat.radius * defense._push(model, x[i : i + 1], y[i : i + 1])
            assert (int(model(moved).argmax(1)) != label) == flips


def test_scores_beat_the_loss_at_flipping_labels() -> None:
    model, data = net(), batch(200, low=0.3, high=0.7)
    y = model(data.x).argmax(1)
    flips = []
    for linearise in ("scores", "loss"):
        push = LSA(threat("L2"), linearise=linearise)._push(model, data.x, y)  # type: ignore[arg-type]
        flips.append(int((model(data.x + 0.25 * push).argmax(1) != y).sum()))
    assert flips[0] >= flips[1] > 0


@pytest.mark.parametrize("settings", [{}, {"linearise": "loss"}, {"layer": "head", "head_eps": 0.0}])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_no_budget_is_plain_training(settings: dict[str, Any], batch_norm: bool) -> None:
    plain = plain_weights(batch_norm)
    assert_same(weights_after(LSA(threat(eps="0"), **settings), batch_norm=batch_norm), plain)
    assert differ(weights_after(LSA(threat(), **{**settings, "head_eps": 0.1}), batch_norm=batch_norm), plain)


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 4 + 3), ({"linearise": "loss"}, 5), ({"layer": "head", "head_eps": 0.1}, 3)]
)
def test_cost(settings: dict[str, Any], expected: int) -> None:
    """K = 4 classes; a step against a pair of scores is one product, so K - 1 of them."""
    hooks, work = cost(LSA(threat(), **settings))
    assert hooks == expected
    head = 0.5 if settings.get("layer") else 0.0  # products with the head alone
    assert expected - 0.2 < work < expected + head


@pytest.mark.parametrize("settings", [{}, {"linearise": "loss"}, {"layer": "head"}])
def test_the_attack_leaves_no_trace(settings: dict[str, Any]) -> None:
    assert_leaves_no_trace(lambda model: LSA(threat(), **settings).inner(model, batch()))


def test_equal_scores_stay_finite() -> None:
    model, data = net(), batch()
    nn.init.zeros_(model.head.weight)
    for norm in NORMS:
        assert torch.isfinite(LSA(threat(norm)).inner(model, data)).all()
    assert F.cross_entropy(model(data.x), data.y) < 2
