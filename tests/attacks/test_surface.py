"""The loss surface over the image against loops written from its definition, and nets whose surface is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Bench
from nets import NoisyInput
from torch import Tensor, nn

from attacks.surface import Surface, across
from bench import plugins
from bench.core.attack import Columns, Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.rng import scope, seed
from bench.core.stochastic import Randomized
from bench.core.threat import Norm, Threat
from bench.planning.job_fields import JobThreat, PluginChoice

EPS = "0.1"
PLACE = 5
NORMS: list[Norm] = ["Linf", "L2"]


class Net(nn.Module):
    """A convolution, a smooth bend, a head; float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4 * 36, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(4 * (6 * self.first(x)).tanh().flatten(1))


class Known(nn.Module):
    """Two classes of which cross-entropy of the first is h(x) + 50, to the last bit: log(1 + e^t) is t + e^-t."""

    def __init__(self, h: Any) -> None:
        super().__init__()
        self.h = h

    def forward(self, x: Tensor) -> Tensor:
        h = self.h(x.flatten(1)) + 50
        return torch.stack([torch.zeros_like(h), h], 1)


def images(count: int = 6, low: float = 0.2, high: float = 0.8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return low + (high - low) * torch.rand(count, 1, 6, 6, dtype=torch.float64), torch.arange(count) % 3


def at_the_edge(count: int = 6) -> tuple[Tensor, Tensor]:
    """Images with black, white and nearly black pixels, where clipping takes a part of the step."""
    x, y = images(count, 0.0, 1.0)
    x[:, :, 0], x[:, :, 1], x[:, :, 2] = 0, 1, 0.03
    return x, y


def measured(
    net: nn.Module, x: Tensor, y: Tensor, norm: Norm = "Linf", eps: str = EPS, place: int = PLACE, **settings: Any
) -> Columns:
    model = net if isinstance(net, Classifier) else Classifier(net)
    return Surface(Threat(norm, Epsilon(eps)), **settings).evaluate(model, x, y, Context(place)).columns


def known(h: Any, x: Tensor, norm: Norm = "Linf", eps: str = EPS, **settings: Any) -> Columns:
    return measured(Known(h), x, torch.zeros(len(x), dtype=torch.int64), norm, eps, **settings)


def directions(grad: Tensor, norm: Norm, place: int = PLACE) -> tuple[Tensor, Tensor]:
    """u and v of the images, written down once more."""
    with scope(seed(place, "direction")):
        drawn = torch.stack([torch.randn(grad.shape[1:], dtype=grad.dtype) for _ in grad])
    if norm == "Linf":
        return grad.sign(), drawn.sign()
    us, vs = [], []
    for g, d in zip(grad, drawn, strict=True):
        u = g / g.square().sum().sqrt()
        v = d - (d * u).sum() * u
        us.append(u)
        vs.append(v / v.square().sum().sqrt())
    return torch.stack(us), torch.stack(vs)


def by_hand(
    net: nn.Module, x: Tensor, y: Tensor, norm: Norm, eps: float, points: int, reach: float, noise: int | None = None
) -> Columns:
    """All columns, image by image and point by point. `noise`: seed under which a net that draws sees the batch."""

    def losses(batch: Tensor) -> Tensor:
        if noise is None:
            return F.cross_entropy(net(batch), y, reduction="none")
        with scope(noise):
            return F.cross_entropy(net(batch), y, reduction="none")

    z = x.clone().requires_grad_(True)
    clean = losses(z)
    (grad,) = torch.autograd.grad(clean.sum(), z)
    clean = clean.detach()
    u, v = directions(grad, norm)
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64).tolist()
    grid = torch.zeros(len(x), points, points, dtype=torch.float64)
    gaps: list[list[float]] = [[] for _ in x]
    inner: list[list[float]] = [[] for _ in x]
    with torch.no_grad():
        places = [(i, j, a, b) for i, a in enumerate(axis) for j, b in enumerate(axis)]
        for i, j, a, b in [*places, (-1, -1, 1.0, 0.0)]:
            moved = (x + eps * (a * u + b * v)).clamp(0, 1)
            there = losses(moved)
            for k in range(len(x)):
                if i >= 0:
                    grid[k, i, j] = there[k]
                step = a * u[k] + b * v[k]
                size = step.abs().max() if norm == "Linf" else step.square().sum().sqrt()
                if size <= 1 + 1e-9:
                    linear = ((moved[k] - x[k]) * grad[k]).sum()
                    gaps[k].append(float((there[k] - clean[k] - linear).abs()))
                    inner[k].append(float(there[k]))
    return {
        "clean_loss": clean,
        "loss": grid.float(),
        "nonlinearity": torch.tensor([max(found) for found in gaps], dtype=torch.float64),
        "off_gradient": torch.tensor([max(found) for found in inner], dtype=torch.float64) - there,
    }


