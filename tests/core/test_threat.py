"""The threat model: projection, directions and the feasibility check."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.core.epsilon import Epsilon
from bench.core.threat import NORMS, Norm, Threat

NORM = st.sampled_from(NORMS)
EPS = st.sampled_from(["8/255", "0.031", "0.5", "3"])


@settings(max_examples=60, deadline=None)
@given(norm=NORM, eps=EPS, seed=st.integers(0, 2**20), scale=st.sampled_from([0.0, 0.01, 1.0, 100.0]))
def test_projection_lands_in_the_ball_and_stays(norm: Norm, eps: str, seed: int, scale: float) -> None:
    threat = Threat(norm, Epsilon(eps))
    delta = scale * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    once = threat.project(delta)
    assert (threat.norm_of(once) <= threat.radius * (1 + 1e-9)).all()
    torch.testing.assert_close(threat.project(once), once, rtol=0, atol=1e-9)
    inside = threat.norm_of(delta) <= threat.radius
    torch.testing.assert_close(once[inside], delta[inside])


@settings(max_examples=40, deadline=None)
@given(norm=NORM, eps=EPS, seed=st.integers(0, 2**20))
def test_projection_is_the_nearest_point(norm: Norm, eps: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    threat = Threat(norm, Epsilon(eps))
    delta = 2 * torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64)
    nearest = threat.project(delta)
    other = threat.project(torch.randn(4, 1, 3, 3, generator=generator, dtype=torch.float64))
    far = (delta - other).flatten(1).norm(dim=1)
    assert ((delta - nearest).flatten(1).norm(dim=1) <= far + 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(norm=NORM, eps=EPS, seed=st.integers(0, 2**20))
def test_feasible_points_pass_the_check(norm: Norm, eps: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    threat = Threat(norm, Epsilon(eps))
    x = torch.rand(5, 3, 6, 6, generator=generator).round(decimals=1)
    found = threat.project_to_image(x, x + torch.randn(x.shape, generator=generator))
    assert (threat.check(x, found) <= threat.radius + 1e-6).all()


@pytest.mark.parametrize("pixels", [784, 3072, 150_528])
@pytest.mark.parametrize("eps", ["2", "12", "255"])
def test_rounding_does_not_leave_a_wide_l1_ball(pixels: int, eps: str) -> None:
    # differences on the grid of float32 less one threshold round the same way everywhere: 3e-5 beyond eps at 3072
    threat, generator = Threat("L1", Epsilon(eps)), torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(2, 1, 1, pixels, generator=generator)
    for spread in (0.002, 0.008, 0.1):
        moved = x + 0.001 + spread * torch.randn(x.shape, generator=generator)
        size = threat.check(x, threat.project_to_image(x, moved))
        outside = threat.norm_of(moved.double() - x.double()) > threat.radius
        torch.testing.assert_close(size[outside], torch.full_like(size[outside], threat.radius), rtol=2e-3, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_samples_and_directions(norm: Norm) -> None:
    threat = Threat(norm, Epsilon("0.3"))
    torch.manual_seed(0)
    x = torch.rand(50, 1, 5, 5, dtype=torch.float64)
    assert (threat.norm_of(threat.sample(x)) <= 0.3 + 1e-12).all()
    grad = torch.randn_like(x)
    step = threat.steepest_direction(grad)
    torch.testing.assert_close(threat.norm_of(step), torch.ones(50, dtype=torch.float64))
    # steepest ascent: its slope is the dual norm of the gradient, which no other unit step exceeds
    torch.testing.assert_close((step * grad).flatten(1).sum(1), threat.dual_norm(grad))
    rival = threat.steepest_direction(torch.randn_like(x))
    assert ((rival * grad).flatten(1).sum(1) <= threat.dual_norm(grad) + 1e-12).all()
    assert (threat.steepest_direction(torch.zeros_like(x)) == 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-8, 1e-12, 1e-30])  # the square of the last one is 0 in float32
def test_a_vanishing_gradient_has_the_direction_of_a_large_one(norm: Norm, scale: float) -> None:
    threat = Threat(norm, Epsilon("0.3"))
    torch.manual_seed(0)
    grad = torch.randn(6, 2, 5, 5)
    torch.testing.assert_close(threat.steepest_direction(scale * grad), threat.steepest_direction(grad))


def test_check_tells_the_worst_numbers() -> None:
    threat = Threat("Linf", Epsilon("8/255"))
    x = torch.full((2, 1, 2, 2), 0.5)
    with pytest.raises(ValueError, match=r"leave the Linf ball: 0\.1 > eps 0\.0313725"):
        threat.check(x, x + 0.1)
    with pytest.raises(ValueError, match=r"pixel box \[0,1\]: min -0\.01"):
        threat.check(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), -0.01))
    with pytest.raises(ValueError, match="NaN"):
        threat.check(x, x * float("nan"))
    with pytest.raises(ValueError, match="shape"):
        threat.check(x, x[:1])


@pytest.mark.parametrize("norm", NORMS)
def test_check_allows_rounding_and_not_a_thousandth_of_eps(norm: Norm) -> None:
    threat, x = Threat(norm, Epsilon("0.2")), torch.full((3, 1, 2, 2), 0.5, dtype=torch.float64)
    edge = threat.radius * threat.steepest_direction(
        torch.tensor([1.0, 2.0, -3.0, 4.0]).double().expand(3, 4).view(x.shape)
    )
    threat.check(x, x + (1 + 1e-6) * edge)
    with pytest.raises(ValueError, match=f"leave the {norm} ball"):
        threat.check(x, x + 1.001 * edge)


def test_warm_up_scales_the_ball() -> None:
    threat = Threat("L2", Epsilon("0.5"))
    assert threat.scaled(0.5).radius == pytest.approx(0.25)
    assert threat.scaled(2) is threat
    assert threat.scaled(-1).radius == 0
    assert str(Threat("Linf", Epsilon("8/255"))) == "Linf 8/255"
