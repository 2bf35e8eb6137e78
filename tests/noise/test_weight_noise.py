"""Noise that stays in a deployed net, on activations and on weights: its closed form against draws of the net."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.closed_form import ClosedForm
from bench.core.classifier import Classifier, Counted
from bench.core.epsilon import Epsilon
from bench.core.smoothing import Smoothed
from bench.core.stochastic import InputNoise, OwnNoise, Randomized, noise_off, noise_sites
from bench.core.threat import Threat
from bench.noise.gaussian_noise import KnownNoise, known_noise
from bench.noise.layer_moments import Moments
from bench.noise.logit_moments import Structure, passes
from bench.noise.weight_noise import weight_piece, weight_step
from bench.training.cost import _Flops
from defenses.pni import PNI
from defenses.rse import RSE

NONE = Threat("Linf", Epsilon(0))
DRAWS = 10_000  # a variance is known to 1.4 % then

pytestmark = pytest.mark.usefixtures("seeded")


class Net(nn.Module):
    """Grouped and strided convolutions, BatchNorm, a skip past a noisy layer, a pool, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.block = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.down = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.fc = nn.Linear(24, 8)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.bn.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn(self.first(x)))
        z = z + self.block(z)
        z = F.max_pool2d(F.relu(self.down(z)), 2)
        return self.head(F.relu(self.fc(z.flatten(1))))


def deployed(kind: str, scale: float = 1.0) -> Classifier:
    """A net in float64 whose noise is small enough that it is nearly linear in it."""
    net = Net().double().eval()
    if kind == "smoothing":
        return Smoothed(net, 0.05 * scale)
    if kind == "rse":
        defense: Any = RSE(NONE, sigma_init=0.04 * scale, sigma_inner=0.03 * scale)
    else:
        defense = PNI(NONE, initial=0.06 * scale, per=kind.removeprefix("pni-"))
    model = defense.deploy(defense.wrap(net))
    if kind.startswith("pni"):
        with torch.no_grad():
            for i, site in enumerate(noise_sites(model.net)):
                site.source.a *= (-1) ** i * (0.5 + torch.rand_like(site.source.a))
    return model


KINDS = ["smoothing", "rse", "pni-layer", "pni-channel", "pni-element"]


def drawn(model: nn.Module, x: Tensor, draws: int = DRAWS) -> Tensor:
    """Logits of independent draws, draws b k: noise on weights too is fresh in each."""
    with torch.no_grad():
        return torch.vmap(lambda _: model(x), randomness="different", chunk_size=2000)(torch.zeros(draws))


def covariance(logits: Tensor) -> Tensor:
    """b k k from draws b k."""
    return torch.stack([torch.cov(logits[:, i].T) for i in range(logits.shape[1])])


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Each sample's matrix to a share of its own size."""
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < tolerance, error


def of(model: Classifier) -> KnownNoise:
    found = known_noise(model)
    assert found is not None
    return found


@pytest.mark.parametrize("structure", ["adjoint", "jacobian"])
@pytest.mark.parametrize("kind", KINDS)
def test_covariance_and_mean_equal_draws_of_the_model(kind: str, structure: Structure) -> None:
    model = deployed(kind, 0.1 if structure == "adjoint" else 0.02)  # the fewer kinks in reach, the more linear
    torch.manual_seed(3)  # no image with an activation at its very kink
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    logits = drawn(model, x)
    with torch.no_grad():
        moments = of(model).moments(x, structure, "adf" if structure == "adjoint" else "laplace")
        with noise_off(model.net):
            plain = model.net(x)
    close(moments.covariance().detach(), covariance(logits), 0.1)
    spread = logits.std(0)
    shift = ((logits.mean(0) - moments.mean) / spread).abs().max()
    assert shift < (0.06 if structure == "adjoint" else 0.2)
    if structure == "jacobian":
        torch.testing.assert_close(moments.mean, plain)


def test_exact_means_are_nearer_to_the_draws_than_the_noise_free_net() -> None:
    model, x = deployed("rse", 4.0), torch.rand(3, 1, 8, 8, dtype=torch.float64)
    mean = drawn(model, x).mean(0)
    with torch.no_grad():
        exact, plain = (of(model).moments(x, s, r).mean for s, r in (("diag", "adf"), ("jacobian", "laplace")))  # type: ignore[arg-type]
    assert (exact - mean).norm() < 0.35 * (plain - mean).norm()


