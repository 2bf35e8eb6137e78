"""Moment rules and covariance structures against Monte Carlo, autograd and finite differences."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import lenet5, resnet_cifar
from bench.models.common import Inputs
from bench.noise import layer_moments as mo
from bench.noise import logit_moments as cov
from bench.noise import losses as ex
from bench.noise import max_pooling as pooling
from bench.noise import propagation as prop
from bench.noise.injection import InjectionSite, edit_site
from bench.noise.layer_moments import Moments

DRAWS = 200_000

pytestmark = pytest.mark.usefixtures("seeded")


def gaussian(shape: tuple[int, ...], spread: float = 1.0) -> Moments:
    return Moments(torch.randn(shape), spread * (0.2 + torch.rand(shape)))


def sampled(x: Moments, layer: Callable[[Tensor], Tensor], draws: int = DRAWS) -> Moments:
    """Mean and variance of a layer's output over independent draws of its one-sample input."""
    with torch.no_grad():
        out = layer(x.mean + x.var.sqrt() * torch.randn(draws, *x.mean.shape[1:]))
    return Moments(out.mean(0, keepdim=True), out.var(0, keepdim=True))


def assert_moments(step: mo.Step, expected: Moments, tolerance: float = 0.02) -> None:
    torch.testing.assert_close(step.out.mean, expected.mean, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(step.out.var, expected.var, atol=tolerance, rtol=tolerance)


def assert_transpose(step: mo.Step, x: Moments, mean_of: Callable[[Tensor], Tensor]) -> None:
    """The pull of several rows equals the vector-Jacobian products of the map `mean_of` at the mean."""
    rows = torch.randn(3, *step.out.mean.shape)
    point = x.mean.clone().requires_grad_()
    expected = [torch.autograd.grad(mean_of(point), point, row)[0] for row in rows]
    torch.testing.assert_close(step.pulls[0](rows), torch.stack(expected), atol=1e-5, rtol=1e-5)


class Doubled(nn.Module):
    """Arithmetic on constants as a normalization layer has it, and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.register_buffer("shift", torch.rand(1, 3, 1, 1))
        self.register_buffer("spread", 0.5 + torch.rand(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        z = 3 - (2 * ((z - self.shift) / self.spread) * 0.5 + 1)
        return z.mean((2, 3)).view(x.size(0), -1)


class Residual(nn.Module):
    """A skip over BatchNorm, ReLU and convolution, then pools; the head's weight is registered first on purpose."""

    def __init__(self, classes: int = 4, norm: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(6, classes)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.bn = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        if norm:
            with torch.no_grad():
                self.bn.weight.uniform_(0.5, 1.5)
                self.bn.bias.normal_()

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        z = z + self.second(F.relu(self.bn(z)))
        z = self.pool(self.relu(z))
        return self.head(F.adaptive_avg_pool2d(z, 1).flatten(1))


def mlp(width: int = 48, classes: int = 4) -> nn.Sequential:
    layers = [nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)]
    return nn.Sequential(nn.Flatten(), *layers)


def images(n: int = 5, size: int = 6) -> Tensor:
    return torch.rand(n, 1, size, size)


def constant(sigma: float) -> list[cov.SiteVariance]:
    return [lambda z: torch.as_tensor(sigma**2, dtype=z.dtype)]


# Element-wise rules


@pytest.mark.parametrize("m", [-3.0, -0.7, 0.0, 0.4, 2.5, 5.8, 9.0])
@pytest.mark.parametrize("v", [0.05, 1.0, 4.0])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-1.0, 1.0)])
def test_exact_clip_equals_sampling(m: float, v: float, low: float, high: float) -> None:
    x = Moments(torch.tensor([[m]]), torch.tensor([[v]]))
    step = mo.clip(x, low, high, "adf")
    assert_moments(step, sampled(x, lambda z: z.clamp(low, high), 400_000), 0.015)
    torch.testing.assert_close(
        step.out.mean.float(), mo.clip(Moments(*(t.double() for t in x)), low, high, "adf").out.mean.float()
    )


