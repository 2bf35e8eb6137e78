"""Noise before every convolution, drawn in every mode, and the ensemble that predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from bench.core.classifier import frozen
from bench.core.stochastic import Randomized, noise_off, noise_sites
from bench.models import lenet5, mlp, preact_resnet18
from bench.models.common import Inputs
from defenses.rse import RSE

INPUTS = Inputs(1, 16, 4, (0.5,), (0.25,))


def wrapped(batch_norm: bool = False, **settings: Any) -> tuple[RSE, nn.Module]:
    defense = RSE(toys.NONE, **settings)
    return defense, defense.wrap(toys.net(batch_norm))


def by_hand(net: toys.Net, x: Tensor, init: float, inner: float) -> Tensor:
    z = net.norm(net.first(x + init * torch.randn_like(x))).tanh()
    return net.head(net.second(z + inner * torch.randn_like(z)).tanh().flatten(1))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_loss_and_gradients_equal_a_reference_from_the_description(batch_norm: bool) -> None:
    defense, net = wrapped(batch_norm, sigma_init=0.3, sigma_inner=0.7)
    plain, data = toys.net(batch_norm), toys.batch()
    torch.manual_seed(3)
    terms = defense.loss(net, data, data.x)
    torch.manual_seed(3)
    expected = F.cross_entropy(by_hand(plain, data.x, 0.3, 0.7), data.y)
    toys.assert_loss(terms, expected, net, plain)


def test_without_noise_it_is_plain_training() -> None:
    _, net = wrapped(sigma_init=0.0, sigma_inner=0.0)
    assert torch.equal(net(toys.batch().x), toys.net()(toys.batch().x))


def test_noise_is_there_in_every_mode_and_has_its_own_switch() -> None:
    _, net = wrapped()
    x = toys.batch().x
    for mode in (True, False):
        net.train(mode)
        assert not torch.equal(net(x), net(x))
        with noise_off(net):
            assert torch.equal(net(x), toys.net()(x))
    with frozen(net) as target:
        assert not torch.equal(target(x), target(x))


def test_noise_has_its_size_and_is_fresh_for_each_image_and_not_clipped() -> None:
    _, net = wrapped(sigma_init=0.2)
    seen: list[Tensor] = []
    net.get_submodule("first").register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = toys.batch(500).x
    net(x)
    noise = seen[0] - x
    assert float(noise.std()) == pytest.approx(0.2, rel=0.03)
    assert float((noise[1:] - noise[:-1]).abs().flatten(1).amax(1).min()) > 0.05  # each image has a draw of its own
    assert float(seen[0].min()) < 0


def test_sites_are_the_input_and_every_further_convolution() -> None:
    _, net = wrapped()
    sites = noise_sites(net)
    assert [(site.layer, site.kind) for site in sites] == [(net, "input"), (net.get_submodule("second"), "input")]
    assert [float(site.source.std(toys.batch().x)) for site in sites] == pytest.approx([0.2, 0.1])
    for made, count in (
        (preact_resnet18.build(INPUTS, width=2), 20),
        (lenet5.build(INPUTS), 2),
        (mlp.build(INPUTS), 3),
    ):
        names = set(made.state_dict())
        net = RSE(toys.NONE).wrap(made)
        assert len(noise_sites(net)) == count
        assert set(net.state_dict()) == names  # no parameters of its own
        x = torch.rand(2, 1, 16, 16)
        assert not torch.equal(net.eval()(x), net(x))


def test_the_ensemble_predicts() -> None:
    defense, net = wrapped(n_draws=5, sigma_init=1.0)
    x = toys.batch(100).x
    model = defense.deploy(net.eval())
    assert isinstance(model, Randomized)
    torch.manual_seed(8)
    labels = model.predict(x)
    torch.manual_seed(8)
    assert torch.equal(labels, torch.stack([net(x).softmax(1) for _ in range(5)]).mean(0).argmax(1))


def test_cost() -> None:
    units, work = toys.cost(RSE(toys.NONE))
    assert units == 3
    assert work <= 3
