"""The norm of the map from the image to a place in a net, against the explicit matrix; what is no affine map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import lenet5, small_cnn, vit_tiny
from bench.models.common import Inputs, Normalize, PreActResNet
from bench.noise import affine_map as affine
from bench.noise.affine_map import AffineMap, NotAffine

INPUTS = Inputs(3, 8, 10, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def explicit(net: nn.Module, layer: nn.Module, kind: str, x: Tensor) -> Tensor:
    """Jacobian of the quantity at the place, by automatic differentiation of the net itself, in float64."""
    seen: list[Tensor] = []
    if kind == "output":
        handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    else:
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    def quantity(image: Tensor) -> Tensor:
        seen.clear()
        net(image)
        return seen[0].flatten()

    net.double()
    found = torch.autograd.functional.jacobian(quantity, x[:1].double())
    handle.remove()
    net.float()
    return found.flatten(1)


class Prefix(nn.Module):
    """Normalize, one layer, a nonlinearity, a head."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None = None, inputs: Inputs = INPUTS) -> None:
        super().__init__()
        self.normalise, self.layer, self.norm = Normalize(inputs), layer, norm or nn.Identity()
        self.head = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalise(x)
        x = x.flatten(1) if isinstance(self.layer, nn.Linear) else x
        return self.head(F.relu(self.norm(self.layer(x))).flatten(1))