def test_clip_with_a_far_upper_bound_is_relu() -> None:
    x = gaussian((3, 4, 5))
    for rule in ("laplace", "adf", "ungated"):
        one, other = mo.clip(x, 0.0, 1e3, rule), mo.relu(x, rule)  # type: ignore[arg-type]
        torch.testing.assert_close(one.out.mean, other.out.mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one.out.var, other.out.var, atol=1e-6, rtol=1e-4)


def test_gelu_by_quadrature_has_the_mean_in_closed_form() -> None:
    """E[z Phi(z)] = m Phi(a) + v / sqrt(1 + v) phi(a) with a = m / sqrt(1 + v) (derived); 9 nodes come within 1e-3."""
    x = Moments(torch.linspace(-4, 4, 33)[None], 0.5 + torch.rand(1, 33))
    a = x.mean / (1 + x.var).sqrt()
    density = torch.exp(-a.square() / 2) / math.sqrt(2 * math.pi)
    exact = x.mean * torch.special.ndtr(a) + x.var / (1 + x.var).sqrt() * density
    torch.testing.assert_close(mo.smooth(x, F.gelu, "adf").out.mean, exact, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("function", [F.gelu, F.silu, torch.tanh, torch.sigmoid, F.softplus])
def test_smooth_activations_equal_sampling(function: Callable[[Tensor], Tensor]) -> None:
    x = gaussian((1, 12))
    step = mo.smooth(x, function, "adf")
    assert_moments(step, sampled(x, function, 400_000), 0.01)
    draws = (x.mean + x.var.sqrt() * torch.randn(400_000, 12)).requires_grad_()
    (slopes,) = torch.autograd.grad(function(draws).sum(), draws)
    torch.testing.assert_close(
        step.pulls[0](torch.ones(1, 1, 12))[0], slopes.mean(0, keepdim=True), atol=0.01, rtol=0.01
    )


@pytest.mark.parametrize("function", [F.gelu, torch.tanh])
def test_smooth_activations_without_noise_are_the_activation(function: Callable[[Tensor], Tensor]) -> None:
    x = Moments(torch.randn(2, 6), torch.zeros(2, 6))
    for rule in ("laplace", "adf"):
        step = mo.smooth(x, function, rule)  # type: ignore[arg-type]
        torch.testing.assert_close(step.out.mean, function(x.mean), atol=1e-6, rtol=1e-5)
        assert_transpose(step, x, function)
    assert mo.smooth(x, function, "ungated").pulls[0](x.mean) is x.mean


def test_a_net_of_relu6_and_gelu_propagates() -> None:
    """Modules and functions alike, as MobileNet and transformers have them; small noise has the jacobian's variance."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(9, 8), nn.Linear(8, 7), nn.Linear(7, 6), nn.Linear(6, 3)])
            self.relu6, self.gelu = nn.ReLU6(), nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            z = self.relu6(self.layers[0](x.flatten(1)))
            z = F.gelu(self.layers[1](z), approximate="tanh")
            z = torch.tanh(self.gelu(F.relu6(self.layers[2](z))))
            return self.layers[3](z)

    net, x = Both(), torch.rand(4, 1, 3, 3)
    truth = cov.logit_moments(net, x, constant(0.01)).covariance()
    for rule in ("laplace", "adf"):
        found = cov.logit_moments(net, x, constant(0.01), structure="adjoint", rule=rule)  # type: ignore[arg-type]
        torch.testing.assert_close(found.covariance(), truth, rtol=0.05, atol=0.05 * truth.abs().max().item())
        torch.testing.assert_close(found.mean, net(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("m", [-3.0, -0.7, 0.0, 0.4, 2.5])
@pytest.mark.parametrize("v", [0.05, 1.0, 4.0])
def test_exact_relu_equals_sampling(m: float, v: float) -> None:
    x = Moments(torch.tensor([[m]]), torch.tensor([[v]]))
    assert_moments(mo.relu(x, "adf"), sampled(x, F.relu, 400_000), 0.015)


def test_exact_relu_stays_accurate_and_differentiable_in_the_tails() -> None:
    a = torch.tensor([[-12.0, -6.0, -4.0, 6.0, 30.0]])
    x = Moments(a.clone().requires_grad_(), torch.ones_like(a).requires_grad_())
    out = mo.relu(x, "adf").out
    wide = mo.relu(Moments(a.double(), torch.ones_like(a).double()), "adf").out
    torch.testing.assert_close(out.mean.double(), wide.mean, atol=1e-9, rtol=1e-3)
    torch.testing.assert_close(out.var.double(), wide.var, atol=1e-8, rtol=1e-4)
    for grad in torch.autograd.grad((out.mean + out.var).sum(), x):
        assert torch.isfinite(grad).all()


def test_laplace_relu_keeps_the_noise_free_mean_and_gates_the_variance() -> None:
    step = mo.relu(Moments(torch.tensor([[-1.0, 2.0]]), torch.tensor([[3.0, 5.0]])), "laplace")
    assert step.out.mean.tolist() == [[0.0, 2.0]]
    assert step.out.var.tolist() == [[0.0, 5.0]]
    assert step.innovation is None


def test_relu_variance_is_what_the_gate_carries_plus_the_innovation() -> None:
    x = gaussian((2, 50))
    step = mo.relu(x, "adf")
    assert step.innovation is not None
    gate = step.pulls[0](torch.ones(1, 2, 50))[0]
    torch.testing.assert_close(gate.square() * x.var + step.innovation, step.out.var)
    torch.testing.assert_close(gate, (1 + torch.erf(x.mean / (2 * x.var).sqrt())) / 2)


@pytest.mark.parametrize(("m1", "m2"), [(0.0, 0.0), (1.0, -0.5), (-2.0, 1.0)])
def test_clark_maximum_equals_sampling(m1: float, m2: float) -> None:
    draws = torch.randn(1_000_000, 2) * torch.tensor([1.0, 0.5]).sqrt() + torch.tensor([m1, m2])
    a = Moments(torch.tensor(m1), torch.tensor(1.0))
    out, weight = pooling.clark_max(a, Moments(torch.tensor(m2), torch.tensor(0.5)))
    largest = draws.amax(1)
    assert out.mean == pytest.approx(largest.mean().item(), abs=0.005)
    assert out.var == pytest.approx(largest.var().item(), abs=0.01)
    assert weight == pytest.approx((draws[:, 0] > draws[:, 1]).float().mean().item(), abs=0.003)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2}])
def test_convolution(options: dict[str, int]) -> None:
    layer, x = nn.Conv2d(2, 4, 3, **options), gaussian((1, 2, 6, 6))
    step = mo.weighted(x, layer)
    assert_moments(step, sampled(x, layer, 40_000), 0.03)
    assert_transpose(step, x, layer)


def test_linear() -> None:
    layer, x = nn.Linear(7, 3), gaussian((1, 7))
    step = mo.weighted(x, layer)
    assert_moments(step, sampled(x, layer))
    assert_transpose(step, x, layer)


LINEAR_LAYERS = {
    "avg": nn.Sequential(nn.AvgPool2d(2)),
    "avg_overlapping": nn.Sequential(nn.AvgPool2d(3, 1)),
    "adaptive": nn.Sequential(nn.AdaptiveAvgPool2d(1)),
    "adaptive_2": nn.Sequential(nn.AdaptiveAvgPool2d((2, 3))),
    "flatten": nn.Sequential(nn.Flatten()),
    "norm": nn.Sequential(nn.BatchNorm2d(2, eps=0.3)),
    "dropout": nn.Sequential(nn.Dropout(0.5)),
}


@pytest.mark.parametrize("name", LINEAR_LAYERS)
def test_linear_layers_through_the_graph(name: str) -> None:
    """With noise at the input and a single layer, site and output are the layer's own."""
    net, x = LINEAR_LAYERS[name].eval(), gaussian((1, 2, 6, 6))
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean, norm.running_var = torch.tensor([0.5, -1.0]), torch.tensor([0.25, 3.0])
        norm.weight.data, norm.bias.data = torch.tensor([2.0, -0.5]), torch.tensor([0.1, 0.2])
    run = prop.propagate(net, x.mean, [lambda z: x.var], ["input"])
    step = run.steps[0][2]
    assert_moments(step, sampled(x, net, 40_000), 0.03)
    assert_transpose(step, x, net)


@pytest.mark.parametrize(("kernel", "size", "tolerance"), [(2, 4, 0.12), (2, 5, 0.12), (3, 7, 0.3)])
def test_exact_max_pool_equals_sampling(kernel: int, size: int, tolerance: float) -> None:
    """A maximum of many is not Gaussian, so a tournament of nine is rougher than one of four."""
    x = gaussian((1, 2, size, size), 2.0)
    step = pooling.max_pool2d(x, kernel, rule="adf")
    expected = sampled(x, nn.MaxPool2d(kernel), 40_000)
    torch.testing.assert_close(step.out.mean, expected.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(step.out.var, expected.var, atol=0, rtol=tolerance)
    assert step.innovation is not None
    carried = step.pulls[0](torch.ones(1, *step.out.mean.shape))[0]
    assert carried.shape == x.mean.shape
    torch.testing.assert_close(F.avg_pool2d(carried, kernel) * kernel**2, torch.ones_like(step.out.mean))
    explained = F.avg_pool2d(carried.square() * x.var, kernel) * kernel**2
    torch.testing.assert_close(explained + step.innovation, step.out.var)


def test_exact_max_pool_of_a_pair_has_clark_weights() -> None:
    x = gaussian((2, 1, 3, 4))
    step = pooling.max_pool2d(x, (1, 2), rule="adf")
    assert_transpose(step, x, lambda mean: pooling.max_pool2d(Moments(mean, x.var), (1, 2), rule="adf").out.mean)


@pytest.mark.parametrize("window", [(2, None, 0), (3, 2, 1)])
def test_laplace_max_pool_selects(window: tuple[int, int | None, int]) -> None:
    x = gaussian((2, 3, 7, 7))
    step = pooling.max_pool2d(x, *window, rule="laplace")
    torch.testing.assert_close(step.out.mean, F.max_pool2d(x.mean, *window))
    assert step.out.var[0, 0, 1, 1] in x.var[0, 0]
    chosen = x.mean.flatten() == step.out.mean[1, 2, 1, 1]
    assert x.var.flatten()[chosen].item() == step.out.var[1, 2, 1, 1].item()
    assert_transpose(step, x, lambda mean: F.max_pool2d(mean, *window))


def test_training_batch_norm_uses_the_total_variance_and_moves_no_buffer() -> None:
    x, layer = gaussian((4, 3, 2, 2), 2.0), nn.BatchNorm2d(3)
    layer.weight.data.uniform_(0.5, 2.0)
    before = copy.deepcopy(layer.state_dict())
    out = mo.batch_norm(x, layer).out
    torch.testing.assert_close(dict(layer.state_dict()), dict(before))
    draws = 20_000  # the draws stand in one batch, so its statistics are those of images and noise together
    with torch.no_grad():
        noisy = layer((x.mean + x.var.sqrt() * torch.randn(draws, *x.mean.shape)).flatten(0, 1))
    noisy = noisy.unflatten(0, (draws, 4))
    torch.testing.assert_close(out.mean, noisy.mean(0), atol=0.04, rtol=0.02)
    torch.testing.assert_close(out.var, noisy.var(0), atol=0.02, rtol=0.05)


def test_sums_add_variances_and_signs_reach_the_rows() -> None:
    a, b, rows = gaussian((2, 3)), gaussian((2, 3)), torch.randn(4, 2, 3)
    step = mo.add(a, b, -1.0)
    torch.testing.assert_close(step.out.mean, a.mean - b.mean)
    torch.testing.assert_close(step.out.var, a.var + b.var)
    torch.testing.assert_close(step.pulls[0](rows), rows)
    torch.testing.assert_close(step.pulls[1](rows), -rows)
    step = mo.add(torch.full((3,), 5.0), b, -1.0)
    torch.testing.assert_close(step.out, Moments(5 - b.mean, b.var))
    torch.testing.assert_close(step.pulls[0](rows), -rows)


# The graph


def test_constants_and_means_in_the_graph() -> None:
    net, x = Doubled(), images(2)
    expected = torch.diag(0.49 / net.spread.flatten() ** 2 / 36).expand(2, 3, 3)
    for structure in ("diag", "adjoint"):
        moments = cov.logit_moments(net, x, constant(0.7), structure=structure)  # type: ignore[arg-type]
        torch.testing.assert_close(moments.mean, net(x))
        torch.testing.assert_close(moments.covariance(), expected)


def test_the_graph_pools_before_it_rectifies() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1)

    net, x = Plain(), images(3)
    pooled = prop.propagate(net, x, constant(0.6), rule="adf").logits
    z = net.conv(x)
    right = mo.relu(pooling.max_pool2d(Moments(z, torch.full_like(z, 0.36)), 2, rule="adf").out, "adf").out
    torch.testing.assert_close(pooled, Moments(right.mean.flatten(1), right.var.flatten(1)))
    torch.testing.assert_close(prop.propagate(net, x, constant(0.6)).logits.mean, net(x))


def test_an_unknown_layer_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Softmax(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"no moment rule for call_module _1 \(Softmax"):
        prop.propagate(net, images(), constant(1.0))


def test_a_net_without_a_layer_has_no_first_site() -> None:
    for structure in ("jacobian", "diag"):
        with pytest.raises(ValueError, match="no Conv2d or Linear"):
            cov.logit_moments(nn.Flatten(), images(), constant(1.0), structure=structure)  # type: ignore[arg-type]


def test_exact_pooling_refuses_overlapping_windows() -> None:
    with pytest.raises(ValueError, match="disjoint"):
        pooling.max_pool2d(gaussian((1, 1, 5, 5)), 3, 2, rule="adf")


def test_kept_graphs_die_with_their_network() -> None:
    net = mlp()
    prop.propagate(net, images(size=4), constant(1.0))
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


# Covariance structures


def autograd_covariance(net: nn.Module, layer: nn.Module, x: Tensor, sigma: float) -> Tensor:
    """sigma^2 J J^T by torch.func on the layers behind `layer`, sample by sample."""
    found = []
    for image in x:
        parts: list[Tensor] = []
        handle = layer.register_forward_hook(lambda m, a, z, parts=parts: parts.append(z.detach()))
        net(image[None])
        handle.remove()

        def rest(z: Tensor, image: Tensor = image) -> Tensor:
            hook = layer.register_forward_hook(lambda m, a, out: z)
            logits = net(image[None])[0]
            hook.remove()
            return logits

        jacobian = torch.func.jacrev(rest)(parts[0]).flatten(1)
        found.append(sigma**2 * jacobian @ jacobian.T)
    return torch.stack(found)


def test_jacobian_structure_equals_autograd() -> None:
    net, x = Residual(norm=False).eval(), images(3)
    expected = autograd_covariance(net, net.first, x, 0.7)
    moments = cov.logit_moments(net, x, constant(0.7))
    torch.testing.assert_close(moments.mean, net(x))
    torch.testing.assert_close(moments.covariance(), expected)
    torch.testing.assert_close(moments.sites[0], net.first(x))


@pytest.mark.parametrize("site", ["first", "input"])
def test_laplace_adjoint_equals_the_jacobian(site: InjectionSite) -> None:
    """Skips, BatchNorm, in-place ReLU and pools: explicit recursion and autograd must agree to rounding."""
    net, x = Residual().eval(), images(4)
    jacobian = cov.logit_moments(net, x, constant(0.7), [site])
    adjoint = cov.logit_moments(net, x, constant(0.7), [site], "adjoint")
    torch.testing.assert_close(adjoint.mean, jacobian.mean)
    torch.testing.assert_close(adjoint.covariance(), jacobian.covariance())


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "softplus"])
@pytest.mark.parametrize("build", [lenet5.build, partial(resnet_cifar.build, depth=8, width=2)])
def test_every_activation_of_the_models_has_its_rules(build: Callable[..., nn.Module], activation: str) -> None:
    """Slopes of the recursion are those of autograd, without slopes the variance is another, and exact moments run."""
    net = build(Inputs(1, 16, 4, (0.5,), (0.5,)), activation=activation).eval()
    x = torch.rand(3, 1, 16, 16)
    jacobian = cov.logit_moments(net, x, constant(0.7))
    adjoint = cov.logit_moments(net, x, constant(0.7), ["first"], "adjoint")
    torch.testing.assert_close(adjoint.mean, net(x))
    torch.testing.assert_close(adjoint.covariance(), jacobian.covariance(), atol=1e-5, rtol=1e-3)
    literal = cov.logit_moments(net, x, constant(0.7), ["first"], "ungated").covariance()
    assert (literal.diagonal(0, 1, 2) > 1.01 * jacobian.covariance().diagonal(0, 1, 2)).any()
    exact = cov.logit_moments(net, x, constant(0.7), ["first"], "diag", "adf")
    assert not torch.allclose(exact.mean, net(x), atol=1e-5)


