"""Standard training, PGD-AT, TRADES and smoothing against plain references written from their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from bench.core.classifier import BatchNormMode
from bench.core.defense import Batch, Defense, Losses
from bench.core.epsilon import Epsilon
from bench.core.pgd import kl
from bench.core.smoothing import Smoothed
from bench.core.threat import Threat
from defenses.pgd_at import PGDAT
from defenses.smoothing import Smoothing
from defenses.standard import Standard
from defenses.trades import TRADES

THREAT = Threat("Linf", Epsilon("8/255"))
NONE = Threat("Linf", Epsilon(0))


def _net(batch_norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm2d(4)] if batch_norm else []
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), *middle, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)
    )
    return net.double().train()


def _batch(count: int = 10) -> Batch:
    torch.manual_seed(1)
    x = torch.rand(count, 1, 6, 6, dtype=torch.float64)
    return Batch(x, torch.arange(count) % 3, torch.arange(count), epoch=1, progress=0.5)


class _Descent:
    """An Updater with plain SGD."""

    def __init__(self, net: nn.Module, lr: float = 0.1) -> None:
        self.optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)

    def descend(self, terms: Losses) -> None:
        self.optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        self.optimizer.step()


def _weights_after(defense: Defense, steps: int = 3, batch_norm: bool = False) -> list[Tensor]:
    net = _net(batch_norm)
    updater = _Descent(net)
    torch.manual_seed(2)
    for _ in range(steps):
        defense.step(net, updater, _batch())
    return [parameter.detach().clone() for parameter in net.parameters()]


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize(
    "defense",
    [
        TRADES(THREAT, beta=0.0),
        TRADES(NONE),
        TRADES(NONE, start="uniform"),
        PGDAT(NONE),
        PGDAT(NONE, attack_bn_mode="eval"),
        Smoothing(NONE, sigma=1e-14),
    ],
)
def test_limits_are_plain_training(defense: Defense, batch_norm: bool) -> None:
    plain = _weights_after(Standard(NONE), batch_norm=batch_norm)
    for found, expected in zip(_weights_after(defense, batch_norm=batch_norm), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_a_budget_changes_training() -> None:
    plain = _weights_after(Standard(NONE))
    for defense in (TRADES(THREAT), PGDAT(THREAT), Smoothing(NONE)):
        assert any((a - b).abs().max() > 1e-6 for a, b in zip(_weights_after(defense), plain, strict=True))


def test_kl_equals_the_hand_value_and_both_branches_have_gradient() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]], dtype=torch.float64)
    q = torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.8, 0.1]], dtype=torch.float64)
    a, b = p.log().requires_grad_(), (q.log() + 3).requires_grad_()  # softmax ignores the shift
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    second = 0.9 * math.log(9) + 0.05 * math.log(0.0625) + 0.05 * math.log(0.5)
    value = kl(a, b)
    assert value.tolist() == pytest.approx([first, second])
    grad_a, grad_b = torch.autograd.grad(value.sum(), (a, b))
    torch.testing.assert_close(grad_b, q - p)
    gap = p.log() - q.log()
    torch.testing.assert_close(grad_a, p * (gap - (p * gap).sum(1, keepdim=True)))
    at_itself = torch.autograd.grad(kl(a, a.detach()).sum() + kl(a.detach(), a).sum(), a)[0]
    torch.testing.assert_close(at_itself, torch.zeros_like(p))
    sharp = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(kl(sharp, torch.zeros(1, 3)).sum(), sharp)[0]).all()


def _reference_kl_ascent(net: nn.Module, x: Tensor, start: Tensor, eps: float, step: float, steps: int) -> Tensor:
    """TRADES' inner problem from its formula, in eval mode, with the library's KL."""
    with torch.no_grad():
        clean = net(x).softmax(1)
    adv = start
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        divergence = F.kl_div(net(adv).log_softmax(1), clean, reduction="sum")
        adv = adv + step * torch.autograd.grad(divergence, adv)[0].sign()
        adv = torch.min(torch.max(adv, x - eps), x + eps).clamp(0, 1)
    return adv.detach()


def test_trades_equals_a_reference_from_the_formula() -> None:
    net, batch, defense = _net(batch_norm=True), _batch(), TRADES(THREAT, beta=6.0, steps=5)
    torch.manual_seed(7)
    adv = defense.inner(net, batch)
    torch.manual_seed(7)
    eps = THREAT.radius
    start = (batch.x + (0.001 * torch.randn_like(batch.x)).clamp(-eps, eps)).clamp(0, 1)
    net.eval()
    expected = _reference_kl_ascent(net, batch.x, start, eps, 0.007 / 0.031 * eps, 5)
    net.train()
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)
    terms = defense.loss(net, batch, adv)
    gradients = torch.autograd.grad(terms["ce"] + terms["kl"], list(net.parameters()))
    clean, moved = net(batch.x), net(adv)
    p, q = clean.softmax(1), moved.softmax(1)
    divergence = (p * (p.log() - q.log())).sum() / len(batch.x)
    total = -clean.log_softmax(1)[torch.arange(10), batch.y].mean() + 6 * divergence
    for found, wanted in zip(gradients, torch.autograd.grad(total, list(net.parameters())), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert float((terms["ce"] + terms["kl"]).detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    # with a detached target (a common error) the gradient is another one
    detached = F.cross_entropy(net(batch.x), batch.y) + 6 * kl(net(batch.x).detach(), net(adv)).mean()
    wrong = torch.autograd.grad(detached, list(net.parameters()))
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(gradients, wrong, strict=True))


def test_trades_in_the_l2_ball_climbs_the_divergence_too() -> None:
    threat, net, batch = Threat("L2", Epsilon("0.5")), _net(), _batch()
    torch.manual_seed(7)
    found = TRADES(threat, steps=4, rel_step_size=0.4).inner(net, batch)
    torch.manual_seed(7)
    with torch.no_grad():
        clean = net(batch.x).softmax(1)
    adv = (batch.x + 0.001 * torch.randn_like(batch.x)).clamp(0, 1)
    for _ in range(4):
        adv = adv.detach().requires_grad_()
        q = net(adv).log_softmax(1)
        (grad,) = torch.autograd.grad((clean * (clean.log() - q)).sum(), adv)
        moved = adv.detach() + 0.2 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - batch.x
        adv = (batch.x + moved * (0.5 / moved.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)).clamp(0, 1)
    torch.testing.assert_close(found, adv.detach(), rtol=0, atol=1e-6)  # the core adds 1e-10 to each length


@pytest.mark.parametrize("kind", [Standard, Smoothing])
def test_standard_and_smoothing_equal_cross_entropy_in_train_mode(kind: type[Standard | Smoothing]) -> None:
    defense, net, reference, batch = kind(NONE), _net(batch_norm=True), _net(batch_norm=True), _batch()
    torch.manual_seed(5)
    adv = defense.inner(net, batch)
    torch.manual_seed(5)
    x = batch.x + (0.25 * torch.randn_like(batch.x) if kind is Smoothing else 0)
    expected = -reference(x).log_softmax(1)[torch.arange(10), batch.y].mean()
    toys.assert_loss(defense.loss(net, batch, adv), expected, net, reference)
    for name, value in reference.state_dict().items():  # one pass has moved the running statistics
        torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=1e-12)


def test_the_loss_moves_running_statistics_once_a_pass() -> None:
    """Clean and adversarial images are batches of their own, in this order, and nothing passes twice."""
    batch = _batch()
    adv = (batch.x + 0.1).clamp(0, 1)
    for defense, passes in ((TRADES(THREAT), (batch.x, adv)), (PGDAT(THREAT), (adv,))):
        net, reference = _net(batch_norm=True), _net(batch_norm=True)
        defense.loss(net, batch, adv)
        for x in passes:
            reference(x)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (Standard, {}, 3),
        (Smoothing, {}, 3),
        (PGDAT, {}, 23),
        (PGDAT, {"steps": 7}, 17),
        (TRADES, {}, 27),
        (TRADES, {"steps": 5}, 17),
    ],
)
def test_cost(kind: Any, settings: dict[str, int], expected: int) -> None:
    units, work = toys.cost(kind(THREAT, **settings))
    assert units == expected
    assert expected - 0.5 < work < expected  # the first layer needs no input gradient


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("mode", ["eval", "train", "train_frozen_stats"])
def test_pgd_at_equals_a_reference_from_the_formula(norm: str, mode: BatchNormMode) -> None:
    threat = Threat(norm, Epsilon("0.1"))  # type: ignore[arg-type]
    net, reference, batch = _net(batch_norm=True), _net(batch_norm=True), _batch()
    defense = PGDAT(threat, steps=4, rel_step_size=0.3, attack_bn_mode=mode)
    torch.manual_seed(3)
    adv = defense.inner(net, batch)
    torch.manual_seed(3)
    delta = threat.sample(batch.x)
    expected = (batch.x + delta).clamp(0, 1)
    reference.train(mode != "eval")
    for _ in range(4):
        expected.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(reference(expected), batch.y), expected)
        length = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = expected.detach() + 0.03 * (grad.sign() if norm == "Linf" else grad / length) - batch.x
        size = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = moved.clamp(-0.1, 0.1) if norm == "Linf" else moved * (0.1 / size).clamp(max=1)
        expected = (batch.x + moved).clamp(0, 1)
    torch.testing.assert_close(adv, expected.detach(), rtol=0, atol=1e-8)
    reference.train()
    loss = defense.loss(net, batch, adv)["ce"]
    wanted = -reference(adv).log_softmax(1)[torch.arange(10), batch.y].mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    for found, exact in zip(grads, torch.autograd.grad(wanted, list(reference.parameters())), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", [PGDAT, TRADES])
@pytest.mark.parametrize(("mode", "moves"), [("eval", False), ("train", True), ("train_frozen_stats", False)])
def test_the_attack_leaves_statistics_and_gradients_as_its_mode_says(
    kind: type[PGDAT | TRADES], mode: BatchNormMode, moves: bool
) -> None:
    net, batch = _net(batch_norm=True), _batch()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    adv = kind(THREAT, attack_bn_mode=mode).inner(net, batch)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == ({"1.running_mean", "1.running_var", "1.num_batches_tracked"} if moves else set())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert net.training
    assert not adv.requires_grad
    assert float((adv - batch.x).abs().max()) <= THREAT.radius + 1e-12
    assert 0 <= float(adv.min()) <= float(adv.max()) <= 1


def test_adversarial_images_raise_the_loss() -> None:
    net, batch = _net(), _batch()
    clean = F.cross_entropy(net(batch.x), batch.y)
    for defense in (PGDAT(THREAT), TRADES(THREAT)):
        assert F.cross_entropy(net(defense.inner(net, batch)), batch.y) > clean + 1e-3


def test_smoothing_noise_is_fresh_unclipped_and_deployed() -> None:
    defense, net, batch = Smoothing(NONE, sigma=0.5, n_vote=7, alpha=0.01), _net(), _batch(200)
    one, other = defense.inner(net, batch), defense.inner(net, batch)
    assert not torch.equal(one, other)
    assert one.min() < 0
    assert one.max() > 1
    assert float((one - batch.x).std()) == pytest.approx(0.5, rel=0.03)
    noise = (one - batch.x).flatten(1)
    assert float((noise[1:] - noise[:-1]).abs().amax(1).min()) > 0.1  # each image has a draw of its own
    model = defense.deploy(net)
    assert isinstance(model, Smoothed)
    assert (model.sigma, model.n_vote, model.alpha) == (0.5, 7, 0.01)
    assert model.net is net


def test_weak_inner_attacks_are_refused() -> None:
    with pytest.raises(ValueError, match="less than the budget"):
        PGDAT(THREAT, steps=2)
    with pytest.raises(ValueError, match="gradient of KL is 0"):
        TRADES(THREAT, start="zero")
