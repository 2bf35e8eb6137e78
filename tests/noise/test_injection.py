"""Where a defense injects noise, and what it does to the logits under each covariance structure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.noise import logit_moments as cov
from bench.noise.diagnostics import draw_logits
from bench.noise.injection import InjectionSite, edit_site
from bench.noise.propagation import SiteVariance

SITES: list[InjectionSite] = ["first", "input"]
STRUCTURES = ["jacobian", "diag", "adjoint", "ungated"]

pytestmark = pytest.mark.usefixtures("seeded")


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


def variance(sigma: float) -> list[SiteVariance]:
    return [lambda z: torch.as_tensor(sigma**2)]


@pytest.mark.parametrize("site", SITES)
def test_small_noise_has_the_covariance_of_draws(site: InjectionSite) -> None:
    """Where the net is nearly linear, the jacobian's covariance is that of draws."""
    net, x = Norm().eval(), torch.rand(1, 1, 6, 6)
    closed = cov.logit_moments(net, x, variance(0.01), [site])
    with torch.no_grad():
        logits = draw_logits(net, x, torch.tensor(0.01), site, 40_000)
    truth = torch.cov(logits[:, 0].T)
    torch.testing.assert_close(closed.covariance()[0], truth, rtol=0.05, atol=0.05 * truth.abs().max().item())


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("training", [False, True])
def test_adjoint_equals_the_jacobian(site: InjectionSite, training: bool) -> None:
    net, x = Norm().train(training), torch.rand(4, 1, 6, 6)
    # in training the two structures differ by the noise's own share of the batch variance, so the noise is tiny
    jacobian = cov.logit_moments(net, x, variance(1e-3), [site])
    adjoint = cov.logit_moments(net, x, variance(1e-3), [site], "adjoint")
    torch.testing.assert_close(adjoint.mean, jacobian.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adjoint.covariance(), jacobian.covariance(), rtol=1e-3, atol=1e-11)
    for one, other in zip(jacobian.sites, adjoint.sites, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_noise_at_two_sites_adds_its_variances(structure: Any) -> None:
    net, x = Norm().eval(), torch.rand(3, 1, 6, 6)
    with torch.no_grad():
        separate = [cov.logit_moments(net, x, variance(0.1), [site], structure).covariance() for site in SITES]
        both = cov.logit_moments(net, x, variance(0.1) * 2, SITES, structure).covariance()
    torch.testing.assert_close(both, separate[0] + separate[1], rtol=1e-4, atol=1e-4 * both.abs().max().item())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_growing_first_weights_escape_the_noise(structure: Any) -> None:
    """The scale degeneracy: W1 -> 3 W1, W2 -> W2 / 3 leaves the function alone and divides the noise's effect by 3."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    x, traces = torch.rand(16, 1, 3, 3), []
    with torch.no_grad():
        for _ in range(2):
            covariance = cov.logit_moments(net, x, variance(0.1), structure=structure).covariance()
            traces.append(covariance.diagonal(dim1=1, dim2=2).sum().item())
            net[1].weight *= 3
            net[3].weight /= 3
    assert traces[1] / traces[0] == pytest.approx(1 / 9, rel=1e-4)


def test_the_image_is_edited_in_every_pass() -> None:
    net, seen = Norm().eval(), []

    def note(z: Tensor) -> Tensor:
        seen.append(tuple(z.shape))
        return z + 1

    x = torch.rand(2, 1, 6, 6)
    with edit_site(net, "input", note):
        net(x)
        edited = net(x)
    assert seen == [(2, 1, 6, 6)] * 2
    torch.testing.assert_close(edited, net(x + 1))
    assert len(seen) == 2


@pytest.mark.parametrize("structure", ["jacobian", "adjoint"])
def test_a_net_without_a_first_layer_is_named(structure: Any) -> None:
    with pytest.raises(ValueError, match=r"Sequential has no Conv2d or Linear layer .*; use site=input"):
        cov.logit_moments(nn.Sequential(nn.Flatten()), torch.rand(2, 1, 2, 2), variance(1.0), structure=structure)


def test_ungated_is_the_product_of_the_weights() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    moments = cov.logit_moments(net, torch.rand(2, 1, 3, 3), variance(0.5), structure="ungated")
    product = net[5].weight @ net[3].weight
    torch.testing.assert_close(moments.covariance(), 0.25 * (product @ product.T).expand(2, 3, 3))


def test_draws_of_a_linear_net_have_its_covariance() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        logits = draw_logits(net, torch.rand(2, 1, 2, 2), torch.tensor(0.7), draws=20_000)
    for image in range(2):
        torch.testing.assert_close(torch.cov(logits[:, image].T), 0.49 * torch.eye(3), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_buffers_move_once_by_the_noise_free_pass(structure: Any) -> None:
    net, plain = Norm().train(), Norm().train()
    plain.load_state_dict(net.state_dict())
    x = torch.rand(8, 1, 6, 6)
    cov.logit_moments(net, x, variance(0.5), ["first"], structure)
    plain(x)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, msg=name)