def fitted_mlp() -> tuple[nn.Sequential, Tensor]:
    """An MLP with some structure in its weights: 60 steps of Adam on a toy problem."""
    net, x = mlp(), torch.rand(256, 1, 4, 4)
    y = (x.flatten(1)[:, :4]).argmax(1)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), x[:6]


@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.5])
def test_adjoint_trace_is_within_three_percent_of_sampling(sigma: float) -> None:
    net, x = fitted_mlp()
    draws = 40_000
    with torch.no_grad(), edit_site(net, "first", lambda z: z + sigma * torch.randn_like(z)):
        logits = net(x.repeat(draws, 1, 1, 1)).unflatten(0, (draws, len(x)))
    moments = cov.logit_moments(net, x, constant(sigma), structure="adjoint", rule="adf")
    traces = ex.trace(moments.mean, moments.covariance(), "logits")
    assert (traces / logits.var(0).sum(1)).mean().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(moments.mean, logits.mean(0), atol=0.05 * logits.std().item(), rtol=0.05)
    diagonal = cov.logit_moments(net, x, constant(sigma), structure="diag", rule="adf").covariance()
    assert diagonal.sum() < 0.9 * logits.var(0).sum(), "a trained net correlates; diag must lose some of it"


def test_all_signs_together_give_the_exact_trace() -> None:
    """Hutchinson's estimate is unbiased: its mean over all 2^k equally likely probes is the trace."""
    moments = cov.logit_moments(Residual(norm=False), images(3), constant(0.7))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))[:, None].expand(-1, 3, -1)
    full = moments.covariance()
    torch.testing.assert_close(moments.quadratic(signs).mean(0), ex.trace(moments.mean, full, "logits"))
    softmax = moments.quadratic(ex.softmax_rows(moments.mean, signs)).mean(0)
    torch.testing.assert_close(softmax, ex.trace(moments.mean, full, "softmax"))
    drawn = cov.sign_rows(moments.mean, 4000)
    assert drawn.unique().tolist() == [-1.0, 1.0]
    assert drawn.mean().abs() < 0.03


