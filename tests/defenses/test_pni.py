"""Noise on weights, drawn anew in every pass and mode; its learnable size; adversarial training beside it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from bench.core.classifier import frozen
from bench.core.stochastic import Randomized, noise_off, noise_sites
from defenses.pni import PNI, noise_sizes

THREAT = toys.threat()
CHEAP: dict[str, Any] = {"steps": 3, "rel_step_size": 0.4}
LAYERS = ("first", "second", "head")


def noisy(batch_norm: bool = False, **settings: Any) -> tuple[PNI, nn.Module]:
    defense = PNI(THREAT, **{**CHEAP, **settings})
    return defense, defense.wrap(toys.net(batch_norm))


def draw_by_hand(net: nn.Module, sizes: list[Tensor], x: Tensor) -> Tensor:
    """A pass of the plain net with weights w + a std(w) n, drawn in the order of the layers."""
    weights = {}
    for name, size in zip(LAYERS, sizes, strict=True):
        weight = net.get_parameter(f"{name}.weight")
        mean = weight.detach().sum() / weight.numel()
        std = ((weight.detach() - mean).square().sum() / (weight.numel() - 1)).sqrt()
        weights[f"{name}.weight"] = weight + size * std * torch.randn_like(weight)
    return torch.func.functional_call(net, weights, (x,))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("per", ["layer", "channel", "element"])
def test_loss_and_gradients_equal_a_reference_from_the_formula(per: Any, batch_norm: bool) -> None:
    defense, net = noisy(batch_norm, per=per, clean=0.3)
    plain, data = toys.net(batch_norm), toys.batch()
    adv = (data.x + 0.1).clamp(0, 1)
    shapes = {"layer": [()] * 3, "channel": [(3, 1, 1, 1), (8, 1, 1, 1), (4, 1)]}
    shape = shapes.get(per, [tuple(plain.get_parameter(f"{name}.weight").shape) for name in LAYERS])
    sizes = [torch.full(s, 0.25, dtype=torch.float64, requires_grad=True) for s in shape]
    torch.manual_seed(4)
    terms = defense.loss(net, data, adv)
    torch.manual_seed(4)
    expected = 0.3 * F.cross_entropy(draw_by_hand(plain, sizes, data.x), data.y)
    expected = expected + 0.7 * F.cross_entropy(draw_by_hand(plain, sizes, adv), data.y)
    found = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    own = noise_sizes(net)
    assert [size.shape for size in own] == [size.shape for size in sizes]
    originals = [net.get_submodule(name).parametrizations.weight.original for name in LAYERS]
    wanted = torch.autograd.grad(expected, [plain.get_parameter(f"{n}.weight") for n in LAYERS] + sizes)
    toys.assert_same(list(torch.autograd.grad(found, [*originals, *own])), list(wanted))
    assert all(float(grad.abs().sum()) > 0 for grad in wanted[3:])


def test_noise_is_there_in_every_mode_and_has_its_own_switch() -> None:
    _, net = noisy()
    plain, x = toys.net(), toys.batch().x
    for mode in (True, False):
        net.train(mode)
        assert not torch.equal(net(x), net(x))
        with noise_off(net):
            assert torch.equal(net(x), plain(x))
    with frozen(net) as target:
        assert not torch.equal(target(x), target(x))
    assert all(site.source.enabled for site in noise_sites(net))


def test_sites_are_exposed_with_their_size() -> None:
    defense, net = noisy(initial=0.5)
    sites = noise_sites(net)
    assert [(site.layer, site.kind) for site in sites] == [(net.get_submodule(n), "weight") for n in LAYERS]
    for site, name in zip(sites, LAYERS, strict=True):
        weight = toys.net().get_parameter(f"{name}.weight").detach()
        assert torch.equal(site.weight, weight)
        torch.testing.assert_close(site.source.std(site.weight).detach(), 0.5 * weight.std())
    draws = torch.stack([net.head.weight.detach() for _ in range(2000)])  # each look at the weight is a draw
    torch.testing.assert_close(draws.std(0).mean(), 0.5 * sites[2].weight.detach().std(), rtol=0.01, atol=0)
    assert isinstance(defense.deploy(net), Randomized)


def test_sizes_are_learnt_without_weight_decay() -> None:
    defense, net = noisy()
    groups = defense.param_groups(net)
    assert [len(group["params"]) for group in groups] == [6, 3]
    assert groups[1]["weight_decay"] == 0
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in net.parameters()}
    assert [id(p) for p in groups[1]["params"]] == [id(a) for a in noise_sizes(net)]
    found = defense.metrics(net)
    assert (float(found["noise_mean"]), float(found["noise_max"])) == (0.25, 0.25)


def test_stored_weights_make_the_round_trip() -> None:
    _, net = noisy(per="channel")
    other = noisy(per="channel")[1]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1
    other.load_state_dict(net.state_dict(), strict=True)
    with noise_off(net), noise_off(other):
        assert torch.equal(net(toys.batch().x), other(toys.batch().x))
    twin = copy.deepcopy(net)
    assert len(noise_sites(twin)) == 3
    assert noise_sites(twin)[0].source is not noise_sites(net)[0].source


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("label", ["prediction", "true"])
def test_the_attack_leads_away_from_the_prediction_under_fresh_noise(label: Any, batch_norm: bool) -> None:
    defense, net = noisy(batch_norm, label=label)
    plain, data = toys.net(batch_norm).eval(), toys.batch()
    sizes = [torch.tensor(0.25, dtype=torch.float64)] * 3
    torch.manual_seed(6)
    found = defense.inner(net, data)
    torch.manual_seed(6)
    target = data.y if label == "true" else draw_by_hand(plain, sizes, data.x).argmax(1)
    adv = (data.x + THREAT.sample(data.x)).clamp(0, 1)
    for _ in range(3):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(draw_by_hand(plain, sizes, adv), target), adv)
        adv = (data.x + (adv.detach() + 0.02 * grad.sign() - data.x).clamp(-0.05, 0.05)).clamp(0, 1)
    torch.testing.assert_close(found, adv, rtol=0, atol=1e-12)
    toys.assert_leaves_no_trace(lambda model: defense.inner(model, data))


class Standing:
    """An updater that leaves the weights where they are."""

    def descend(self, terms: dict[str, torch.Tensor]) -> None:
        pass


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_prediction_can_be_that_of_the_training_pass(batch_norm: bool) -> None:
    """As released: clean pass in train mode, attack in eval mode, adversarial pass; each draws once, in this order."""
    defense, net = noisy(batch_norm, label="training")
    plain, data = toys.net(batch_norm), toys.batch()
    sizes = [torch.tensor(0.25, dtype=torch.float64, requires_grad=True) for _ in LAYERS]
    torch.manual_seed(6)
    terms = defense.step(net, Standing(), data)
    torch.manual_seed(6)
    clean = draw_by_hand(plain, sizes, data.x)
    adv = (data.x + THREAT.sample(data.x)).clamp(0, 1)
    plain.eval()
    for _ in range(3):
        adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(draw_by_hand(plain, sizes, adv), clean.argmax(1)), adv)
        adv = (data.x + (adv.detach() + 0.02 * grad.sign() - data.x).clamp(-0.05, 0.05)).clamp(0, 1)
    plain.train()
    moved = draw_by_hand(plain, sizes, adv)
    expected = 0.5 * F.cross_entropy(clean, data.y) + 0.5 * F.cross_entropy(moved, data.y)
    found = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    originals = [net.get_submodule(name).parametrizations.weight.original for name in LAYERS]
    wanted = torch.autograd.grad(expected, [plain.get_parameter(f"{n}.weight") for n in LAYERS] + sizes)
    toys.assert_same(list(torch.autograd.grad(found, [*originals, *noise_sizes(net)])), list(wanted))
    for name, value in plain.named_buffers():
        torch.testing.assert_close(net.get_buffer(name), value, rtol=0, atol=1e-12)
    assert set(defense.step(net, Standing(), toys.batch(progress=0.0))) == {"ce"}


def test_before_its_time_training_is_clean_and_the_record_says_so() -> None:
    defense, net = noisy(warmup=0.3)
    early, late = toys.batch(progress=0.2), toys.batch(progress=0.4)
    assert defense.inner(net, early) is None
    assert set(defense.step(net, toys.Descent(net), early)) == {"ce"}
    defense.step(net, toys.Descent(net), late)
    found = defense.metrics(net)
    assert (float(found["adv_steps"]), float(found["adv_share"])) == (1, 0.5)
    again = PNI(THREAT)
    again.load_state_dict(defense.state_dict())
    assert float(again.metrics(net)["adv_share"]) == 0.5


def test_one_draw_decides_or_the_mean_softmax() -> None:
    defense, net = noisy(n_draws=3, initial=2.0)
    x = toys.batch(200).x
    model = defense.deploy(net.eval())
    assert model.stochastic
    torch.manual_seed(7)
    labels = model.predict(x)
    torch.manual_seed(7)
    draws = torch.stack([net(x).softmax(1) for _ in range(3)])
    assert torch.equal(labels, draws.mean(0).argmax(1))
    one = PNI(THREAT).deploy(net)
    torch.manual_seed(7)
    single = one.predict(x)
    assert torch.equal(single, draws[0].argmax(1))
    assert not torch.equal(single, labels)
    with pytest.raises(ValueError, match="at least one draw"):
        Randomized(net, 0)


def test_costs() -> None:
    for label, expected in (("prediction", 21), ("training", 20), ("true", 20)):
        units, work = toys.cost(PNI(THREAT, label=label))  # type: ignore[arg-type]
        assert units == expected
        assert work <= expected + 0.2


def test_weak_inner_attacks_are_refused() -> None:
    with pytest.raises(ValueError, match="less than the budget"):
        PNI(THREAT, steps=2)
