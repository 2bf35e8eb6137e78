"""Noise at several sites, behind BatchNorm and relative to the signal: where it enters and what it does to logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.noise import logit_moments as cov
from bench.noise.injection import Site, edit_sites, signal_scale

PLACES: list[tuple[list[Site], bool]] = [
    *[(sites, False) for sites in (["input"], ["first"], [1], ["input", 1], [0, 1], [2, 0])],  # type: ignore[list-item]
    *[(sites, True) for sites in (["first"], [1], [0, 1])],  # type: ignore[list-item]
]
STRUCTURES = ["jacobian", "diag", "adjoint", "ungated", "sampled"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Norm(nn.Module):
    """conv - BatchNorm - ReLU - conv - BatchNorm - ReLU - head, with one convolution registered out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        with torch.no_grad():
            for bn in (self.bn1, self.bn2):
                bn.weight.uniform_(0.5, 1.5)
                bn.running_var.uniform_(0.2, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(self.first(x)))
        z = F.relu(self.bn2(self.second(z)))
        return self.head(z.mean((2, 3)))


def variances(*sigmas: float) -> list[cov.SiteVariance]:
    return [lambda z, s=s: torch.as_tensor(s**2) for s in sigmas]  # type: ignore[misc]


def drawn(net: nn.Module, x: Tensor, sigmas: list[float], sites: list[Site], post_bn: bool) -> Tensor:
    """Covariance of the logits of one image over 40 000 draws."""
    with torch.no_grad():
        logits, _ = cov.draw_logits(net, x, variances(*sigmas), sites, 40_000, post_bn)
    return torch.cov(logits[:, 0].T)


@pytest.mark.parametrize(("sites", "post_bn"), PLACES, ids=str)
def test_small_noise_has_the_covariance_of_draws(sites: list[Site], post_bn: bool) -> None:
    """Where the net is nearly linear, the jacobian's covariance is that of draws at all sites together."""
    net, x = Norm().eval(), torch.rand(1, 1, 6, 6)
    sigmas = [0.01 * (place + 1) for place in range(len(sites))]
    closed = cov.logit_moments(net, x, variances(*sigmas), sites, post_bn=post_bn)
    truth = drawn(net, x, sigmas, sites, post_bn)
    torch.testing.assert_close(closed.covariance()[0], truth, rtol=0.05, atol=0.05 * truth.abs().max().item())