def moved_bn(channels: int) -> nn.BatchNorm2d:
    """BatchNorm with statistics and slopes unlike 1, one slope negative, one large."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 3)
        norm.weight.copy_(torch.linspace(-2, 3, channels))
        norm.bias.normal_()
    return norm


LAYERS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(3, 5, 3),
    "padded": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "strided": lambda: nn.Conv2d(3, 7, 3, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(3, 4, 3, dilation=2, padding=2, bias=False),
    "grouped": lambda: nn.Conv2d(3, 6, (3, 2), stride=(1, 2), groups=3),
    "reflected": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(3, 4, 5, padding="same"),
    "linear": lambda: nn.Linear(192, 30),
    "wider": lambda: nn.Linear(192, 300),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_norm_is_that_of_the_explicit_matrix(name: str) -> None:
    torch.manual_seed(0)
    net, x = Prefix(LAYERS[name]()).eval(), torch.rand(2, 3, 8, 8)
    net(x)
    for norm in (None, *([moved_bn(net.layer.out_channels)] if name not in ("linear", "wider") else [])):
        net.norm = norm or nn.Identity()
        net.eval()
        for layer, kind in ((net.layer, "output"), (net.layer, "input"), *([(norm, "output")] if norm else [])):
            found = AffineMap(net, layer, kind)
            matrix = explicit(net, layer, kind, x)
            true = float(torch.linalg.matrix_norm(matrix, 2))
            assert found.norm(x) == pytest.approx(true, rel=1e-7)
            assert found.norm(x) >= true  # never below, not even by rounding
            flat = torch.rand(3, *x.shape[1:], dtype=torch.float64)
            torch.testing.assert_close(found(flat).flatten(1), flat.flatten(1) @ matrix.T)


@pytest.mark.parametrize("name", LAYERS)
def test_the_bound_for_large_images_is_above(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = Prefix(LAYERS[name](), None).eval(), torch.rand(2, 3, 8, 8)
    net(x)
    found = AffineMap(net, net.layer, "output")
    matrix = explicit(net, net.layer, "output", x)
    exact = found.norm(x)
    monkeypatch.setattr(affine, "EXACT", 0)
    above = found.norm(x)
    # the two norms that are sums, of the very matrix
    sums = (float(matrix.abs().sum(0).max()) * float(matrix.abs().sum(1).max())) ** 0.5
    if name == "reflected":  # two weights meet in one entry there, so M is above |A|
        assert above > sums
    else:
        assert above == pytest.approx(sums, rel=1e-7)
    assert above > exact


def test_the_image_itself_has_norm_one() -> None:
    net = Prefix(nn.Conv2d(3, 5, 3)).eval()
    assert AffineMap(net, net, "input").norm(torch.rand(1, 3, 8, 8)) == 1


class Own(nn.Module):
    """A first step given as a function, and a convolution."""

    def __init__(self, step: Any) -> None:
        super().__init__()
        self.step, self.conv = step, nn.Conv2d(3, 4, 3)
        self.register_buffer("shift", torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.step(self, x)).flatten(1)


AFFINE: dict[str, Any] = {
    "2x - 1": lambda net, x: 2 * x - 1,
    "1 - x": lambda net, x: 1 - x,
    "shift - x/2": lambda net, x: net.shift - x / 2,
    "x + x": lambda net, x: x + x,
    "3x - x": lambda net, x: 3 * x - x,
    "x * shift": lambda net, x: x.mul(net.shift),
    "pool": lambda net, x: F.avg_pool2d(x, 2),
    "turn": lambda net, x: x.transpose(2, 3).contiguous().view(x.size(0), 3, x.shape[2], -1),
    "mean": lambda net, x: x - x.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_steps_before_the_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = Own(AFFINE[name]).eval(), torch.rand(2, 3, 8, 8)
    found = AffineMap(net, net.conv, "output")
    true = float(torch.linalg.matrix_norm(explicit(net, net.conv, "output", x), 2))
    assert found.norm(x) == pytest.approx(true, rel=1e-7)
    monkeypatch.setattr(affine, "EXACT", 0)
    assert found.norm(x) >= true


OTHER: dict[str, tuple[Any, str]] = {
    "relu": (lambda net, x: F.relu(x), "behind relu"),
    "clip": (lambda net, x: x.clamp(0, 1), "behind clamp"),
    "square": (lambda net, x: x * x, "behind mul"),
    "quotient": (lambda net, x: 1 / (1 + x), "behind truediv"),
    "round": (lambda net, x: x.round(), "behind round"),
    "detached": (lambda net, x: x * x.detach(), "behind"),
    "branch": (lambda net, x: x if x.sum() > 0 else -x, "cannot trace"),
    "constant": (lambda net, x: net.shift.expand(2, 3, 8, 8), "does not depend on the image"),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_affine_is_refused_in_one_line(name: str) -> None:
    step, message = OTHER[name]
    net = Own(step).eval()
    with pytest.raises(NotAffine, match=message) as refused:
        AffineMap(net, net.conv, "output")
    assert "\n" not in str(refused.value)


def test_a_net_that_does_not_do_what_its_graph_says_is_refused() -> None:
    net = Own(lambda net, x: 2 * x).eval()
    net.conv.register_forward_hook(lambda module, args, out: out.square())  # hooks are in no graph
    found = AffineMap(net, net.conv, "output")
    with pytest.raises(NotAffine, match="does not compute what its graph says"):
        found.norm(torch.rand(1, 3, 8, 8))


def test_batch_norm_in_train_mode_and_a_layer_that_runs_twice_are_refused() -> None:
    net = Prefix(nn.Conv2d(3, 5, 3), moved_bn(5)).train()
    net(torch.rand(2, 3, 8, 8))
    with pytest.raises(NotAffine, match="behind a BatchNorm2d"):
        AffineMap(net, net.norm, "output")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)).flatten(1)

    twice = Twice().eval()
    with pytest.raises(NotAffine, match="occurs 2 times"):
        AffineMap(twice, twice.conv, "output")


def test_first_layers_of_the_architectures() -> None:
    torch.manual_seed(0)
    made = {
        "lenet5": (lenet5.build(INPUTS._replace(size=14)), 14),
        "small_cnn": (small_cnn.build(INPUTS), 8),
        "preact": (PreActResNet(INPUTS, stem=4, widths=(4,), blocks=1, activation="relu"), 8),
        "vit": (vit_tiny.build(INPUTS, dim=16, depth=1, heads=2), 8),
    }
    for name, (net, size) in made.items():
        net.eval()
        convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        x = torch.rand(1, 3, size, size)
        matrix = explicit(net, convs[0], "output", x)
        found = AffineMap(net, convs[0], "output").norm(x)
        assert found == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-7), name
        if len(convs) > 1:
            with pytest.raises(NotAffine, match="is behind"):
                AffineMap(net, convs[1], "output")
