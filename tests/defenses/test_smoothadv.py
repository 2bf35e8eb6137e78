"""Adversarial training under shared noise: both inner attacks as loops over images, and the loss over all draws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from pydantic import TypeAdapter
from torch import Tensor, nn

from bench.core.smoothing import Smoothed
from bench.core.threat import Threat
from defenses.smoothadv import Attacked, SmoothAdv
from defenses.smoothing import Smoothing

THREAT = toys.threat("L2", "0.5")


def probability(net: nn.Module, x: Tensor, noise: Tensor) -> Tensor:
    """Mean softmax (k) of one image over its draws."""
    return torch.stack([net((x + n)[None])[0].softmax(0) for n in noise]).mean(0)


def pgd(net: nn.Module, x: Tensor, y: int, noise: Tensor, eps: float, steps: int) -> Tensor:
    """The released order for one image: unit gradient, clip to [0,1], then the ball."""
    delta = torch.zeros_like(x)
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        (grad,) = torch.autograd.grad(-probability(net, x + delta, noise)[y].log(), delta)
        delta = (x + delta.detach() + 2 * eps / steps * grad / grad.norm()).clamp(0, 1) - x
        delta = delta * min(1.0, eps / float(delta.norm()))
    return x + delta


def ddn(net: nn.Module, x: Tensor, y: int, noise: Tensor, eps: float, steps: int, init: float, gamma: float) -> Tensor:
    """Decoupled direction and norm for one image."""
    delta, best, norm = torch.zeros_like(x), torch.zeros_like(x), init
    farthest = float(torch.maximum(x, 1 - x).norm())
    smallest = farthest
    for step in range(steps):
        delta = delta.detach().requires_grad_()
        p = probability(net, x + delta, noise)
        (grad,) = torch.autograd.grad(-p[y].log(), delta)
        delta = delta.detach()
        wrong = int(p.argmax()) != y
        if wrong and float(delta.norm()) < smallest:
            best, smallest = delta, float(delta.norm())
        norm = min(norm * (1 - gamma if wrong else 1 + gamma), farthest)
        delta = delta + (0.01 + 0.99 * (1 + math.cos(math.pi * (step + 1) / steps)) / 2) * grad / grad.norm()
        delta = (x + delta * norm / delta.norm()).clamp(0, 1) - x
    return x + best * min(1.0, eps / max(float(best.norm()), 1e-12))


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("attack", ["pgd", "ddn"])
def test_inner_and_loss_equal_a_reference_from_the_formula(attack: Any, draws: int) -> None:
    settings: dict[str, Any] = {"steps": 6, "gamma": 0.2, "init_norm": 0.8}
    defense, net, data = SmoothAdv(THREAT, draws=draws, attack=attack, **settings), toys.net(True), toys.batch(12)
    torch.manual_seed(2)
    adv = defense.inner(net, data)
    torch.manual_seed(2)
    noise = 0.25 * torch.randn(draws, *data.x.shape, dtype=torch.float64)
    assert torch.equal(adv.noise, noise)
    net.eval()
    rows = []
    for place, (x, y) in enumerate(zip(data.x, data.y.tolist(), strict=True)):
        own = noise[:, place]
        rows.append(pgd(net, x, y, own, 0.5, 6) if attack == "pgd" else ddn(net, x, y, own, 0.5, 6, 0.8, 0.2))
    expected = torch.stack(rows).detach()
    torch.testing.assert_close(adv.x_adv, expected, rtol=0, atol=1e-9)
    if attack == "ddn":  # some images are wrong at once, some never, some on the way
        sizes = (expected - data.x).flatten(1).norm(dim=1)
        assert bool((sizes == 0).any())
        assert bool((sizes > 0).any())
    net.train()
    parts = [F.cross_entropy(net(torch.cat([adv.x_adv + n for n in noise])), data.y.repeat(draws))]
    toys.assert_loss(defense.loss(net, data, adv), torch.stack(parts).mean(), net)


def test_the_attack_climbs_the_log_of_the_mean_and_not_the_mean_of_logs() -> None:
    """With one draw both agree; with several, the sure draws weigh differently."""
    data, net = toys.batch(), toys.net()
    for draws, same in ((1, True), (4, False)):
        torch.manual_seed(2)
        adv = SmoothAdv(THREAT, draws=draws, sigma=1.0, steps=1).inner(net, data)
        x = data.x.clone().requires_grad_()
        losses = sum(F.cross_entropy(net(x + n), data.y, reduction="sum") for n in adv.noise)
        (grad,) = torch.autograd.grad(torch.as_tensor(losses), x)
        wrong = THREAT.project((data.x + 2 * 0.5 * toys.dual_step("L2", grad)).clamp(0, 1) - data.x) + data.x
        assert torch.allclose(adv.x_adv, wrong, atol=1e-8) == same


@pytest.mark.parametrize("attack", ["pgd", "ddn"])
def test_the_attack_is_feasible_and_leaves_no_trace(attack: Any) -> None:
    defense, data = SmoothAdv(THREAT, attack=attack, steps=4), toys.batch(low=-0.3, high=1.3)
    data = toys.Batch(data.x.clamp(0, 1), data.y, data.index, 1, 0.5)
    toys.assert_leaves_no_trace(lambda model: defense.inner(model, data))
    adv = defense.inner(toys.net(), data)
    THREAT.check(data.x, adv.x_adv)
    assert not adv.x_adv.requires_grad


def test_a_gradient_of_0_gives_a_random_direction() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :4]

    data = toys.batch()
    for attack in ("pgd", "ddn"):
        x_adv = SmoothAdv(THREAT, attack=attack).inner(Flat(), data).x_adv  # type: ignore[arg-type]
        assert bool(torch.isfinite(x_adv).all())
        if attack == "pgd":
            assert float((x_adv - data.x).flatten(1).norm(dim=1).min()) > 0.1


def test_without_a_budget_it_is_gaussian_augmentation() -> None:
    """One draw and eps = 0: the loss of smoothing at the same noise."""
    none = Threat("L2", toys.NONE.eps)
    data, net = toys.batch(), toys.net(batch_norm=True)
    torch.manual_seed(4)
    defense = SmoothAdv(none, draws=1)
    adv = defense.inner(net, data)
    assert torch.equal(adv.x_adv, data.x)
    plain = Smoothing(none)
    expected = plain.loss(net, data, data.x + adv.noise[0])["ce"]
    toys.assert_loss(defense.loss(net, data, adv), expected, net)


def test_it_deploys_the_vote_with_the_noise_of_training() -> None:
    model = SmoothAdv(THREAT, sigma=0.5, n_vote=30, alpha=0.01).deploy(toys.net())
    assert isinstance(model, Smoothed)
    assert (model.sigma, model.n_vote, model.alpha) == (0.5, 30, 0.01)


def test_draws_are_shared_by_attack_and_loss() -> None:
    data, net = toys.batch(), toys.net()
    adv = SmoothAdv(THREAT, draws=2).inner(net, data)
    assert isinstance(adv, Attacked)
    torch.manual_seed(1)
    one = SmoothAdv(THREAT, draws=2).loss(net, data, adv)["ce"]
    torch.manual_seed(9)
    assert torch.equal(one, SmoothAdv(THREAT, draws=2).loss(net, data, adv)["ce"])


def test_costs() -> None:
    for attack in ("pgd", "ddn"):
        for steps, draws in ((2, 2), (4, 1)):
            units, work = toys.cost(SmoothAdv(THREAT, attack=attack, steps=steps, draws=draws))  # type: ignore[arg-type]
            assert units == (2 * steps + 3) * draws
            assert work <= units + 0.1


def test_what_the_deployed_vote_would_refuse_is_refused_before_training() -> None:
    for kind in (SmoothAdv, Smoothing):
        for alpha in (0, 1):
            with pytest.raises(ValueError, match="alpha"):
                TypeAdapter(kind).validate_python({"threat": THREAT, "alpha": alpha})


def test_another_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="L2 ball"):
        SmoothAdv(toys.threat("Linf"))
