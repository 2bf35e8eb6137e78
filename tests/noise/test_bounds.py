"""Bounds of margins over a box: against formulas in float64, random images, PGD, and the net's own rounding."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.pgd import PGD
from bench.core.attack import Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.smoothing import Smoothed
from bench.core.stochastic import InputNoise
from bench.core.threat import Threat
from bench.models.common import Inputs
from bench.noise import box_rules as rules
from bench.noise import interval as iv
from bench.noise.box_rules import Box
from bench.plugins import build_model

METHODS: tuple[iv.Method, ...] = ("interval", "crown")

pytestmark = pytest.mark.usefixtures("seeded")


class Mixed(nn.Module):
    """Normalization, a stride, BatchNorm, a skip, overlapping pools, a bent activation, and a mean over space."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.activation = activation
        self.register_buffer("mean", torch.rand(1, 2, 1, 1))
        self.conv = nn.Conv2d(2, 6, 3, 2, 1)
        self.norm = nn.BatchNorm2d(6)
        self.branch = nn.Conv2d(6, 6, 3, padding=1, groups=2, bias=False)
        self.pool = nn.MaxPool2d(3, 1, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.activation(self.norm(self.conv((x - self.mean) / 0.3)))
        z = z - 0.5 * self.activation(self.branch(z))
        z = self.pool(F.relu(z))
        flat = F.pad(F.avg_pool2d(z, 3, 2).mean((2, 3)), (0, 6))
        return self.head(self.drop(flat))


def mixed(activation: Callable[[Tensor], Tensor] = F.relu) -> nn.Module:
    """In eval mode, with running statistics of its own and one negative BatchNorm slope."""
    net = Mixed(activation)
    with torch.no_grad():
        net.norm.weight[0] = -1.0
        for _ in range(20):
            net(torch.rand(16, 2, 10, 10))
    return net.eval()


def tiny(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), *layers).double().eval()


