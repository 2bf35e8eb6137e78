"""The weight-loss landscape against linear models worked out by hand in float64, and what the normalization is for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import NoisyInput
from torch import Tensor, nn

from attacks.flatness import Flatness, filter_direction
from bench.core.attack import Columns, Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.rng import scope, seed
from bench.core.stochastic import Randomized
from bench.core.threat import Threat
from bench.core.weights import layer_weights, shifted, uphill, within
from defenses.pni import PNI

EPS = "0.03"
GAMMA = 0.02


class Linear(nn.Module):
    """Two classes, logits W x + b in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(12, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


class Net(nn.Module):
    """Two convolutions, BatchNorm on demand, a head; float64, with biases."""

    def __init__(self, batch_norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if batch_norm else nn.Identity()
        self.second = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6 * 36, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().flatten(1))


def images(count: int = 20, size: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    x = 0.2 + 0.6 * torch.rand(count, 1, size, size, dtype=torch.float64)
    return x, torch.arange(count) % classes


def flat(model: Classifier, x: Tensor, y: Tensor, eps: str = EPS, place: int = 0, **settings: Any) -> Columns:
    attack = Flatness(Threat("Linf", Epsilon(eps)), **{"gamma": GAMMA, "directions": 3, **settings})
    return attack.evaluate(model, x, y, Context(place)).columns


def by_hand(weight: Tensor, place: int) -> Tensor:
    """The direction of this number for a net with this one weight, row by row."""
    with scope(seed("flatness", "direction", place)):
        drawn = torch.randn(weight.shape, dtype=weight.dtype)
    return torch.stack([d * (w.square().sum() / d.square().sum()).sqrt() for d, w in zip(drawn, weight, strict=True)])


def linear_loss(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, eps: float, seen: Tensor) -> Tensor:
    """log(1 + exp(-margin)) where the images are the worst ones for the weights `seen`."""
    sign = torch.where(y == 1, 1.0, -1.0).double()
    gap = (weight[1] - weight[0], seen[1] - seen[0])
    moved = x.flatten(1) - eps * sign[:, None] * gap[1].sign()
    margin = sign * (moved @ gap[0] + bias[1] - bias[0])
    return (1 + (-margin).exp()).log()


@pytest.mark.parametrize("kind", ["anew", "fixed"])
def test_losses_on_a_linear_model_are_those_by_hand(kind: Any) -> None:
    net = Linear()
    x, y = torch.rand(9, 1, 3, 4, dtype=torch.float64) * 0.6 + 0.2, torch.arange(9) % 2
    found = flat(Classifier(net), x, y, images=kind, distances=[-0.5, 0.3])
    weight, bias, eps = net.head.weight.detach(), net.head.bias.detach(), float(Epsilon(EPS))
    expected = {"clean_loss": linear_loss(weight, bias, x, y, 0, weight)}
    expected["adversarial_loss"] = linear_loss(weight, bias, x, y, eps, weight)
    for distance in (-0.5, 0.3):
        points = [weight + distance * by_hand(weight, k) for k in range(3)]
        for name, budget in (("clean", 0.0), ("adversarial", eps)):
            losses = [linear_loss(w, bias, x, y, budget, w if kind == "anew" else weight) for w in points]
            expected[f"{name}_loss_{distance:g}"] = torch.stack(losses, 1)
    for name, values in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["anew", "fixed"])
def test_one_step_to_the_worst_weights_is_that_of_awp(kind: Any) -> None:
    net = Linear()
    x, y = torch.rand(9, 1, 3, 4, dtype=torch.float64) * 0.6 + 0.2, torch.arange(9) % 2
    found = flat(Classifier(net), x, y, images=kind, weight_steps=1, gamma=0.3)
    bias, eps = net.head.bias.detach(), float(Epsilon(EPS))
    for name, budget in (("clean", 0.0), ("adversarial", eps)):
        weight = net.head.weight.detach().clone().requires_grad_(True)
        here = linear_loss(weight, bias, x, y, budget, weight.detach())
        (grad,) = torch.autograd.grad(here.mean(), weight)
        worst = (weight + 0.3 * weight.norm() * grad / grad.norm()).detach()
        there = linear_loss(worst, bias, x, y, budget, worst if kind == "anew" else weight.detach())
        torch.testing.assert_close(found[f"{name}_rise"], there - here.detach(), rtol=1e-9, atol=1e-12)
        assert found[f"{name}_rise"].mean() > 0


def test_many_small_steps_fill_the_ball_and_stay_in_it() -> None:
    net, (x, y) = Net(), images()
    weights = layer_weights(net, parametrized=True)
    grads = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), weights)
    gamma = 1e-6  # so small that the loss is linear in the ball
    steepest = sum(gamma * float(w.detach().norm() * g.norm()) for w, g in zip(weights, grads, strict=True))
    for steps in (1, 2, 10, 30):
        rise = flat(Classifier(net), x, y, "0", gamma=gamma, weight_steps=steps)["clean_rise"].mean()
        assert float(rise) == pytest.approx(steepest, rel=1e-3)


