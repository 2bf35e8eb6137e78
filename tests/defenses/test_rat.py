"""The Taylor terms of randomized weights against autograd, sampling and a plain reference; their limits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn

from bench.core.defense import Batch
from bench.core.pgd import kl
from bench.planning import catalog
from defenses._randomized_trades import noise_like
from defenses.awp import AWP
from defenses.rat import RAT, adversarial_trace, kl_gradient, kl_trace
from defenses.trades import TRADES

THREAT = toys.threat()
CHEAP: dict[str, Any] = {"steps": 3, "rel_step_size": 0.4}


class Tiny(nn.Module):
    """So few weights in the head that its whole Hessian can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(9, 5)
        self.head = nn.Linear(5, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(1)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def tiny() -> tuple[Tiny, Batch, Tensor]:
    torch.manual_seed(0)
    net = Tiny().double()
    with torch.no_grad():
        net.head.weight *= 3
    x = torch.rand(6, 1, 3, 3, dtype=torch.float64)
    data = Batch(x, torch.arange(6) % 3, torch.arange(6), 1, 0.5)
    return net, data, (x + 0.3 * torch.rand_like(x)).clamp(0, 1)


def divergence(net: Tiny, x: Tensor, adv: Tensor, weight: Tensor) -> Tensor:
    """Mean KL as a function of the head's weights."""
    logits = [net.features(each) @ weight.T + net.head.bias for each in (x, adv)]
    p, q = (each.softmax(1) for each in logits)
    return (p * (p.log() - q.log())).sum(1).mean()


def rms(weight: Tensor) -> float:
    return math.sqrt(weight.detach().square().mean())


def test_gradient_and_hessian_trace_of_the_divergence_equal_autograd() -> None:
    net, data, adv = tiny()
    arguments = (net(data.x), net(adv), net.features(data.x), net.features(adv))
    (grad,) = torch.autograd.grad(divergence(net, data.x, adv, net.head.weight), net.head.weight)
    torch.testing.assert_close(kl_gradient(*arguments), grad, rtol=1e-10, atol=1e-13)
    hessian = torch.autograd.functional.hessian(lambda w: divergence(net, data.x, adv, w), net.head.weight)
    torch.testing.assert_close(kl_trace(*arguments), hessian.view(15, 15).trace(), rtol=1e-10, atol=1e-13)


def trace_by_autograd(net: Tiny, p_logits: Any, q_logits: Any) -> Tensor:
    """Trace of the Hessian, in the head's weights, of the mean KL between two functions of them."""

    def divergence_at(weight: Tensor) -> Tensor:
        p, q = p_logits(weight).log_softmax(1), q_logits(weight).log_softmax(1)
        return (p.exp() * (p - q)).sum(1).mean()

    return torch.autograd.functional.hessian(divergence_at, net.head.weight).view(15, 15).trace()


@pytest.mark.parametrize("flat", [False, True])
def test_the_trace_is_the_identity_of_the_docstring(flat: bool) -> None:
    """tr H = S_p |h - h'|^2 + (S_q - S_p) |h'|^2 + 2 |h|^2 sum p^2 w; negative where p is flat and q is not."""
    net, data, adv = tiny()
    h, h_adv = net.features(data.x), net.features(adv)
    if flat:  # features that the head does not see, and a small step along those that it sees most
        with torch.no_grad():
            net.head.weight *= 10
            net.head.bias.zero_()
            _, sizes, right = torch.linalg.svd(net.head.weight)
        h = 2 * right[4].expand(6, 5)
        h_adv = h + 5 / sizes[0] * right[0]
    z, z_adv = net.head(h), net.head(h_adv)
    p, q = z.softmax(1), z_adv.softmax(1)
    s_p, s_q = ((each * (1 - each)).sum(1) for each in (p, q))
    w = (z_adv - z) - (p * (z_adv - z)).sum(1, keepdim=True)
    parts = s_p * (h - h_adv).square().sum(1) + (s_q - s_p) * h_adv.square().sum(1)
    identity = (parts + 2 * h.square().sum(1) * (p.square() * w).sum(1)).mean()
    torch.testing.assert_close(kl_trace(z, z_adv, h, h_adv), identity, rtol=1e-10, atol=1e-13)
    bias = net.head.bias.detach()
    expected = trace_by_autograd(net, lambda v: h.detach() @ v.T + bias, lambda v: h_adv.detach() @ v.T + bias)
    torch.testing.assert_close(identity, expected, rtol=1e-10, atol=1e-13)
    if flat:
        assert float(identity.detach()) < 0


def test_noise_in_the_adversarial_branch_alone_has_a_trace_that_is_never_negative() -> None:
    net, data, adv = tiny()
    z, h_adv, bias = net(data.x).detach(), net.features(adv).detach(), net.head.bias.detach()
    expected = trace_by_autograd(net, lambda v: z + 0 * v.sum(), lambda v: h_adv @ v.T + bias)
    found = adversarial_trace(net.head(h_adv), h_adv)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    defense = RAT(THREAT, beta=4.0, w2=0.6, sigma=0.5, second_on="adversarial")
    terms = defense.loss(net, data, adv)
    torch.testing.assert_close(terms["second"], 4 * 0.6 * 0.5 * (0.5 * rms(net.head.weight)) ** 2 * found)
    joint = RAT(THREAT, beta=4.0, w2=0.6, sigma=0.5).loss(net, data, adv)
    assert [name for name in terms if not torch.equal(terms[name], joint[name])] == ["second"]
    assert float(adversarial_trace(3 * torch.randn(50, 3), torch.randn(50, 5))) >= 0


def test_the_newer_setting_leaves_old_keys_alone() -> None:
    resolve = catalog.get("defenses", "rat").resolve
    assert "second_on" not in resolve({})
    assert resolve({"second_on": "joint"}) == resolve({})
    assert resolve({"second_on": "adversarial"}) == {**resolve({}), "second_on": "adversarial"}
    around = catalog.get("defenses", "awp").resolve
    assert around({"base": "rat"})["base"]["set"] == resolve({})
    chosen = around({"base": {"name": "rat", "set": {"second_on": "adversarial"}}})
    assert chosen["base"]["set"]["second_on"] == "adversarial"
    base: Any = AWP(THREAT, **chosen)._base
    assert base.second_on == "adversarial"


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "laplace"])
def test_terms_equal_their_expectations_under_sampled_noise(kind: Any) -> None:
    """For uniform and laplace noise the first term is the central limit, near already for 15 weights."""
    net, data, adv = tiny()
    arguments = (net(data.x), net(adv), net.features(data.x), net.features(adv))
    with torch.no_grad():
        draws = noise_like(torch.empty(200_000, 15, dtype=torch.float64), kind)
        slope = (draws @ kl_gradient(*arguments).flatten()).abs().mean()
    size = math.sqrt(2 / math.pi) * kl_gradient(*arguments).norm()
    assert float(slope) == pytest.approx(float(size.detach()), rel=0.01 if kind == "gaussian" else 0.06)
    hessian = torch.autograd.functional.hessian(lambda w: divergence(net, data.x, adv, w), net.head.weight).view(15, 15)
    curve = 0.5 * ((draws @ hessian) * draws).sum(1).mean()
    assert float(curve) == pytest.approx(0.5 * float(kl_trace(*arguments).detach()), rel=0.03)