def same(found: Columns, expected: Columns) -> None:
    for name, values in expected.items():
        assert found[name].dtype == values.dtype, name
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("points", "reach"), [(7, 1.0), (5, 2.0), (3, 0.4)])
def test_all_columns_are_those_of_the_definition(norm: Norm, points: int, reach: float) -> None:
    eps = "0.1" if norm == "Linf" else "0.6"
    for x, y in (images(), at_the_edge()):
        found = measured(Net(), x, y, norm, eps, points=points, reach=reach)
        same(found, by_hand(Net(), x, y, norm, float(Epsilon(eps)), points, reach))
        assert found["loss"].shape == (6, points, points)
        assert (found["nonlinearity"] > 0.01).all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_net_in_float32_is_measured_in_float64(norm: Norm) -> None:
    x, y = at_the_edge()
    found, exact = measured(Net().float(), x.float(), y, norm, points=5), measured(Net(), x, y, norm, points=5)
    for name in ("clean_loss", "nonlinearity", "off_gradient", "loss"):
        assert found[name].dtype == exact[name].dtype
    torch.testing.assert_close(found["clean_loss"], exact["clean_loss"], rtol=1e-5, atol=1e-6)
    # along the gradient alone: other draws in float32
    torch.testing.assert_close(found["loss"][:, :, 2], exact["loss"][:, :, 2], rtol=1e-5, atol=1e-6)


def test_it_costs_a_pass_a_point_a_gradient_and_the_whole_step() -> None:
    x, y = images()
    found = measured(Net(), x, y, points=5)
    assert set(found) == {"clean_loss", "nonlinearity", "off_gradient", "loss", "forwards", "backwards"}
    assert found["forwards"].tolist() == [27.0] * 6
    assert found["backwards"].tolist() == [1.0] * 6


class _Watched(Net):
    """Notes of each pass: training mode, are gradients recorded, and asked of the weights?"""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        asked = any(parameter.requires_grad for parameter in self.parameters())
        self.seen.append((self.training, torch.is_grad_enabled(), asked))
        return super().forward(x)


def test_one_pass_has_a_gradient_and_it_is_the_images() -> None:
    net, (x, y) = _Watched().train(), images()
    measured(net, x, y, points=3)
    assert net.seen == [(False, True, False)] + [(False, False, False)] * 10
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    assert not x.requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_loss_has_no_nonlinearity_and_its_gradient_is_right(norm: Norm) -> None:
    torch.manual_seed(1)
    w = torch.randn(36, dtype=torch.float64)
    x, _ = images()
    found = known(lambda z: z @ w, x, norm)
    assert found["nonlinearity"].max() < 1e-12
    assert found["off_gradient"].abs().max() < 1e-12
    assert found["loss"][:, -1, 7].mean() > found["loss"][:, 7, 7].mean() + 0.05
    edge, _ = at_the_edge()
    assert known(lambda z: z @ w, edge, norm)["nonlinearity"].max() < 1e-12  # d is what clipping left