def test_more_steps_find_worse_weights_and_the_worst_is_worse_than_random() -> None:
    net, (x, y) = Net(), images()
    one = flat(Classifier(net), x, y, weight_steps=1, distances=[GAMMA])
    many = flat(Classifier(net), x, y, weight_steps=20, distances=[GAMMA], directions=10)
    for name in ("clean", "adversarial"):
        random = many[f"{name}_loss_{GAMMA}"] - many[f"{name}_loss"][:, None]
        assert random.shape == (20, 10)
        assert many[f"{name}_rise"].mean() > 2 * random.mean(0).max()
        assert many[f"{name}_rise"].mean() >= one[f"{name}_rise"].mean() > 0


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7)])
def test_every_filter_of_a_direction_has_its_filters_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=torch.float64) * torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))
    direction = filter_direction(weight)
    for drawn, own in zip(direction, weight, strict=True):
        assert float(drawn.norm()) == pytest.approx(float(own.norm()), rel=1e-12)
    assert float(direction[0].abs().max()) == 0  # a filter of zeros
    assert not torch.equal(direction[1] / weight[1].norm(), direction[2] / weight[2].norm())


@pytest.mark.parametrize("factor", [2.0, 0.125])
def test_rescaling_the_layers_of_a_relu_net_changes_nothing(factor: float) -> None:
    net, (x, y) = Net(), images()
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled.first.weight *= factor
        scaled.first.bias *= factor
        scaled.second.weight /= factor
    one, other = flat(Classifier(net), x, y), flat(Classifier(scaled), x, y)
    for name, values in one.items():
        torch.testing.assert_close(other[name], values, rtol=1e-9, atol=1e-12)
    assert (one["clean_loss_0.5"] - one["clean_loss"][:, None]).abs().mean() > 1e-2


def test_biases_and_batch_norm_stand_still() -> None:
    net, (x, y) = Net(batch_norm=True), images()
    with torch.no_grad():
        net.train()(x)
        net.norm.weight += torch.rand(4)
    net.eval()
    found = flat(Classifier(net), x, y, "0", directions=1, distances=[0.4])
    other = copy.deepcopy(net)
    with scope(seed("flatness", "direction", 0)), torch.no_grad():
        for weight in (other.first.weight, other.second.weight, other.head.weight):
            weight += 0.4 * filter_direction(weight)
        expected = nn.functional.cross_entropy(other(x), y, reduction="none")
    torch.testing.assert_close(found["clean_loss_0.4"][:, 0], expected)


def test_the_net_is_left_bit_for_bit_even_where_a_loss_overflows() -> None:
    net, (x, y) = Net(batch_norm=True), images()
    net.eval()
    with torch.no_grad():
        net.first.weight[0, 0, 0, 0] = -0.0
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = flat(Classifier(net), x, y, distances=[1e200, 0.1])
    for name, value in net.state_dict().items():
        assert torch.equal(value.view(-1).view(torch.int64), before[name].view(-1).view(torch.int64)), name
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not found["clean_loss_1e+200"].isfinite().any()  # reported, not hidden
    assert found["clean_loss_0.1"].isfinite().all()
    weight = nn.Parameter(torch.ones(2))
    with shifted([(weight, torch.tensor([float("inf"), float("nan")]))]):
        assert not weight.isfinite().any()
    assert torch.equal(weight, torch.ones(2))


def test_a_stochastic_model_has_the_same_noise_at_every_point() -> None:
    x, y = images()
    found = flat(Randomized(NoisyInput(Net()), 4), x, y, distances=[1e-12], gamma=1e-12)
    for name in ("clean", "adversarial"):
        spread = found[f"{name}_loss_1e-12"] - found[f"{name}_loss"][:, None]
        assert spread.abs().max() < 1e-9
        assert found[f"{name}_rise"].abs().max() < 1e-9
    quiet = flat(Classifier(Net()), x, y)["clean_loss"]
    assert (found["clean_loss"] - quiet).abs().max() > 1e-3


def test_weights_under_noise_are_moved_too() -> None:
    x, y = images()
    net = PNI(Threat("Linf", Epsilon(EPS))).wrap(Net().float()).eval()
    assert len(layer_weights(net, parametrized=True)) == 3
    found = flat(Classifier(net), x.float(), y, directions=1, distances=[0.5])
    assert (found["clean_loss_0.5"][:, 0] - found["clean_loss"]).abs().mean() > 1e-2


def test_all_blocks_of_images_look_in_the_same_directions() -> None:
    net, (x, y) = Net(), images()
    whole = flat(Classifier(net), x, y, "0")["clean_loss_0.25"]
    half = flat(Classifier(net), x[10:], y[10:], "0", place=10)["clean_loss_0.25"]
    torch.testing.assert_close(whole[10:], half)
    assert (whole[:, 0] - whole[:, 1]).abs().max() > 1e-3


def test_steps_uphill_and_the_ball_are_relative_to_each_weight() -> None:
    one, other = torch.full((2, 2), 3.0), torch.full((4,), 0.5)
    pairs = uphill([one, other, other], [-torch.ones(2, 2), None, torch.zeros(4)], 0.1)
    assert len(pairs) == 2
    torch.testing.assert_close(pairs[0][1], torch.full((2, 2), -0.3))
    assert torch.equal(pairs[1][1], torch.zeros(4))
    torch.testing.assert_close(within(one, torch.ones(2, 2), 0.1), torch.full((2, 2), 0.3))
    assert torch.equal(within(one, torch.full((2, 2), 0.2), 0.1), torch.full((2, 2), 0.2))


def test_bad_settings_are_refused_in_one_line() -> None:
    threat = Threat("Linf", Epsilon(EPS))
    for distances in ([], [0.1, 0.1], [0.0, 0.1]):
        with pytest.raises(ValueError, match=r"^flatness: distances is .* expected different numbers other than 0$"):
            Flatness(threat, distances=distances)
    with pytest.raises(ValueError, match="less than the budget"):
        Flatness(threat, steps=2, rel_step_size=0.1)