@pytest.mark.parametrize("first_on", ["head", "network"])
def test_loss_and_gradients_equal_a_reference_from_the_formula(first_on: Any) -> None:
    net, data, adv = tiny()
    defense = RAT(THREAT, beta=4.0, w0=0.9, w1=0.7, w2=0.6, sigma=0.5, first_on=first_on)
    terms = defense.loss(net, data, adv)
    weight = net.head.weight
    zeroth = divergence(net, data.x, adv, weight)
    layers = [weight] if first_on == "head" else [net.body.weight, weight]
    grads = torch.autograd.grad(zeroth, layers, create_graph=True)
    square = sum((0.5 * rms(w)) ** 2 * g.square().sum() for w, g in zip(layers, grads, strict=True))
    hessian = torch.autograd.functional.hessian(
        lambda w: divergence(net, data.x, adv, w), weight, create_graph=True
    ).view(15, 15)
    second = 0.5 * (0.5 * rms(weight)) ** 2 * hessian.trace()
    expected = {
        "ce": F.cross_entropy(net(data.x), data.y),
        "kl": 4 * 0.9 * zeroth,
        "first": 4 * 0.7 * math.sqrt(2 / math.pi) * torch.as_tensor(square).sqrt(),
        "second": 4 * 0.6 * second,
    }
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-10, atol=1e-13)
    toys.assert_loss(terms, torch.stack(list(expected.values())).sum(), net)
    found = defense.metrics(net)
    assert float(sum(found.values())) == pytest.approx(1)
    ratio = found["share_second"] / found["share_kl"]
    assert float(ratio) == pytest.approx(float((terms["second"].abs() / terms["kl"]).detach()))