LAYERS = [
    (nn.Linear(5, 3), (2, 5)),
    (nn.Linear(5, 3), (2, 4, 5)),
    (nn.Conv2d(2, 4, 3, padding=1), (2, 2, 5, 5)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), padding=(1, 0), groups=2, bias=False), (2, 4, 6, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=["linear", "tokens", "conv", "grouped"])
def test_a_layer_with_noisy_weights_on_random_input(layer: Any, shape: tuple[int, ...]) -> None:
    """Element-wise moments against draws of weights and input; the covariance that shared weights make, exactly."""
    layer = layer.double()
    x = Moments(torch.randn(shape).double(), 0.2 + torch.rand(shape).double())
    spread = 0.1 + 0.3 * torch.rand_like(layer.weight)

    def draw(mean: Tensor, var: Tensor) -> Tensor:
        weights = layer.weight + spread.sqrt() * torch.randn_like(layer.weight)
        return torch.func.functional_call(layer, {"weight": weights}, (mean + var.sqrt() * torch.randn_like(mean),))

    with torch.no_grad():
        one = torch.vmap(lambda _: draw(*x), randomness="different")(torch.zeros(DRAWS))
        other = torch.vmap(lambda _: draw(x.mean, 0 * x.var), randomness="different")(torch.zeros(DRAWS))
        step = weight_step(x, layer, spread)
        known = weight_step(x.mean, layer, spread)
    torch.testing.assert_close(step.out.mean, one.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(step.out.var, one.var(0), rtol=0.1, atol=0)
    torch.testing.assert_close(known.out.var, other.var(0), rtol=0.1, atol=0)
    assert known.pulls == ()
    # rows: all outputs of a sample, so that R diag(w) R^T is the covariance of them all
    outs = step.out.mean[0].numel()
    rows = torch.eye(outs).double().view(outs, 1, *step.out.mean.shape[1:]).expand(outs, *step.out.mean.shape)
    r, w = weight_piece(rows, x.mean, layer, spread)
    found = torch.einsum("rbn,sbn->brs", (r * w).flatten(2), r.flatten(2))
    close(found, covariance(other.flatten(2)), 0.1)
    pieces = (step.further or (lambda rows: []))(rows)
    diagonal = sum((r.square() * w).flatten(2).sum(2).T for r, w in pieces) + 0
    carried = sum(pull(rows).square().mul(x.var).flatten(2).sum(2).T for pull in step.pulls)
    torch.testing.assert_close(diagonal + carried, step.out.var.flatten(1))


def test_diag_ignores_what_positions_share_and_the_others_do_not() -> None:
    """A weight for each position would average out; one for all 36 leaves their mean 36 times the variance."""

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    defense = PNI(NONE)
    model = defense.deploy(defense.wrap(Mean().double()))
    x = torch.ones(2, 1, 6, 6, dtype=torch.float64)
    own = noise_sites(model.net)[0]
    true = own.source.std(own.weight).square().detach()
    for structure, share in (("diag", 1 / 36), ("adjoint", 1.0), ("jacobian", 1.0)):
        found = of(model).moments(x, structure, "laplace").quadratic(torch.eye(3).double()[:, None].expand(3, 2, 3))  # type: ignore[arg-type]
        torch.testing.assert_close(found.detach(), (share * true).expand(3, 2))


def test_noise_before_a_layer_does_not_reach_the_skip_beside_it() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1, bias=False)
            self.head = nn.Linear(4, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.conv(x)).flatten(1))

    net = Skip().double()
    InputNoise(0.3).attach(net.conv)
    model, x = Randomized(net, 1), torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    expected = (0.3 * net.conv.weight.detach()).square().sum() * net.head.weight.detach() @ net.head.weight.detach().T
    for structure in ("adjoint", "jacobian"):
        found = of(model).moments(x, structure, "laplace").covariance().detach()  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected.expand(2, 2, 2))


