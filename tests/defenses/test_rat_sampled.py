"""The objective of randomized weights by draws: against plain references, against `rat`'s expansion, its limits."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from bench.core.pgd import kl
from defenses._randomized_trades import noise_like, root_mean_square
from defenses.awp import AWP
from defenses.rat import RAT
from defenses.rat_sampled import RATSampled
from defenses.trades import TRADES

THREAT = toys.threat()
CHEAP: dict[str, Any] = {"steps": 3, "rel_step_size": 0.4}
Branches = Literal["joint", "adversarial"]


def perturbed(data: Any) -> Tensor:
    torch.manual_seed(4)
    return (data.x + 0.3 * torch.rand_like(data.x)).clamp(0, 1)


def layers(model: Any) -> list[nn.Module]:
    return [model.first, model.second, model.head]


@pytest.mark.parametrize("noise_on", ["head", "network"])
@pytest.mark.parametrize("branches", ["joint", "adversarial"])
def test_loss_and_gradients_equal_copies_with_the_same_noise(noise_on: Any, branches: Branches) -> None:
    """The reference adds the draws to the weights of copies and sends their gradients to the means."""
    model, data = toys.net(), toys.batch()
    adv = perturbed(data)
    defense = RATSampled(THREAT, beta=3.0, sigma=0.4, noise="laplace", draws=2, noise_on=noise_on, branches=branches)
    torch.manual_seed(7)
    terms = defense.loss(model, data, adv)
    found = toys.gradients(torch.stack(list(terms.values())).sum(), model)
    torch.manual_seed(7)
    where = layers(model) if noise_on == "network" else [model.head]
    if noise_on == "head":  # one tensor of all draws
        weight = model.head.weight
        drawn = [[n] for n in noise_like(weight.new_empty(2, *weight.shape), "laplace")]
    else:
        drawn = [[noise_like(layer.weight, "laplace") for layer in where] for _ in range(2)]
    expected = [torch.zeros_like(p) for p in model.parameters()]
    clean = model(data.x)
    ce = F.cross_entropy(clean, data.y)
    divergence, total = 0.0, list[Tensor]()
    for noise in drawn:
        noisy = copy.deepcopy(model)
        with torch.no_grad():
            for layer, n in zip(layers(noisy) if noise_on == "network" else [noisy.head], noise, strict=True):
                layer.weight += 0.4 * root_mean_square(layer.weight) * n
        fixed = branches == "adversarial"
        value = 3 * kl(model(data.x) if fixed else noisy(data.x), noisy(adv)).mean() / 2
        divergence += float(value.detach())
        own = torch.autograd.grad(value, list(noisy.parameters()), retain_graph=True)
        total = [*own]
        if fixed:
            others = torch.autograd.grad(value, list(model.parameters()))
            total = [a + b for a, b in zip(own, others, strict=True)]
        expected = [a + b for a, b in zip(expected, total, strict=True)]
    expected = [a + b for a, b in zip(expected, torch.autograd.grad(ce, list(model.parameters())), strict=True)]
    assert float(terms["ce"].detach()) == pytest.approx(float(ce.detach()), rel=1e-12)
    assert float(terms["kl"].detach()) == pytest.approx(divergence, rel=1e-10)
    toys.assert_same(found, expected)


@pytest.mark.parametrize(("branches", "kind"), [("joint", "gaussian"), ("adversarial", "uniform")])
def test_its_mean_is_the_expansion_of_rat(branches: Branches, kind: Any) -> None:
    """At small noise the mean over draws exceeds the zeroth term by the second one, within the draws' own error."""
    model, data = toys.net(), toys.batch()
    adv = perturbed(data)
    with torch.no_grad():
        sampled = RATSampled(THREAT, sigma=0.03, draws=400, branches=branches, noise=kind)
        means = torch.stack([sampled.loss(model, data, adv)["kl"] for _ in range(50)])
        terms = RAT(THREAT, sigma=0.03, w1=0.0, w2=1.0, second_on=branches).loss(model, data, adv)
    error = means.std() / len(means) ** 0.5
    # the first order is far larger and vanishes in the mean alone
    assert float((means.mean() - terms["kl"] - terms["second"]).abs()) < 4 * float(error)
    assert float(error) < 0.5 * float(terms["second"].abs())


@pytest.mark.parametrize("noise_on", ["head", "network"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_without_noise_it_is_trades(noise_on: Any, batch_norm: bool) -> None:
    trades = toys.weights_after(TRADES(THREAT, **CHEAP), batch_norm=batch_norm)
    plain = RATSampled(THREAT, sigma=0.0, draws=3, noise_on=noise_on, **CHEAP)
    toys.assert_same(toys.weights_after(plain, batch_norm=batch_norm), trades)
    model, data = toys.net(batch_norm), toys.batch()
    adv = perturbed(data)
    least = RATSampled(THREAT, sigma=1e-9, draws=3, noise_on=noise_on).loss(model, data, adv)
    for name, value in TRADES(THREAT, beta=6.0).loss(model, data, adv).items():
        torch.testing.assert_close(least[name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("noise_on", ["head", "network"])
def test_the_noise_changes_what_is_trained(noise_on: Any) -> None:
    trades = toys.weights_after(TRADES(THREAT, **CHEAP))
    assert toys.differ(toys.weights_after(RATSampled(THREAT, sigma=0.3, noise_on=noise_on, **CHEAP)), trades)


def test_adversarial_images_are_those_of_rat() -> None:
    data = toys.batch()
    torch.manual_seed(5)
    found = RATSampled(THREAT, sigma=0.3, **CHEAP).inner(toys.net(), data)
    torch.manual_seed(5)
    assert torch.equal(found, RAT(THREAT, sigma=0.3, **CHEAP).inner(toys.net(), data))
    toys.assert_leaves_no_trace(lambda model: RATSampled(THREAT, sigma=0.3, **CHEAP).inner(model, data))


def test_weights_are_the_means_after_a_loss_on_every_layer() -> None:
    model, data = toys.net(), toys.batch()
    before = copy.deepcopy(model.state_dict())
    RATSampled(THREAT, sigma=0.3, draws=2, noise_on="network").loss(model, data, perturbed(data))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_can_be_the_base_of_awp() -> None:
    defense = AWP(THREAT, base={"name": "rat_sampled", "set": {"sigma": 0.3, **CHEAP}}, warmup=0.0)
    model = toys.net()
    terms = defense.step(model, toys.Descent(model), toys.batch())
    assert {*terms} == {"ce", "kl"}
    assert all(bool(value.isfinite()) for value in terms.values())