@pytest.mark.parametrize("settings", [{"w1": 0.0, "w2": 0.0, "sigma": 0.0}, {"sigma": 0.0}])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_without_noise_it_is_trades(settings: dict[str, Any], batch_norm: bool) -> None:
    trades = toys.weights_after(TRADES(THREAT, **CHEAP), batch_norm=batch_norm)
    toys.assert_same(toys.weights_after(RAT(THREAT, **CHEAP, **settings), batch_norm=batch_norm), trades)


def test_each_term_alone_changes_the_weights() -> None:
    def weights(**settings: float) -> list[Tensor]:
        off = {"w0": 0.0, "w1": 0.0, "w2": 0.0}
        return toys.weights_after(RAT(THREAT, sigma=0.3, **CHEAP, **{**off, **settings}))  # type: ignore[arg-type]

    runs = [weights(), weights(w0=1.0), weights(w1=1.0), weights(w2=1.0)]
    for place, one in enumerate(runs):
        for other in runs[:place]:
            assert toys.differ(one, other)


@pytest.mark.parametrize("first_on", ["head", "network"])
def test_at_the_clean_image_every_term_is_0_with_a_finite_gradient(first_on: Any) -> None:
    net, data, _ = tiny()
    terms = RAT(THREAT, sigma=0.3, first_on=first_on).loss(net, data, data.x)
    assert [float(terms[name].detach().abs()) for name in ("kl", "first", "second")] == pytest.approx([0, 0, 0])
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)


def test_the_attack_sees_one_noisy_copy_and_leaves_no_trace() -> None:
    defense, data = RAT(THREAT, sigma=0.3, noise="laplace", **CHEAP), toys.batch()
    toys.assert_leaves_no_trace(lambda model: defense.inner(model, data))
    model, noisy = toys.net(), toys.net()
    torch.manual_seed(5)
    found = defense.inner(model, data)
    torch.manual_seed(5)
    with torch.no_grad():
        layers = [noisy.first, noisy.second, noisy.head]
        shifts = [0.3 * rms(layer.weight) * noise_like(layer.weight, "laplace") for layer in layers]
        for layer, shift in zip(layers, shifts, strict=True):
            layer.weight += shift
    assert torch.equal(found, TRADES(THREAT, **CHEAP).inner(noisy, data))
    torch.manual_seed(5)
    assert not torch.equal(found, TRADES(THREAT, **CHEAP).inner(model, data))


def test_costs_what_trades_costs() -> None:
    units, work = toys.cost(RAT(THREAT))
    _, trades = toys.cost(TRADES(THREAT))
    assert units == 27
    assert work == pytest.approx(trades, rel=0.03)  # the head is a large part of this net


def test_the_first_order_on_all_layers_costs_a_double_backward() -> None:
    _, head = toys.cost(RAT(THREAT, w2=0.0))
    _, network = toys.cost(RAT(THREAT, w2=0.0, first_on="network"))
    assert 10 < network - head <= 12


def test_divergence_of_the_reference_is_the_one_of_the_core() -> None:
    net, data, adv = tiny()
    torch.testing.assert_close(divergence(net, data.x, adv, net.head.weight), kl(net(data.x), net(adv)).mean())


def test_a_net_without_head_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer 'head'"):
        RAT(THREAT).loss(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), toys.batch(), toys.batch().x)
    with pytest.raises(ValueError, match="gradient of KL is 0"):
        RAT(THREAT, start="zero")