def corners(x: Tensor, eps: float) -> Tensor:
    """All corners of the ball in the pixel box around one image."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=x.numel())), dtype=x.dtype)
    return (x.flatten() + eps * signs).clamp(0, 1).view(-1, *x.shape[1:])


def true_margins(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = net(x)
    return z.gather(1, y[:, None]) - z


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("activation", [F.relu, F.silu, F.gelu, torch.tanh, F.softplus, F.elu, F.relu6])
def test_no_image_of_the_ball_falls_below_the_bound(method: iv.Method, activation: Callable[[Tensor], Tensor]) -> None:
    net, x, eps = mixed(activation).double(), torch.rand(3, 2, 10, 10, dtype=torch.float64), 0.03
    y = net(x).argmax(1)
    found = iv.run(net, iv.ball(x, eps))
    bounds = iv.margins(found, y, method)
    assert bounds.isfinite().all()
    lowest = torch.full_like(bounds, math.inf)
    for _ in range(8):
        noise = eps * (2 * torch.rand(250, *x.shape, dtype=x.dtype) - 1)
        noise[::2] = eps * noise[::2].sign()
        points = (x + noise).clamp(0, 1)
        seen = true_margins(net, points.flatten(0, 1), y.repeat(250)).view(250, *bounds.shape)
        lowest = torch.minimum(lowest, seen.amin(0))
    assert (bounds <= lowest + 1e-12).all()
    wrong = F.one_hot(y, 4) == 0
    assert (bounds < true_margins(net, x, y))[wrong].all()


@pytest.mark.parametrize("method", METHODS)
def test_pgd_does_not_pass_the_bound(method: iv.Method) -> None:
    net = build_model("lenet5", {}, Inputs(1, 14, 4, (0.1,), (0.3,))).eval()
    x, threat = torch.rand(20, 1, 14, 14), Threat("Linf", Epsilon("0.02"))
    model = Classifier(net)
    y = model.predict(x)
    bound = iv.proved(model, x, y, threat, method)
    x_adv = PGD(threat, steps=20, restarts=3, loss="cw").evaluate(model, x, y, Context(0)).x_adv
    assert x_adv is not None
    own = true_margins(net, x_adv, y).double().scatter(1, y[:, None], math.inf).amin(1)
    assert (bound < own).all()
    assert (own < true_margins(net, x, y).double().scatter(1, y[:, None], math.inf).amin(1)).any()


def test_interval_equals_the_formula() -> None:
    """Gowal et al., equations 6 to 9 and the merged last layer, neuron by neuron."""
    net, eps = tiny(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), 0.1
    x, y = torch.rand(2, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 2])
    first, last = net[1], net[3]
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for i in range(2):
        low, high = (x[i].flatten() - eps).clamp(0, 1), (x[i].flatten() + eps).clamp(0, 1)
        hidden = []
        for neuron in range(5):
            w, ends = first.weight[neuron], [first.bias[neuron].clone(), first.bias[neuron].clone()]
            for k in range(4):
                ends[0] = ends[0] + torch.minimum(w[k] * low[k], w[k] * high[k])
                ends[1] = ends[1] + torch.maximum(w[k] * low[k], w[k] * high[k])
            hidden.append((ends[0].clamp_min(0), ends[1].clamp_min(0)))
        for j in range(3):
            w = last.weight[y[i]] - last.weight[j]
            worst = sum(torch.minimum(w[k] * hidden[k][0], w[k] * hidden[k][1]) for k in range(5))
            expected[i, j] = worst + last.bias[y[i]] - last.bias[j]
    found = iv.margins(iv.run(net, iv.ball(x, eps)), y, "interval")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_crown_equals_the_formula() -> None:
    """Zhang et al. 2018 on one hidden layer: a line above or below each ReLU by the sign of its coefficient."""
    net, eps = tiny(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), 0.2
    x, y = torch.rand(3, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 2, 1])
    found = iv.margins(iv.run(net, iv.ball(x, eps)), y, "crown")
    first, last = net[1], net[3]
    kinds = set()
    for i, j in itertools.product(range(3), range(3)):
        low, high = (x[i].flatten() - eps).clamp(0, 1), (x[i].flatten() + eps).clamp(0, 1)
        row, constant = last.weight[y[i]] - last.weight[j], last.bias[y[i]] - last.bias[j]
        carried = torch.zeros(4, dtype=torch.float64)
        for k in range(6):
            w, b = first.weight[k], first.bias[k]
            bottom = (w.clamp_min(0) * low + w.clamp_max(0) * high).sum() + b
            top = (w.clamp_min(0) * high + w.clamp_max(0) * low).sum() + b
            if bottom >= 0 or top <= 0:
                slope, offset = float(bottom >= 0), torch.zeros(())
            elif row[k] < 0:
                slope, offset = top / (top - bottom), -top * bottom / (top - bottom)
            else:
                slope, offset = float(top > -bottom), torch.zeros(())
            kinds.add((bool(bottom >= 0), bool(top <= 0), bool(row[k] < 0)))
            carried = carried + row[k] * slope * w
            constant = constant + row[k] * (slope * b + offset)
        value = (carried.clamp_min(0) * low + carried.clamp_max(0) * high).sum() + constant
        assert float(found[i, j].detach()) == pytest.approx(float(value.detach()), abs=1e-12)
    assert len(kinds) >= 4  # the case of an open sign met coefficients of both signs


@pytest.mark.parametrize("method", METHODS)
def test_linear_nets_are_bounded_exactly(method: iv.Method) -> None:
    net = tiny(nn.Linear(4, 6), nn.Linear(6, 3))
    x, y, eps = torch.rand(1, 1, 2, 2, dtype=torch.float64), torch.tensor([1]), 0.3
    found = iv.margins(iv.run(net, iv.ball(x, eps)), y, method)
    exact = true_margins(net, corners(x, eps), y.expand(16)).amin(0)
    torch.testing.assert_close(found[0], exact, rtol=0, atol=1e-12)


def test_crown_is_tighter_where_no_sign_is_open() -> None:
    """There the net is linear over the box: CROWN is exact, and interval bounds through two layers are not."""
    net = tiny(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y, eps = torch.rand(1, 1, 2, 2, dtype=torch.float64), torch.tensor([0]), 0.02
    with torch.no_grad():
        net[1].bias.add_(torch.where(torch.arange(6) < 3, 5.0, -5.0))
        net[3].bias.add_(torch.where(torch.arange(6) < 4, 9.0, -9.0))
    bounds = {method: iv.margins(iv.run(net, iv.ball(x, eps)), y, method)[0] for method in METHODS}
    exact = true_margins(net, corners(x, eps), y.expand(16)).amin(0)
    torch.testing.assert_close(bounds["crown"], exact, rtol=0, atol=1e-12)
    assert (bounds["interval"][1:] < exact[1:] - 1e-6).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_box_of_one_image_gives_its_margins(method: iv.Method) -> None:
    net, x = mixed().double(), torch.rand(4, 2, 10, 10, dtype=torch.float64)
    y = torch.arange(4)
    found = iv.margins(iv.run(net, iv.ball(x, 0.0)), y, method)
    torch.testing.assert_close(found, true_margins(net, x, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_by_finite_differences(method: iv.Method) -> None:
    net, x, y = mixed().double(), torch.rand(2, 2, 10, 10, dtype=torch.float64), torch.tensor([0, 3])

    def value() -> Tensor:
        return iv.margins(iv.run(net, iv.ball(x, 0.01)), y, method).sum()

    for weight in (net.conv.weight, net.norm.weight, net.branch.weight, net.head.bias):
        (grad,) = torch.autograd.grad(value(), weight)
        direction, base, ends = torch.randn_like(weight), weight.detach().clone(), []
        for sign in (1, -1):
            weight.data = base + sign * 1e-7 * direction
            ends.append(float(value().detach()))
        weight.data = base
        assert (ends[0] - ends[1]) / 2e-7 == pytest.approx(float((grad * direction).sum()), rel=1e-5, abs=1e-6)


def test_units_cover_the_rounding_of_a_net() -> None:
    """The logits of a net computed in bfloat16, whose unit is 2^-8, lie in boxes of that unit, not in others."""
    net, x = build_model("lenet5", {}, Inputs(1, 14, 4, (0.25,), (0.5,))).eval(), torch.rand(20, 1, 14, 14)
    x = x.bfloat16().float()
    net = net.bfloat16()
    with torch.no_grad():
        z = net(x.bfloat16()).double()
    boxes = [iv.logit_box(iv.run(net, Box(x.double(), x.double()), unit)) for unit in (0.0, 2.0**-8)]
    inside = [(box.low <= z) & (z <= box.high) for box in boxes]
    assert not inside[0].any()
    assert inside[1].all()


@pytest.mark.parametrize("method", METHODS)
def test_a_proof_covers_what_an_attack_may_return(method: iv.Method) -> None:
    """The bound of a proof is below that of the plain ball, by little."""
    net = mixed()
    model, x, threat = Classifier(net), torch.rand(4, 2, 10, 10), Threat("Linf", Epsilon("1/255"))
    y = model.predict(x)
    bound = iv.proved(model, x, y, threat, method)
    plain = iv.margins(iv.run(net, iv.ball(x.double(), threat.radius)), y, method)
    plain = plain.scatter(1, y[:, None], math.inf).amin(1)
    assert (bound < plain).all()
    assert ((plain - bound) < 0.02 * plain.abs().clamp_min(0.1)).all()


def test_pools_follow_the_certain_winner() -> None:
    """CROWN through a pool: exact where one element wins all over the box, a constant above where none does."""
    low = torch.tensor([[[[0.0, 5.0], [1.0, 2.0]]]], dtype=torch.float64)
    certain = rules.max_pool2d(Box(low, low + 1), 2)
    (rows,), constant = certain.back(-torch.ones(1, 1, 1, 1, 1, dtype=torch.float64))
    assert (rows is not None and rows.flatten().tolist(), constant.item()) == ([0, -1, 0, 0], 0)
    open_ = rules.max_pool2d(Box(low, low + 4), 2)
    (rows,), constant = open_.back(-torch.ones(1, 1, 1, 1, 1, dtype=torch.float64))
    assert (rows is not None and rows.flatten().tolist(), constant.item()) == ([0, 0, 0, 0], -9)
    (rows,), constant = open_.back(torch.ones(1, 1, 1, 1, 1, dtype=torch.float64))
    assert (rows is not None and rows.flatten().tolist(), constant.item()) == ([0, 1, 0, 0], 0)


@pytest.mark.parametrize(("function", "at"), [(F.silu, rules.MINIMUM_OF_SILU), (F.gelu, rules.MINIMUM_OF_GELU)])
def test_minima_of_bent_activations(function: Callable[[Tensor], Tensor], at: float) -> None:
    grid = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    assert (function(grid).diff()[grid[:-1] >= at] >= -1e-16).all()  # erf is rounded in the tail
    assert (function(grid).diff()[grid[1:] <= at] <= 1e-16).all()
    box = rules.dipping(Box(grid[:1], grid[-1:]), function, at, 0.0).out
    assert float(box.low) == pytest.approx(float(function(grid).min()), abs=1e-9)
    assert float(box.low) <= float(function(grid).min())


class Odd(nn.Module):
    """Writes into a value that its graph takes for unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 3)
        nn.init.constant_(self.head.bias, -3.0)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x.flatten(1))
        F.relu(logits, inplace=True)
        return logits