def test_softmax_trace_is_that_of_the_delta_method() -> None:
    mean, root = torch.randn(2, 4), torch.randn(2, 4, 4)
    s = root @ root.transpose(1, 2)
    for i in range(2):
        jp = torch.func.jacrev(lambda z: z.softmax(0))(mean[i])
        torch.testing.assert_close(ex.trace(mean, s, "softmax")[i], (jp @ s[i] @ jp).trace())


@pytest.mark.parametrize("structure", ["jacobian", "diag", "adjoint"])
def test_competitor_rows_equal_the_full_covariance(structure: cov.Structure) -> None:
    moments = cov.logit_moments(Residual(norm=False), images(3), constant(0.7), structure=structure)
    y = torch.tensor([0, 2, 3])
    rivals = ex.competitors(moments.mean, y, 2)
    q = moments.quadratic(ex.pair_rows(moments.mean, y, rivals))
    torch.testing.assert_close(q, ex.pair_variance(moments.covariance(), y, rivals))
    s = moments.covariance()
    j = int(rivals[1, 0])
    assert q[0, 1].item() == pytest.approx((s[1, 2, 2] + s[1, j, j] - 2 * s[1, 2, j]).item(), rel=1e-4)


def test_competitors_are_the_strongest_wrong_classes() -> None:
    mean = torch.tensor([[5.0, 1.0, 3.0, 4.0], [0.0, 9.0, 2.0, -1.0]])
    y = torch.tensor([0, 2])
    assert ex.competitors(mean, y, 2).tolist() == [[3, 2], [1, 0]]
    assert sorted(ex.competitors(mean, y, 0)[1].tolist()) == [0, 1, 3]