def test_a_cross_entropy_that_is_nearly_linear_is_measured_as_nearly_linear() -> None:
    """Second derivatives of cross-entropy are p (1 - p), so with a class that is surely lost it bends no more."""
    torch.manual_seed(1)
    w = torch.randn(36, dtype=torch.float64)
    x, y = images(), torch.zeros(6, dtype=torch.int64)

    def bend(offset: float) -> Tensor:
        net = Known(lambda z: z @ w - 50 + offset)
        return measured(net, x[0], y)["nonlinearity"]

    assert bend(30).max() < 1e-9
    assert bend(0).min() > 1e-2


@pytest.mark.parametrize("points", [3, 15])
def test_a_quadratic_loss_bends_by_half_the_square_of_the_ball(points: int) -> None:
    x, _ = images(low=0.4, high=0.6)
    centre = torch.full((36,), -1.0, dtype=torch.float64)

    def bowl(z: Tensor) -> Tensor:
        return 3.0 * (z - centre).square().sum(1)

    linf = known(bowl, x, "Linf", points=points)["nonlinearity"]  # a corner of the cube, from the ends of the axes
    torch.testing.assert_close(linf, torch.full_like(linf, 3.0 * 36 * 0.1**2), rtol=1e-9, atol=0)
    two = known(bowl, x, "L2", "0.5", points=points)["nonlinearity"]
    torch.testing.assert_close(two, torch.full_like(two, 3.0 * 0.5**2), rtol=1e-9, atol=0)