def test_what_proves_nothing_is_refused_in_one_line() -> None:
    x = torch.rand(2, 1, 4, 4)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    assert iv.obstacle(Classifier(plain.eval()), x) is None
    hooked = copy.deepcopy(plain)
    hooked[1].register_forward_hook(lambda module, given, out: 2 * out)
    cases = {
        "by its largest logit": Smoothed(plain, 0.1, 10),
        "float32 or float64": Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).bfloat16()),
        "Softmax": Classifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Softmax(1))),
        "LayerNorm": Classifier(nn.Sequential(nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3))),
        "zero padding": Classifier(
            nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(16, 3))
        ),
        "without hooks": Classifier(hooked),
        "what its graph says": Classifier(Odd()),
    }
    for words, model in cases.items():
        given = x.bfloat16() if "float64" in words else x
        reason = iv.obstacle(model.eval(), given)
        assert reason is not None
        assert words in reason
        assert "\n" not in reason


def test_live_batch_statistics_and_noise_are_refused() -> None:
    net = mixed()
    net.norm.train()
    with pytest.raises(ValueError, match="fixed statistics"):
        iv.run(net, iv.ball(torch.rand(2, 2, 10, 10), 0.1))
    noisy = mixed()
    InputNoise(0.1).attach(noisy.conv)
    with pytest.raises(ValueError, match="no interval bounds"):
        iv.run(noisy, iv.ball(torch.rand(2, 2, 10, 10), 0.1))