def test_log_win_by_hand() -> None:
    mean, y, rivals = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([0]), torch.tensor([[2, 1]])
    value = ex.log_win(mean, torch.tensor([[4.0], [16.0]]), y, rivals)
    assert value.flatten().tolist() == pytest.approx([math.log(0.6914625)] * 2, rel=1e-5)
    floored = ex.log_win(mean, torch.zeros(2, 1), y, rivals)
    assert torch.isfinite(floored).all()


STRUCTURES: list[tuple[cov.Structure, mo.ReluRule]] = [
    ("jacobian", "laplace"),
    ("diag", "laplace"),
    ("diag", "adf"),
    ("adjoint", "laplace"),
    ("adjoint", "adf"),
]


def closed_loss(net: nn.Module, x: Tensor, y: Tensor, sigma: Tensor, how: tuple[cov.Structure, mo.ReluRule]) -> Tensor:
    moments = cov.logit_moments(net, x, [lambda z: sigma.square()], ["first"], *how)
    full, rivals = moments.covariance(), ex.competitors(moments.mean, y, 0)
    win = ex.log_win(moments.mean, ex.pair_variance(full, y, rivals), y, rivals)
    error = ex.squared_error(moments.mean, ex.trace(moments.mean, full, "logits"), y, "logits")
    return (error - win.sum(0)).mean()


