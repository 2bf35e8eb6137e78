"""Smoothing with the noise inside the net: certificates against true distances in the image."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import norm as normal
from torch import Tensor, nn

from attacks.certify import Certify
from bench.core.attack import Context
from bench.core.epsilon import Epsilon
from bench.core.smoothing import Smoothed
from bench.core.stochastic import InputNoise, NoiseSource, noise_off, noise_sites
from bench.core.threat import Threat
from bench.noise.inner_smoothing import InnerSmoothed


class TwoSides(nn.Module):
    """A linear layer, noise on what it puts out, and the sign of one linear form of it: the boundary in the image is
    the hyperplane v (W x + b) = 0."""

    def __init__(self, sigma: float, between: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.between = nn.Linear(16, 6), between or nn.Identity()
        self.register_buffer("v", torch.randn(6))
        InputNoise(sigma).attach(self.first, "output")

    def forward(self, x: Tensor) -> Tensor:
        score = self.between(self.first(x.flatten(1))) @ self.v
        return torch.stack([score, -score], dim=1)


def _model(sigma: float, aligned: bool) -> tuple[InnerSmoothed, Tensor, Tensor]:
    """The vote, images, and the L2 distance of each to the boundary. `aligned`: v is the direction that W stretches
    most, so that the norm of W is all that counts."""
    torch.manual_seed(0)
    net = TwoSides(sigma).eval()
    weight = net.first.weight.detach()
    if aligned:
        net.v.copy_(torch.linalg.svd(weight).U[:, 0])
    x = torch.rand(60, 1, 4, 4)
    with torch.no_grad():
        net.first.bias.sub_(net.first(x.flatten(1)).mean(0))  # images on both sides
    score = (x.flatten(1) @ weight.T + net.first.bias.detach()) @ net.v
    return InnerSmoothed(net), x, score.abs() / (net.v @ weight).norm()


@pytest.mark.parametrize("aligned", [True, False])
def test_a_certificate_never_exceeds_the_true_distance(aligned: bool) -> None:
    model, x, distance = _model(0.2, aligned)
    found = model.certify(x, n0=50, n=2000, batch_size=500)
    sure = found.prediction >= 0
    assert sure.float().mean() > 0.3
    assert (found.radius <= distance).all()
    with noise_off(model):
        assert torch.equal(found.prediction[sure], model(x).argmax(1)[sure])
    if aligned:  # then the ideal radius is the distance, and only the bound's confidence is lost
        top = float(torch.linalg.matrix_norm(model.net.first.weight.detach(), 2))
        ideal = torch.tensor(normal.cdf(distance * top / 0.2))
        assert ((found.p_lower < ideal) & (ideal - found.p_lower < 0.1))[sure].all()
        torch.testing.assert_close(found.radius, 0.2 / top * torch.tensor(normal.ppf(found.p_lower)) * sure)


def test_noise_in_one_place_of_the_net_is_the_site_that_the_attacks_find() -> None:
    model, x, _ = _model(0.2, aligned=True)
    ((layer, kind, source),) = noise_sites(model)
    assert (layer, kind) == (model.net.first, "output")
    assert float(source.std(x)) == pytest.approx(0.2)
    z: list[Tensor] = []
    model.net.between.register_forward_pre_hook(lambda module, args: z.append(args[0]))
    torch.manual_seed(3)
    model(x)
    with noise_off(model):
        assert torch.equal(model(x), model(x))
    assert float((z[0] - z[1]).detach().std()) == pytest.approx(0.2, rel=0.2)
    assert not torch.equal(model(x), model(x))
    assert model.stochastic
    assert model.smoothed


def test_pixel_noise_is_a_site_too_and_can_be_switched_off() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model, x = Smoothed(net, sigma=0.4), torch.rand(2, 1, 4, 4)
    ((layer, kind, source),) = noise_sites(model)
    assert (layer, kind, source.sigma) == (model, "input", 0.4)
    with noise_off(model):
        assert torch.equal(model(x), net(x))
    assert not torch.equal(model(x), net(x))


def test_the_norm_is_looked_up_until_the_weights_change() -> None:
    model, x, _ = _model(0.2, aligned=False)
    one = model.radius_unit(x)
    assert one == pytest.approx(0.2 / float(torch.linalg.matrix_norm(model.net.first.weight.detach(), 2)))
    assert model.radius_unit(x) == one
    with torch.no_grad():
        model.net.first.weight.mul_(2)
    assert model.radius_unit(x) == pytest.approx(one / 2)


def test_of_several_sites_the_best_certifies() -> None:
    model, x, _ = _model(0.2, aligned=False)
    inner = model.radius_unit(x)
    InputNoise(0.001).attach(model.net)
    assert model.radius_unit(x) == inner
    model.net.noise_input = InputNoise(9.0)
    assert model.radius_unit(x) == 9.0


class Loud(NoiseSource):
    """Noise in proportion to the signal."""

    def std(self, signal: Tensor) -> Tensor:
        return signal.abs().mean()


def test_what_certifies_nothing_says_so() -> None:
    torch.manual_seed(0)
    judge, x = Certify(Threat("Linf", Epsilon(0)), n=100, n0=5), torch.rand(2, 1, 4, 4)
    net = TwoSides(0.2, between=nn.Sequential(nn.ReLU(), nn.Linear(6, 6))).eval()
    assert judge.unsupported_reason(InnerSmoothed(net)) is None
    behind = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    InputNoise(0.2).attach(behind[3], "output")
    model = InnerSmoothed(behind)
    assert judge.unsupported_reason(model) == (
        "the noise on the output of 3 is behind relu; expected only affine steps from the image"
    )
    with pytest.raises(ValueError, match="is behind relu"):
        judge.evaluate(model, x, torch.zeros(2, dtype=torch.int64), Context(0))
    loud = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    Loud().attach(loud[1], "output")
    assert (
        judge.unsupported_reason(InnerSmoothed(loud))
        == "the noise on the output of a Linear has no one standard deviation"
    )
    with pytest.raises(ValueError, match="no noise source"):
        InnerSmoothed(nn.Linear(2, 2))