@pytest.mark.parametrize(("sites", "post_bn"), PLACES, ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_adjoint_equals_the_jacobian_at_any_sites(sites: list[Site], training: bool, post_bn: bool) -> None:
    net, x = Norm().train(training), torch.rand(4, 1, 6, 6)
    # in training the two structures differ by the noise's own share of the batch variance, so the noise is tiny
    sigmas = variances(*[1e-3 * (place + 1) for place in range(len(sites))])
    jacobian = cov.logit_moments(net, x, sigmas, sites, post_bn=post_bn)
    adjoint = cov.logit_moments(net, x, sigmas, sites, "adjoint", post_bn=post_bn)
    torch.testing.assert_close(adjoint.mean, jacobian.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adjoint.covariance(), jacobian.covariance(), rtol=1e-3, atol=1e-11)
    for one, other in zip(jacobian.sites, adjoint.sites, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_noise_at_two_sites_adds_its_variances(structure: Any) -> None:
    net, x = Norm().eval(), torch.rand(3, 1, 6, 6)
    with torch.no_grad():
        apart = [
            cov.logit_moments(net, x, variances(0.1), [site], structure, draws=4000).covariance() for site in (0, 1)
        ]
        both = cov.logit_moments(net, x, variances(0.1, 0.1), [0, 1], structure, draws=4000).covariance()
    tolerance = 0.2 if structure == "sampled" else 1e-4
    torch.testing.assert_close(both, apart[0] + apart[1], rtol=tolerance, atol=tolerance * both.abs().max().item())


def test_behind_batchnorm_its_scale_does_not_reach_the_noise() -> None:
    net, x = Norm().eval(), torch.rand(3, 1, 6, 6)
    before = [cov.logit_moments(net, x, variances(0.5), post_bn=post_bn).covariance() for post_bn in (False, True)]
    with torch.no_grad():
        net.bn1.weight *= 3
        net.second.weight /= 3
        net.bn1.bias *= 3
    after = [cov.logit_moments(net, x, variances(0.5), post_bn=post_bn).covariance() for post_bn in (False, True)]
    torch.testing.assert_close(after[0], before[0], rtol=1e-3, atol=1e-7)  # before BatchNorm it grows with the signal
    torch.testing.assert_close(after[1], before[1] / 9, rtol=1e-3, atol=1e-7)


def test_relative_noise_follows_each_channel_and_has_no_gradient() -> None:
    z = torch.randn(64, 3, 8, 8) * torch.tensor([0.5, 1.0, 4.0])[:, None, None]
    z.requires_grad_()
    scale = signal_scale(z, "relative")
    torch.testing.assert_close(scale.flatten(), torch.tensor([0.5, 1.0, 4.0]), rtol=0.05, atol=0)
    assert not scale.requires_grad
    assert signal_scale(torch.randn(9, 5), "relative").shape == (1, 5)
    assert signal_scale(z, "absolute") == 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_growing_first_weights_escape_absolute_noise_but_not_relative(structure: Any) -> None:
    """The scale degeneracy: W1 -> 3 W1, W2 -> W2 / 3 leaves the function alone and divides absolute noise by 3."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    x, found = torch.rand(16, 1, 3, 3), {}
    for unit in ("absolute", "relative"):
        traces = []
        for _ in range(2):
            torch.manual_seed(2)
            with torch.no_grad():
                noise: list[cov.SiteVariance] = [lambda z, u=unit: (0.1 * signal_scale(z, u)).square()]  # type: ignore[misc]
                moments = cov.logit_moments(net, x, noise, structure=structure)
                traces.append(moments.covariance().diagonal(dim1=1, dim2=2).sum().item())
                net[1].weight *= 3
                net[3].weight /= 3
        with torch.no_grad():
            net[1].weight /= 9
            net[3].weight *= 9
        found[unit] = traces[1] / traces[0]
    loose = 0.05 if structure == "sampled" else 1e-4  # gates of draws differ
    assert found["relative"] == pytest.approx(1, rel=loose)
    assert found["absolute"] == pytest.approx(1 / 9, rel=max(loose, 0.3 if structure == "sampled" else 0))


def test_editing_reaches_layers_in_running_order_in_every_pass() -> None:
    net, seen = Norm().eval(), []

    def note(place: int, z: Tensor) -> Tensor:
        seen.append((place, tuple(z.shape)))
        return z + 1

    x = torch.rand(2, 1, 6, 6)
    with edit_sites(net, [2, "input", 1], note):
        net(x)
        edited = net(x)
    assert seen == [(1, (2, 1, 6, 6)), (2, (2, 4, 6, 6)), (0, (2, 3))] * 2
    z = F.relu(net.bn1(net.first(x + 1)))
    z = F.relu(net.bn2(net.second(z) + 1))
    torch.testing.assert_close(edited, net.head(z.mean((2, 3))) + 1)
    net(x)
    assert len(seen) == 6


@pytest.mark.parametrize("structure", ["jacobian", "adjoint", "sampled"])
@pytest.mark.parametrize(
    ("sites", "post_bn", "message"),
    [
        ([3], False, "site 3, but Norm runs 3 convolution and linear layers; expected 0 to 2"),
        ([0, 2], True, "no BatchNorm takes the output of layer 2 of Norm"),
    ],
)
def test_a_site_that_is_not_there_is_named(structure: Any, sites: list[Site], post_bn: bool, message: str) -> None:
    noise = variances(*[1.0] * len(sites))
    with pytest.raises(ValueError, match=message):
        cov.logit_moments(Norm().eval(), torch.rand(2, 1, 6, 6), noise, sites, structure, post_bn=post_bn)


def test_ungated_is_the_product_of_the_weights() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    moments = cov.logit_moments(net, torch.rand(2, 1, 3, 3), variances(0.5), structure="ungated")
    product = net[5].weight @ net[3].weight
    torch.testing.assert_close(moments.covariance(), 0.25 * (product @ product.T).expand(2, 3, 3))


def test_draws_of_a_linear_net_have_its_covariance_and_gradient() -> None:
    """Unbiased covariance over draws, and a gradient in sigma through the reparameterisation."""
    net, sigma = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.tensor(0.7, requires_grad=True)
    noise: list[cov.SiteVariance] = [lambda z: sigma.square()]
    moments = cov.logit_moments(net, torch.rand(2, 1, 2, 2), noise, structure="sampled", draws=20_000)
    torch.testing.assert_close(moments.covariance(), 0.49 * torch.eye(3).expand(2, 3, 3), rtol=0.05, atol=0.02)
    (slope,) = torch.autograd.grad(moments.covariance().diagonal(dim1=1, dim2=2).sum(1).mean(), sigma)
    assert slope.item() == pytest.approx(2 * 0.7 * 3, rel=0.05)
    with pytest.raises(ValueError, match="at least 2 draws"):
        cov.logit_moments(net, torch.rand(2, 1, 2, 2), noise, structure="sampled", draws=1)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_buffers_move_once_by_the_noise_free_pass(structure: Any) -> None:
    net, plain = Norm().train(), Norm().train()
    plain.load_state_dict(net.state_dict())
    x = torch.rand(8, 1, 6, 6)
    cov.logit_moments(net, x, variances(0.5, 0.5), [0, 1], structure)
    plain(x)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, msg=name)
