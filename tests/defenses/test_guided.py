"""Guided trainings, `gat` and `nuat`: the step and the loss by formula, turns and weights, limits, cost, state."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import (
    Descent,
    assert_leaves_no_trace,
    assert_loss,
    assert_same,
    batch,
    cost,
    differ,
    net,
    plain_weights,
    threat,
    weights_after,
)

from bench.core.defense import Batch
from defenses._guided import GuidedTraining
from defenses.gat import GAT
from defenses.nuat import NuAT
from defenses.standard import Standard

KINDS: list[type[GuidedTraining]] = [GAT, NuAT]
EPS = 0.05


def _mean_distance(kind: type[GuidedTraining], clean: Tensor, moved: Tensor) -> Tensor:
    if kind is GAT:
        return ((clean.exp() / clean.exp().sum(1, keepdim=True) - moved.softmax(1)) ** 2).sum(1).mean()
    gram = (moved - clean).T @ (moved - clean)  # its eigenvalues are the squared singular values
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum() / len(clean)


def _weight(kind: type[GuidedTraining], progress: float) -> float:
    return (10 if progress < 0.86 else 40) if kind is GAT else 4.5 * min(progress / 0.9, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("progress", [0.5, 0.95])
def test_images_and_loss_equal_the_formula(kind: type[GuidedTraining], batch_norm: bool, progress: float) -> None:
    defense, model, reference = kind(threat()), net(batch_norm), net(batch_norm)
    data, weight = batch(progress=progress), _weight(kind, progress)
    x, y = data.x, data.y
    images = []
    for turn in range(3):
        torch.manual_seed(turn)
        images.append(defense.inner(model, data))
        torch.manual_seed(turn)
        up = torch.empty_like(x).bernoulli_(0.5) == 1
        start = torch.where(up, x + 0.5 * EPS, x - 0.5 * EPS).clamp(0, 1).requires_grad_()
        reference.eval()
        gain = F.cross_entropy(reference(start), y)
        if turn == 1:
            gain = gain + weight * _mean_distance(kind, reference(x).detach(), reference(start))
        (g,) = torch.autograd.grad(gain, start)
        expected = (start.detach() + EPS * g.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
        torch.testing.assert_close(images[-1], expected, rtol=0, atol=1e-12)
        defense.threat.check(x, images[-1])
    reference.train()
    moved, clean = reference(images[1]), reference(x)
    wanted = -clean.log_softmax(1)[torch.arange(10), y].mean() + weight * _mean_distance(kind, clean, moved)
    assert_loss(defense.loss(model, data, images[1]), wanted, model, reference)
    for name, value in reference.state_dict().items():  # the statistics move in the two passes of the loss alone
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distance_guides_the_attack_where_it_has_weight(kind: type[GuidedTraining]) -> None:
    data, found = batch(progress=0.95), []
    for lam in (0.0, 1e3):
        torch.manual_seed(3)
        found.append(kind(threat(), lam=lam, alternate=False).inner(net(), data))  # type: ignore[call-arg]
    assert not torch.equal(*found)
    torch.manual_seed(3)
    assert torch.equal(kind(threat()).inner(net(), data), found[0])  # the first attack maximizes cross-entropy alone


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_distance_by_differences(kind: type[GuidedTraining]) -> None:
    defense, model, data = kind(threat()), net(), batch(6, progress=0.95)
    adv = defense.inner(model, data)
    weight = model.second.weight
    (grad,) = torch.autograd.grad(defense.loss(model, data, adv)["distance"], weight)
    torch.manual_seed(4)
    direction, base, ends = torch.randn_like(weight), weight.detach().clone(), []
    for sign in (1, -1):
        weight.data = base + sign * 1e-6 * direction
        ends.append(float(defense.loss(model, data, adv)["distance"].detach()))
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float((grad * direction).sum()), rel=1e-6)


def test_weights_follow_the_papers() -> None:
    """As the released code sets them at the start of an epoch of 100 (gat) and, of 90 that raise it, after each."""
    gat, nuat = GAT(threat()), NuAT(threat())
    assert [gat.weight(epoch / 100) for epoch in (0, 50, 85, 86, 99)] == [10, 10, 10, 40, 40]
    assert [nuat.weight(epoch / 100) for epoch in (0, 45, 90, 99)] == pytest.approx([0, 2.25, 4.5, 4.5])
    mnist = GAT(threat(), **GAT.presets["mnist"])
    assert [mnist.weight(epoch / 50) for epoch in (0, 25, 26, 49)] == [15, 15, 45, 45]
    assert NuAT(threat(), ramp=0.0).weight(0.0) == 4.5
    assert GAT(threat(), late_from=1.0).weight(0.999) == 10


def test_the_nuclear_norm_of_one_image_is_the_length_of_its_row_and_of_equal_rows_grows_as_their_root() -> None:
    defense, row = NuAT(threat()), torch.tensor([[3.0, 0.0, -4.0]])
    assert float(defense.distance(torch.zeros(1, 3), row)) == pytest.approx(5)
    assert float(defense.distance(torch.zeros(9, 3), row.expand(9, 3))) == pytest.approx(15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_no_weight_and_no_budget_are_plain_training(kind: type[GuidedTraining], batch_norm: bool) -> None:
    plain = plain_weights(batch_norm)
    assert_same(weights_after(kind(threat(), lam=0.0), batch_norm=batch_norm), plain)  # type: ignore[call-arg]
    assert_same(weights_after(kind(threat(eps="0")), batch_norm=batch_norm), plain, 1e-7)
    assert differ(weights_after(kind(threat()), batch_norm=batch_norm), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_cost(kind: type[GuidedTraining]) -> None:
    hooks, work = cost(kind(threat()))
    assert hooks == 8
    assert 7.6 < work < 8
    assert cost(kind(threat(), alternate=False))[0] == 9


@pytest.mark.parametrize("kind", KINDS)
def test_turns_survive_a_kill(kind: type[GuidedTraining]) -> None:
    data, defense, model = batch(), kind(threat()), net()
    defense.inner(model, data)
    fresh = kind(threat())
    fresh.load_state_dict(defense.state_dict())
    found = []
    for one in (defense, fresh, kind(threat())):
        torch.manual_seed(5)
        found.append(one.state_dict()["attacks"])
        one.step(net(), Descent(net()), data)
    assert [int(count) for count in found] == [1, 1, 0]
    assert int(fresh.state_dict()["attacks"]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_attack_leaves_no_trace(kind: type[GuidedTraining]) -> None:
    for mode in ("eval", "train_frozen_stats"):

        def run(model: Any, mode: Any = mode) -> None:
            kind(threat(), alternate=False, attack_bn_mode=mode).inner(model, batch())

        assert_leaves_no_trace(run)


@pytest.mark.parametrize("kind", KINDS)
def test_soft_labels_are_for_the_weights_alone(kind: type[GuidedTraining]) -> None:
    plain, data = kind(threat()), batch()
    soft: Batch = dataclasses.replace(data, smoothing=0.3)
    images = []
    for given in (data, soft):
        torch.manual_seed(1)
        images.append(kind(threat()).inner(net(), given))
    assert torch.equal(*images)
    found = plain.loss(net(), soft, data.x)["ce"]
    torch.testing.assert_close(found, Standard(threat()).loss(net(), soft, data.x)["ce"])