@pytest.mark.parametrize("how", STRUCTURES)
def test_gradients_equal_finite_differences(how: tuple[cov.Structure, mo.ReluRule]) -> None:
    net, x, y = Residual().double().eval(), images(3).double(), torch.tensor([0, 1, 3])
    sigma = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    weight, step = net.second.weight, 1e-6
    by_sigma, by_weight = torch.autograd.grad(closed_loss(net, x, y, sigma, how), (sigma, weight))
    with torch.no_grad():
        low, high = (closed_loss(net, x, y, sigma + d, how) for d in (-step, step))
        assert by_sigma.item() == pytest.approx((high - low).item() / (2 * step), rel=1e-5)
        assert by_sigma.abs() > 1e-3
        at = (1, 2, 0, 1)
        values = []
        for d in (-step, 2 * step):
            weight[at] += d
            values.append(closed_loss(net, x, y, sigma, how).item())
        assert by_weight[at].item() == pytest.approx((values[1] - values[0]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("how", STRUCTURES)
def test_without_noise_only_the_squared_error_is_left(how: tuple[cov.Structure, mo.ReluRule]) -> None:
    net, x, y = Residual().eval(), images(3), torch.tensor([0, 1, 3])
    moments = cov.logit_moments(net, x, constant(1e-5), ["first"], *how)
    error = ex.squared_error(moments.mean, ex.trace(moments.mean, moments.covariance(), "logits"), y, "logits")
    expected = (net(x) - F.one_hot(y, 4)).square().sum(1)
    torch.testing.assert_close(error, expected, atol=1e-3, rtol=1e-3)


def test_batch_norm_in_training_does_not_mix_samples() -> None:
    """The Jacobian of a training batch is that of the network frozen at this batch's statistics."""
    net, x = Residual().train(), images(6)
    reference = copy.deepcopy(net).eval()
    z = reference.first(x).detach()
    reference.bn.running_mean, reference.bn.running_var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    moments = cov.logit_moments(net, x, constant(0.7))
    expected = cov.logit_moments(reference, x, constant(0.7)).covariance()
    torch.testing.assert_close(moments.covariance(), expected, atol=1e-5, rtol=1e-4)
    moments.covariance().sum().backward()  # second derivatives exist
    assert net.second.weight.grad is not None
    assert net.bn.training


@pytest.mark.parametrize("how", STRUCTURES)
def test_buffers_move_exactly_once(how: tuple[cov.Structure, mo.ReluRule]) -> None:
    net, x = Residual().train(), images(6)
    plain = copy.deepcopy(net)
    plain(x)
    moments = cov.logit_moments(net, x, constant(0.7), ["first"], *how)
    moments.quadratic(cov.sign_rows(moments.mean, 2)).sum().backward()
    assert net.bn.num_batches_tracked == 1
    for got, expected in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, expected)


def test_the_site_is_the_first_layer_that_runs() -> None:
    """`Residual` registers its head first; the noise must still sit behind the first convolution, in every pass."""
    net, shapes = Residual(), []

    def note(z: Tensor) -> Tensor:
        shapes.append(tuple(z.shape))
        return z

    with edit_site(net, "first", note):
        net(images(2))
        net(images(2))
    assert shapes == [(2, 6, 6, 6)] * 2
    net(images(2))
    assert len(shapes) == 2
    assert cov.logit_moments(net, images(2), constant(1.0), structure="adjoint").sites[0].shape == (2, 6, 6, 6)


@pytest.mark.parametrize("how", STRUCTURES)
def test_moments_are_float32_under_autocast(how: tuple[cov.Structure, mo.ReluRule]) -> None:
    net, x = Residual().eval(), images(3)
    exact = cov.logit_moments(net, x, constant(0.7), ["first"], *how).covariance()
    with torch.autocast("cpu", torch.bfloat16):
        moments = cov.logit_moments(net, x, constant(0.7), ["first"], *how)
        rough = moments.covariance()
        variances = moments.quadratic(cov.unit_rows(moments.mean)).T
    assert moments.mean.dtype == rough.dtype == torch.float32
    # the network's own passes may be rough, propagated moments may not
    tolerance = 0.1 if how[0] == "jacobian" else 1e-5
    close = {"atol": 0.3 * tolerance * exact.max().item(), "rtol": tolerance}
    torch.testing.assert_close(rough, exact, **close)
    torch.testing.assert_close(variances, exact.diagonal(dim1=1, dim2=2), **close)


def test_batch_statistics_are_float32_under_autocast() -> None:
    """BatchNorm that trains: batch_norm refuses statistics in half precision on a CPU."""
    net, x = Residual().train(), images(16)
    exact = cov.logit_moments(net, x, constant(0.7)).covariance()
    with torch.autocast("cpu", torch.bfloat16):
        rough = cov.logit_moments(net, x, constant(0.7)).covariance()
    assert (rough - exact).norm() < 0.1 * exact.norm()


def test_an_in_place_relu_at_the_site_changes_nothing() -> None:
    tail = [nn.Flatten(), nn.Linear(32, 3)]
    conv, x = nn.Conv2d(1, 2, 3), images(3)
    apart = cov.logit_moments(nn.Sequential(conv, nn.ReLU(), *tail), x, constant(0.5))
    in_place = cov.logit_moments(nn.Sequential(conv, nn.ReLU(inplace=True), *tail), x, constant(0.5))
    torch.testing.assert_close(in_place.covariance(), apart.covariance())
    torch.testing.assert_close(in_place.sites[0], conv(x))