@pytest.mark.parametrize("structure", ["diag", "adjoint", "jacobian"])
@pytest.mark.parametrize("kind", ["smoothing", "rse", "pni-layer"])
def test_nothing_is_drawn_and_a_factor_multiplies_each_deviation(kind: str, structure: Structure) -> None:
    model, x = deployed(kind), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    state, rule = torch.get_rng_state(), "laplace"
    once, twice, none = (of(model).moments(x, structure, rule, factor).covariance() for factor in (1, 2, 0))  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), state)
    # the variance of a product of noisy weights has a term of fourth order, which the jacobian does not see
    product = kind == "pni-layer" and structure != "jacobian"
    close(twice.detach(), 4 * once.detach(), 0.15 if product else 1e-8)
    assert float(none.detach().abs().max()) < 1e-12
    assert all(site.source.enabled for site in noise_sites(model.net))


def test_which_models_tell_their_noise() -> None:
    net = Net()
    assert known_noise(Classifier(net)) is None
    assert known_noise(Randomized(net, 1)) is None
    assert of(Smoothed(net, 0.5)).sites == ["input"]
    assert float(of(Smoothed(net, 0.5)).variances[0](torch.ones(1))) == 0.25
    rse = deployed("rse")
    assert [site.layer for site in of(rse).sites if isinstance(site, OwnNoise)] == [  # type: ignore[comparison-overlap]
        rse.net, rse.net.block, rse.net.down
    ]  # fmt: skip
    assert not of(rse).on_weights
    assert of(deployed("pni-layer")).on_weights
    with noise_off(rse.net):
        assert known_noise(rse) is None
    both = of(Smoothed(rse.net, 0.5))
    assert both.sites[0] == "input"
    assert len(both.sites) == 4


def test_own_noise_is_refused_where_there_is_no_closed_form() -> None:
    x = torch.rand(1, 1, 8, 8, dtype=torch.float64)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x)).flatten(1)

    net = Twice().double()
    InputNoise(0.1).attach(net.conv)
    with pytest.raises(ValueError, match="occurs 2 times"):
        of(Randomized(net, 1)).moments(x, "diag", "adf")


class Wide(nn.Module):
    """Convolutions of equal cost, so that the first, whose moments need less, is a small share."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [1, 8, 8, 8, 8, 8]
        self.layers = nn.Sequential(
            *[part for a, b in itertools.pairwise(sizes) for part in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
        )
        self.head = nn.Linear(8 * 36, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1))


@pytest.mark.parametrize("structure", ["diag", "adjoint", "jacobian"])
@pytest.mark.parametrize("noise", ["input", "weight"])
def test_passes_are_what_is_computed(structure: Literal["diag", "adjoint", "jacobian"], noise: str) -> None:
    """Work of convolutions and matrix products in one gradient, against the passes that the attack counts."""
    net = Wide()
    model: Classifier = Smoothed(net, 0.3) if noise == "input" else PNI(NONE).deploy(PNI(NONE).wrap(net))
    x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 4
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with _Flops() as one, torch.no_grad():
        net(x)
    counted = Counted(model)
    objective = ClosedForm(Threat("Linf", Epsilon("0.1")), structure=structure, rivals=2)._objective(counted)
    point = x.clone().requires_grad_()
    objective(x, y)  # traces the graph
    counted.forwards = counted.backwards = 0
    with _Flops() as work:
        torch.autograd.grad(objective(point, y).sum(), point)
    cost = passes(structure, 2, noise == "weight")
    assert counted.forwards == 8 * cost.forwards
    assert counted.backwards == 8 * (cost.value + cost.gradient)
    measured = work.total / one.total
    assert measured <= cost.forwards + cost.value + cost.gradient + 0.05
    assert measured >= 0.9 * (cost.forwards + cost.value + cost.gradient)


@pytest.mark.parametrize("settings", [{}, {"site": "input"}], ids=str)
@pytest.mark.parametrize("structure", ["adjoint", "jacobian"])
def test_noise_on_what_a_layer_puts_out(structure: Structure, settings: dict[str, Any]) -> None:
    defense = pytest.importorskip("defenses.noisy_vote").NoisyVote(NONE, sigma=0.004, **settings)
    model = defense.deploy(defense.wrap(Net()).double().eval())
    torch.manual_seed(3)
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    logits = drawn(model, x)
    with torch.no_grad():
        moments = of(model).moments(x, structure, "adf" if structure == "adjoint" else "laplace")
    close(moments.covariance().detach(), covariance(logits), 0.1)