def test_points_beyond_the_ball_are_drawn_and_do_not_count() -> None:
    """A cliff outside the diamond, at a = b = 1, and far outside the circle."""
    x, _ = images(low=0.4, high=0.6)

    def cliff(norm: Norm, edge: float) -> Columns:
        def h(z: Tensor) -> Tensor:
            d = z - x.flatten(1)
            size = d.abs().amax(1) if norm == "Linf" else d.norm(dim=1)
            return z.sum(1) + 40 * (size > edge)

        return known(h, x, norm)

    for norm in NORMS:
        out, inn = cliff(norm, 0.1 * (1 + 1e-4)), cliff(norm, 0.1 * (1 - 1e-4))
        assert out["nonlinearity"].max() < 1e-9
        assert out["off_gradient"].max() < 1e-9
        assert (out["loss"][:, -1, -1] - out["clean_loss"] > 39).all()
        assert (inn["nonlinearity"] > 39).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_have_unit_norm_and_in_l2_a_right_angle(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    grad = torch.randn(5, 3, 8, 8, dtype=dtype)
    for norm in NORMS:
        threat = Threat(norm, Epsilon(EPS))
        u = threat.steepest_direction(grad)
        v = across(threat, u)
        assert u.dtype == v.dtype == dtype
        torch.testing.assert_close(threat.norm_of(u), torch.ones(5, dtype=dtype))
        torch.testing.assert_close(threat.norm_of(v), torch.ones(5, dtype=dtype))
        assert (v[0] != v[1]).any()
        if norm == "L2":
            assert (u * v).flatten(1).sum(1).abs().max() < 1e-6
            torch.testing.assert_close((u * grad).flatten(1).sum(1), grad.flatten(1).norm(dim=1))
        else:
            assert torch.equal(u, grad.sign())
            assert set(v.unique().tolist()) == {-1.0, 1.0}
            assert v.mean().abs() < 0.1  # 960 signs: three standard deviations


@pytest.mark.parametrize("norm", NORMS)
def test_a_gradient_however_small_has_a_direction_and_a_zero_one_has_none(norm: Norm) -> None:
    torch.manual_seed(2)
    grad, threat = torch.randn(3, 1, 4, 4), Threat(norm, Epsilon(EPS))
    torch.testing.assert_close(threat.steepest_direction(1e-30 * grad), threat.steepest_direction(grad))
    grad[1] = 0
    u = threat.steepest_direction(grad)
    v = across(threat, u)
    assert (u[1] == 0).all()
    torch.testing.assert_close(threat.norm_of(v), torch.ones(3))


@pytest.mark.parametrize("norm", NORMS)
def test_a_loss_without_a_gradient_is_measured_along_the_random_direction(norm: Norm) -> None:
    x, _ = images(4)
    flat = known(lambda z: 0 * z.sum(1), x, norm)
    for name in ("nonlinearity", "off_gradient"):
        assert (flat[name] == 0).all()
    assert (flat["loss"] == 50).all()
    torch.manual_seed(1)
    w = torch.randn(36, dtype=torch.float64)
    found = known(lambda z: (z * 1e4).round() @ w / 1e4, x, norm)
    with scope(seed(PLACE, "direction")):
        v = torch.stack([torch.randn(1, 6, 6, dtype=torch.float64) for _ in x]).flatten(1)
    v = v.sign() if norm == "Linf" else v / v.norm(dim=1, keepdim=True)
    slope = 0.1 * (v @ w).abs()
    torch.testing.assert_close(found["off_gradient"], slope, rtol=0, atol=36e-4)
    torch.testing.assert_close(found["nonlinearity"], slope, rtol=0, atol=36e-4)
    assert slope.max() > 0.05


def test_a_wiggle_that_turns_the_gradient_round_is_seen_and_the_net_without_it_is_clean() -> None:
    """x - sin(k x) 2 / k is the image but for 2 / k, and its slope is -1 wherever cos(k x) = 1."""
    torch.manual_seed(1)
    w = torch.randn(36, dtype=torch.float64)
    x = (torch.randint(2, 7, (5, 1, 6, 6)) / 8).double()
    k = 2 * math.pi * 8 * 500  # whole turns at every eighth

    def shattered(z: Tensor) -> Tensor:
        return (z - 2 / k * (k * z).sin()) @ w

    honest, masked = known(lambda z: z @ w, x), known(shattered, x)
    assert honest["off_gradient"].max() < 1e-12
    assert honest["nonlinearity"].max() < 1e-12
    torch.testing.assert_close(masked["clean_loss"], honest["clean_loss"], rtol=0, atol=1e-6)
    # the best of the plane is the way back: 2 eps ||w||_1 above the step that was taken
    whole = 2 * 0.1 * w.abs().sum()
    torch.testing.assert_close(masked["off_gradient"], whole.expand(5), rtol=0, atol=0.02)
    torch.testing.assert_close(masked["nonlinearity"], whole.expand(5), rtol=0, atol=0.02)


def test_a_gradient_step_that_goes_too_far_counts_what_it_missed() -> None:
    """t - 10 t^2 of one pixel, which moves by t = eps (a +- b): highest at half a step, and 0 after a whole one."""
    x, _ = images(3)

    def hill(z: Tensor) -> Tensor:
        t = z[:, 0] - x.flatten(1)[:, 0]
        return t - 10 * t.square()

    for points, reach, missed in ((9, 1.0, 0.025), (3, 1.0, 0.0), (3, 0.4, 0.04 - 0.016)):
        found = known(hill, x, points=points, reach=reach)
        expected = torch.full((3,), missed, dtype=torch.float64)
        torch.testing.assert_close(found["off_gradient"], expected, rtol=1e-6, atol=1e-12)
        # the whole step counts even where it is not on the grid
        torch.testing.assert_close(found["nonlinearity"], torch.full_like(expected, 0.1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_eps_and_reach_scale_the_plane(norm: Norm) -> None:
    x, y = images()
    one = measured(Net(), x, y, norm, "0.2", points=5)
    other = measured(Net(), x, y, norm, "0.1", points=5, reach=2.0)
    torch.testing.assert_close(one["loss"], other["loss"])
    assert (one["nonlinearity"] > other["nonlinearity"]).all()
    nothing = measured(Net(), x, y, norm, "0", points=5)
    for name in ("nonlinearity", "off_gradient"):
        assert (nothing[name] == 0).all()
    assert torch.equal(nothing["loss"], nothing["clean_loss"].float()[:, None, None].expand(6, 5, 5))


@pytest.mark.parametrize("norm", NORMS)
def test_a_stochastic_model_has_the_same_noise_everywhere(norm: Norm) -> None:
    x, y = at_the_edge()
    found = measured(Randomized(NoisyInput(Net()), 4), x, y, norm, points=5)
    same(found, by_hand(NoisyInput(Net()), x, y, norm, 0.1, 5, 1.0, noise=seed(PLACE, "loss")))
    assert torch.equal(found["loss"][:, 2, 2], found["clean_loss"].float())
    quiet = measured(Net(), x, y, norm, points=5)["clean_loss"]
    assert (found["clean_loss"] - quiet).abs().max() > 1e-2
    still = measured(Randomized(NoisyInput(Net()), 4), x, y, norm, "1e-5", points=5)
    assert still["nonlinearity"].max() < 1e-5  # with another draw's gradient it would be of the order of eps


@pytest.mark.parametrize("norm", NORMS)
def test_an_image_is_measured_alike_in_a_shorter_block_and_otherwise_in_another_one(norm: Norm) -> None:
    x, y = images(9)
    whole, part = measured(Net(), x, y, norm, points=5), measured(Net(), x[:4], y[:4], norm, points=5)
    for name, values in part.items():
        torch.testing.assert_close(values, whole[name][:4], msg=name)
    again = measured(Net(), x, y, norm, points=5, place=PLACE + 1)
    torch.testing.assert_close(again["loss"][:, :, 2], whole["loss"][:, :, 2])  # b = 0: the gradient alone
    assert ((again["loss"] - whole["loss"]).abs().amax((1, 2)) > 1e-4).all()


def test_a_loss_that_is_not_finite_stays_so_and_spoils_no_other_image() -> None:
    x, _ = images(3, 0.5, 0.6)
    x[1] = 0.95

    def h(z: Tensor) -> Tensor:
        top = z.mean(1)
        return torch.where(top > 0.96, top.new_full((), math.inf), top)

    found = known(h, x)
    assert found["nonlinearity"].isfinite().tolist() == [True, False, True]
    assert found["off_gradient"].isfinite().tolist() == [True, False, True]
    assert found["loss"].isfinite().flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"points": 4}, "points is 4; expected an odd number, 3 or more"),
        ({"points": 1}, "points is 1; expected an odd number, 3 or more"),
        ({"points": -3}, "points is -3; expected an odd number, 3 or more"),
        ({"reach": 0.0}, "reach is 0.0; expected a finite number above 0"),
        ({"reach": -1.0}, "reach is -1.0; expected a finite number above 0"),
        ({"reach": math.inf}, "reach is inf; expected a finite number above 0"),
        ({"reach": math.nan}, "reach is nan; expected a finite number above 0"),
    ],
)
def test_bad_settings_are_refused_in_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^surface: {said}[^\n]*$"):
        Surface(Threat("Linf", Epsilon(EPS)), **settings)
    with pytest.raises(ValueError, match=r"surface|greater than"):
        plugins.make("attacks", PluginChoice("surface", settings), JobThreat("Linf", EPS))


@pytest.mark.parametrize("setting", ["points=4", "points=1", "reach=0"])
def test_the_command_line_refuses_them_too(bench: Bench, setting: str) -> None:
    words = ("plan", "--dataset", "digits", "--defense", "standard", "--attack", "surface", "--eps", "0.1")
    outcome = bench(*words, "--check", "--set", f"surface.{setting}")
    assert outcome.code == 2
    assert setting.partition("=")[0] in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
