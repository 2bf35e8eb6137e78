"""GradAlign against a loop over images, its gradient by differences, and its limits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import (
    Net,
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
from bench.training.optimizer import autocast_forward
from defenses.fast_at import FastAT
from defenses.gradalign import GradAlign, mean_cosine

EPS = 0.05


def _gradient(model: nn.Module, x: Tensor, data: Batch, learns: bool = False) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), data.y), x, create_graph=learns)[0]


def _reference(model: Net, data: Batch, lam: float) -> tuple[Tensor, Tensor]:
    """Images and loss by the formula, with batch statistics and the draws of the defense."""
    here = _gradient(model, data.x, data)
    images = (data.x + EPS * here.sign()).clamp(0, 1)
    ce = -model(images).log_softmax(1)[torch.arange(len(data.y)), data.y].mean()
    there = _gradient(model, data.x + torch.empty_like(data.x).uniform_(-EPS, EPS), data, learns=True)
    pairs = zip(here, there, strict=True)
    cosines = [(a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt()) for a, b in pairs]
    return images, ce + lam * (1 - torch.stack(cosines).mean())


@pytest.mark.parametrize("batch_norm", [False, True])
def test_images_and_loss_equal_the_formula(batch_norm: bool) -> None:
    defense, model, reference, data = GradAlign(threat(), lam=0.7), net(batch_norm), net(batch_norm), batch()
    torch.manual_seed(6)
    images, grad = defense.inner(model, data)
    terms = defense.loss(model, data, (images, grad))
    torch.manual_seed(6)
    expected, wanted = _reference(reference, data, 0.7)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-12)
    assert not images.requires_grad
    defense.threat.check(data.x, images)
    assert_loss(terms, wanted, model, reference)
    for name, value in reference.state_dict().items():  # three passes of training
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12)


def test_the_gradient_of_the_penalty_by_differences() -> None:
    """The gradient at the image is a constant: the differences hold it still."""
    defense, model, data = GradAlign(threat(), lam=1.0), net(), batch(4)
    adv = defense.inner(model, data)

    def value() -> Tensor:
        torch.manual_seed(7)
        return defense.loss(model, data, adv)["align"]

    weight = model.second.weight
    (grad,) = torch.autograd.grad(value(), weight)
    torch.manual_seed(4)
    direction, base, ends = torch.randn_like(weight), weight.detach().clone(), []
    for sign in (1, -1):
        weight.data = base + sign * 1e-6 * direction
        ends.append(float(value().detach()))
    found = (ends[0] - ends[1]) / 2e-6
    assert abs(found) > 1e-4
    assert found == pytest.approx(float((grad * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_limits(batch_norm: bool) -> None:
    fgsm = weights_after(FastAT(threat(), variant="n_fgsm", noise=0.0, guard=False), batch_norm=batch_norm)
    assert_same(weights_after(GradAlign(threat(), lam=0.0), batch_norm=batch_norm), fgsm)
    assert differ(weights_after(GradAlign(threat()), batch_norm=batch_norm), fgsm)
    assert_same(weights_after(GradAlign(threat(eps="0")), batch_norm=batch_norm), plain_weights(batch_norm), 1e-8)


def test_a_linear_classifier_of_two_classes_has_nothing_to_align() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double()
    x = torch.rand(10, 1, 6, 6, dtype=torch.float64)
    data = Batch(x, torch.arange(10) % 2, torch.arange(10), 0, 0.0)
    defense = GradAlign(threat(eps="0.4"))
    terms = defense.loss(model, data, defense.inner(model, data))
    assert float(terms["align"].detach()) == pytest.approx(0, abs=1e-12)


def test_images_without_a_gradient_are_left_out_and_small_gradients_count() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0], [3e-30, 4e-30], [1.0, 1.0]], requires_grad=True)
    b = torch.tensor([[1.0, 1.0], [1.0, 0.0], [4e-30, 3e-30], [0.0, 0.0]], requires_grad=True)
    found = mean_cosine(a, b)
    assert float(found.detach()) == pytest.approx((0.5**0.5 + 0.96) / 2)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(found, (a, b)))
    nothing = mean_cosine(a[1:2], b[1:2])
    assert float(nothing.detach()) == 1
    assert torch.autograd.grad(nothing, b)[0].abs().max() == 0


def test_cost() -> None:
    """By work alone: hooks do not see the derivative of a gradient."""
    assert 10.2 < cost(GradAlign(threat()))[1] < 11


def test_the_attack_leaves_no_trace() -> None:
    for mode in ("eval", "train_frozen_stats"):
        assert_leaves_no_trace(lambda model, m=mode: GradAlign(threat(), attack_bn_mode=m).inner(model, batch()))


def test_passes_in_bf16_give_nearly_the_same_gradient() -> None:
    data = batch(40)
    data = Batch(data.x.float(), data.y, data.index, 0, 0.0)
    found = []
    for precision in ("fp32", "bf16"):
        model, defense = net().float(), GradAlign(threat(), lam=1.0)
        with autocast_forward(model, precision):
            adv = defense.inner(model, data)
            torch.manual_seed(3)
            align = defense.loss(model, data, adv)["align"]
        grads = torch.autograd.grad(align, list(model.parameters()), allow_unused=True)
        found.append(torch.cat([g.flatten() for g in grads if g is not None]))
    assert F.cosine_similarity(found[0], found[1], dim=0) > 0.95
