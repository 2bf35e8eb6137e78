"""Closed-form and sampled noise injection: the loss by hand, what reaches the optimizer, and deployment."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import plugins
from bench.core.defense import Batch
from bench.core.epsilon import Epsilon
from bench.core.threat import Threat
from bench.models import lenet5
from bench.models.common import Inputs
from bench.noise.gaussian_noise import NoiseScale
from bench.planning import catalog
from bench.planning.job_fields import PluginChoice
from defenses.noisy import Noisy
from defenses.noisy_sampled import NoisySampled

THREAT = Threat("Linf", Epsilon(0))
SETTINGS: list[dict[str, Any]] = [
    {},
    {"site": "input"},
    {"rows": 0, "probes": 0},
    {"rows": 2, "probes": 3, "target": "softmax"},
    {"structure": "diag"},
    {"structure": "diag", "rows": 0},
    {"structure": "adjoint"},
    {"w_mse": 0.0},
    {"w_prob": 0.0},
    {"site": "input", "structure": "adjoint", "rows": 0},
    {"param": "exp"},
    {"structure": "ungated"},
]

pytestmark = pytest.mark.usefixtures("seeded")


class Small(nn.Module):
    """Convolution, BatchNorm, skip, pool, head: every kind of layer that the loss must get through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.block = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        z = F.max_pool2d(F.relu(z + self.bn(self.block(F.relu(z)))), 3)
        return self.head(z.flatten(1))


class Affine(nn.Module):
    """One linear layer: the site is the logits themselves, so S = sigma^2 I whatever the structure."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def batch(n: int = 8, size: int = 6) -> Batch:
    y = torch.arange(n) % 5
    return Batch(torch.rand(n, 1, size, size), y, torch.arange(n), epoch=0, progress=0.0)


def pair_terms(logits: Tensor, y: Tensor, sigma: float, count: int) -> Tensor:
    """-sum over the `count` strongest wrong classes of log Phi(d_j / (sigma sqrt 2)), averaged over images."""
    gaps = logits.gather(1, y[:, None]) - logits
    wrong = torch.ones_like(gaps, dtype=torch.bool).scatter(1, y[:, None], False)
    gaps = gaps[wrong].view(len(y), -1).sort(1).values[:, :count]
    return -torch.special.log_ndtr(gaps / (sigma * 2**0.5)).sum(1).mean()


@pytest.mark.parametrize("structure", ["jacobian", "diag", "adjoint"])
@pytest.mark.parametrize(("rows", "probes"), [(0, 0), (0, 1), (1, 1), (2, 0), (4, 3)])
def test_loss_of_a_linear_net_by_hand(structure: Any, rows: int, probes: int) -> None:
    """With S = sigma^2 I every probe gives the exact trace 5 sigma^2 and every pair has q = 2 sigma^2."""
    defense = Noisy(THREAT, sigma=0.7, structure=structure, rows=rows, probes=probes, w_mse=2.0, w_prob=3.0)
    net, data = defense.wrap(Affine()), batch(size=3)
    terms = defense.loss(net, data, None)
    logits = net(data.x)
    error = (logits - F.one_hot(data.y, 5)).square().sum(1).mean() + 5 * 0.49
    torch.testing.assert_close(terms["mse"], 2 * error)
    torch.testing.assert_close(terms["prob"], 3 * pair_terms(logits, data.y, 0.7, rows or 4))


def test_squared_error_equals_sampling_at_the_input() -> None:
    """E||Y - t||^2 over draws of the noise, for noise at the pixels and a linear net (where it is exact)."""
    defense = Noisy(THREAT, sigma=0.5, site="input", rows=0)
    net, data = defense.wrap(Affine()), batch(4, 3)
    with torch.no_grad():
        draws = data.x.repeat(50_000, 1, 1, 1)
        noisy = net(draws + 0.5 * torch.randn_like(draws))
        sampled = (noisy - F.one_hot(data.y, 5).repeat(50_000, 1)).square().sum(1).mean()
    assert defense.loss(net, data, None)["mse"].item() == pytest.approx(sampled.item(), rel=0.01)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_terms_are_finite_and_reach_every_parameter(settings: dict[str, Any], learn_sigma: bool) -> None:
    defense = Noisy(THREAT, learn_sigma=learn_sigma, **settings)
    net = defense.wrap(Small()).train()
    terms = defense.loss(net, batch(), None)
    assert set(terms) == {name for name in ("mse", "prob") if settings.get(f"w_{name}", 1.0)}
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0 or name == "bn.bias", name
    assert net.training
    assert net.bn.num_batches_tracked == 1


@pytest.mark.parametrize("target", ["logits", "softmax"])
def test_probes_and_rows_agree_with_the_exact_loss(target: Any) -> None:
    options = {"sigma": 3.0, "rows": 4, "target": target}  # so large that the trace is most of the squared error
    exact, cheap = Noisy(THREAT, probes=0, **options), Noisy(THREAT, probes=2000, **options)
    net, data = exact.wrap(Small().eval()), batch(3)
    with torch.no_grad():
        a, b = exact.loss(net, data, None), cheap.loss(net, data, None)
    torch.testing.assert_close(a["prob"], b["prob"])
    torch.testing.assert_close(a["mse"], b["mse"], rtol=0.02, atol=0)


def test_same_seed_same_loss() -> None:
    defense = Noisy(THREAT)
    net, data, values = defense.wrap(Small().eval()), batch(), []
    for _ in range(2):
        torch.manual_seed(3)
        values.append(defense.loss(net, data, None)["mse"])
    assert torch.equal(values[0], values[1])


@pytest.mark.parametrize("sigma", [0.01, 0.6, 2.0])
def test_the_stored_scale_gives_sigma_back(sigma: float) -> None:
    assert NoiseScale(sigma, learn=False).sigma().item() == pytest.approx(sigma, rel=1e-5)


def test_learned_sigma_has_its_own_group_and_a_gradient_that_shrinks_it() -> None:
    defense = Noisy(THREAT, learn_sigma=True, w_prob=0.0)
    net = defense.wrap(Small())
    rest, own = defense.param_groups(net)
    assert own["lr_scale"] == 0.1
    assert own["weight_decay"] == 0
    assert [p is net.noise.rho for p in own["params"]] == [True]
    assert len(rest["params"]) + 1 == len(list(net.parameters()))
    defense.loss(net, batch(), None)["mse"].backward()
    assert net.noise.rho.grad > 0  # tr S grows with sigma, and the mean does not depend on it


def test_fixed_sigma_is_no_parameter() -> None:
    defense = Noisy(THREAT)
    net = defense.wrap(Small())
    assert len(defense.param_groups(net)) == 1
    assert not any(name.startswith("noise") for name, _ in net.named_parameters())
    assert net.head is dict(net.named_children())["head"]


@pytest.mark.parametrize("kind", [Noisy, NoisySampled])
def test_deployment_is_the_noise_free_net(kind: type[Any]) -> None:
    defense, net = kind(THREAT, sigma=5.0), Small()
    plain, data = copy.deepcopy(net).eval(), batch()
    wrapped = defense.wrap(net)
    defense.loss(wrapped.eval(), data, None)
    model = defense.deploy(wrapped)
    assert not model.stochastic
    assert torch.equal(model(data.x), plain(data.x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_metrics_tell_sigma_and_weights() -> None:
    for defense in (Noisy(THREAT, sigma=0.5), NoisySampled(THREAT, sigma=0.5)):
        net, data = defense.wrap(Small()), batch()
        assert set(defense.metrics(net)) == {"sigma", "w1_norm"}
        defense.loss(net, data, None)
        found = defense.metrics(net)
        assert found["sigma"].item() == pytest.approx(0.5)
        torch.testing.assert_close(found["w1_norm"], net.conv.weight.detach().norm())
        assert ("snr" in found) == isinstance(defense, NoisySampled)
    torch.testing.assert_close(found["snr"], net.conv(data.x).detach().std() / 0.5)


@pytest.mark.parametrize("rows", [1, 2, 0])
def test_the_log_tells_gaps_in_units_of_the_noise_and_what_is_the_same_for_all_images(rows: int) -> None:
    """One linear layer under noise at its output: q = 2 sigma^2, and d is that of the logits."""
    defense = Noisy(THREAT, sigma=0.7, rows=rows, check_every=0)
    net, data = defense.wrap(Affine().double()), batch(40, 3)
    data = Batch(data.x.double(), data.y, data.index, 0, 0.0)
    defense.loss(net, data, None)
    found = defense.metrics(net)
    logits = net(data.x).detach()
    common, ratios, constant, changing = logits.mean(0), [], 0.0, 0.0
    for row, own in zip(logits, data.y.tolist(), strict=True):
        others = sorted((j for j in range(5) if j != own), key=lambda j: -float(row[j]))[: rows or 4]
        for j in others:
            d, same = float(row[own] - row[j]), float(common[own] - common[j])
            ratios.append(d / (0.7 * 2**0.5))
            constant, changing = constant + abs(same), changing + abs(d - same)
    assert found["t_median"].item() == pytest.approx(sorted(ratios)[(len(ratios) - 1) // 2], rel=1e-6)
    assert found["gap_constant"].item() == pytest.approx(constant / (constant + changing), rel=1e-9)
    with torch.no_grad():
        net.head.weight.zero_()
    defense.loss(net, data, None)
    assert defense.metrics(net)["gap_constant"].item() == pytest.approx(1)
    alone = Noisy(THREAT, w_prob=0.0, check_every=0)  # without rivals, as only their probability needs their variances
    alone.loss(net, data, None)
    assert not {"t_median", "gap_constant"} & alone.metrics(net).keys()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_log_tells_the_gradient_norm_of_each_term(settings: dict[str, Any]) -> None:
    """Those of the loss itself; the probe of a trace draws anew, so that the squared error's is compared without."""
    defense = Noisy(THREAT, check_every=0, **{**settings, "probes": 0})
    net, data = defense.wrap(Small().eval()), batch(32)
    terms, expected = defense.loss(net, data, None), {}
    for name, value in terms.items():
        slopes = torch.autograd.grad(value, list(net.parameters()), retain_graph=True, allow_unused=True)
        expected[f"grad_{name}"] = torch.stack([slope.norm() for slope in slopes if slope is not None]).norm()
    found = defense.metrics(net)
    assert {name for name in found if name.startswith("grad_")} == expected.keys()
    for name, norm in expected.items():
        torch.testing.assert_close(found[name], norm, rtol=1e-4, atol=0)
    assert {"t_median", "gap_constant"} <= found.keys()  # all variances are known where the trace is exact


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"w_mse": 0.0, "w_prob": 0.0}, "nothing is trained"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Noisy(THREAT, **settings)


def test_more_rows_than_competitors_are_refused() -> None:
    defense = Noisy(THREAT, rows=5)
    with pytest.raises(ValueError, match="rows=5, but 5 classes leave 4 competitors"):
        defense.loss(defense.wrap(Small()), batch(), None)


PULLS = [
    {},
    {"rows": 0, "probes": 0},
    {"site": "input"},
    {"structure": "adjoint", "probes": 0},
    {"param": "exp"},
]


@pytest.mark.parametrize("settings", PULLS, ids=str)
def test_the_log_takes_the_pull_on_sigma_apart(settings: dict[str, Any]) -> None:
    """Over terms and over right and wrong samples it adds up to the derivative of the loss by sigma."""
    defense = Noisy(THREAT, learn_sigma=True, check_every=0, sigma=0.4, **{"probes": 0, **settings})
    net, data = defense.wrap(Small()).train(), batch(32)
    terms = defense.loss(net, data, None)
    torch.stack(list(terms.values())).sum().backward()
    found = defense.metrics(net)
    pulls = {name: value for name, value in found.items() if "_dsigma_" in name}
    assert len(pulls) == 2 * len(terms)
    by_rho = 0.4 if defense.param == "exp" else -math.expm1(-0.4)  # d sigma / d rho
    assert torch.stack(list(pulls.values())).sum().item() == pytest.approx(
        (net.noise.rho.grad / by_rho).sum().item(), rel=1e-3
    )
    assert found["dmse_dsigma_correct"] >= 0  # the squared error can only pull it down
    assert found["dprob_dsigma_correct"] >= 0
    assert found["dprob_dsigma_wrong"] <= 0


@pytest.mark.parametrize("param", ["softplus", "exp"])
def test_sigma_starts_where_it_is_told(param: Any) -> None:
    for sigma in (0.05, 0.6, 3.0):
        assert NoiseScale(sigma, True, param).sigma().item() == pytest.approx(sigma, rel=1e-5)
    noise = NoiseScale(0.05, True, param)
    noise.sigma().backward()
    assert noise.rho.grad.item() == pytest.approx(0.05 if param == "exp" else -math.expm1(-0.05), rel=1e-4)


def test_looking_at_the_closed_form_changes_nothing_that_is_trained() -> None:
    defense = Noisy(THREAT, check_every=1)
    net = defense.wrap(Small()).train()
    defense.loss(net, batch(), None)
    before, stream = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    found = defense.metrics(net)
    assert {"mc_mean_error", "mc_trace_ratio", "mc_win", "mc_win_genz"} <= set(found)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert {n: v.item() for n, v in defense.metrics(net).items()} == {n: v.item() for n, v in found.items()}


@pytest.mark.parametrize("structure", ["jacobian", "diag", "adjoint"])
def test_the_check_finds_no_error_where_the_closed_form_is_exact(structure: Any) -> None:
    """One linear layer: mean, trace and the probability to win are those of draws, up to their 256."""
    defense = Noisy(THREAT, structure=structure, sigma=0.3, check_every=1)
    net, data = defense.wrap(Affine()), batch(64, 3)
    defense.loss(net, data, None)
    found = {name: value.item() for name, value in defense.metrics(net).items()}
    assert found["mc_mean_error"] < 0.1
    assert found["mc_mean_shift"] < 0.1
    assert found["mc_trace_ratio"] == pytest.approx(1, abs=0.03)
    assert found["mc_win_genz"] == pytest.approx(found["mc_win"], abs=0.02)
    assert found["mc_win_union"] <= found["mc_win_genz"] + 0.01
    assert found["mc_win_product"] <= found["mc_win_genz"] + 0.01
    assert found["mc_win_genz"] <= found["mc_win_min"] + 0.01


def test_withdrawing_the_noise_shifts_the_mean_of_a_rectified_net() -> None:
    """The check must see what the laplace rule ignores: behind a ReLU noise moves the mean."""
    defense = Noisy(THREAT, sigma=2.0, check_every=2)
    net, data = defense.wrap(Small()).eval(), batch(64)
    defense.loss(net, data, None)
    assert not [name for name in defense.metrics(net) if name.startswith("mc_")]  # the first of every two epochs
    defense.loss(net, Batch(data.x, data.y, data.index, epoch=1, progress=0.5), None)
    found = defense.metrics(net)
    assert found["mc_mean_shift"] > 0.1
    torch.testing.assert_close(found["mc_mean_error"], found["mc_mean_shift"])


def test_settings_that_left_keep_the_keys_of_old_jobs() -> None:
    """A job planned today holds what a job planned before the settings left holds."""
    noisy, vote = (catalog.get("defenses", name).resolve({}) for name in ("noisy", "noisy_vote"))
    assert noisy == {
        **{"sigma": 0.6, "learn_sigma": False, "site": "first", "structure": "jacobian", "rows": 1, "probes": 1},
        **{"relu": "laplace", "target": "logits", "w_mse": 1.0, "w_prob": 1.0},
    }
    assert vote == noisy | {
        **{"scale": "absolute", "noise_at": "pre_bn", "param": "softplus", "sigma_lr": 0.1, "draws": 16},
        **{"joint": "product", "w_ece": 0.0, "check_every": 2, "n_vote": 100, "alpha": 0.001},
    }
    assert catalog.get("defenses", "noisy").resolve({"sigma_lr": 0.1, "param": "softplus", "check_every": 2}) == noisy


@pytest.mark.parametrize("name", ["noisy", "noisy_vote"])
def test_a_setting_that_left_is_named_with_the_page_of_its_results(name: str) -> None:
    plugin = catalog.get("defenses", name)
    for setting, value in plugin.constant("retired_settings", {}).items():
        with pytest.raises(
            LookupError, match=rf"^{name}\.{setting} was removed; its results are in docs/findings/noisy\.md$"
        ):
            plugin.resolve({setting: value})
    assert plugins.make("defenses", PluginChoice(name, plugin.resolve({})), None).sigma == 0.6
    with pytest.raises(LookupError, match="a model with relu=adf cannot be built again"):
        plugins.make("defenses", PluginChoice(name, {"relu": "adf"}), None)


# What lenet5 trained for 2 steps gave before the settings left: the terms of both steps, then a sum over the weights
GOLDEN: list[tuple[dict[str, Any], list[float]]] = [
    ({}, [0.9896587, 13.737, 8.960162, 95.88214, 10.77872]),
    ({"site": "input", "w_mse": 0.0, "probes": 0, "sigma": 1.5}, [2.761067, 3.078038, 8.846446]),
    ({"structure": "diag"}, [0.9900798, 8.986333, 3.171795, 358.2888, 16.65469]),
    ({"structure": "adjoint", "rows": 0}, [0.9898314, 23.67715, 21.89868, 301.6376, 16.49331]),
    ({"structure": "ungated", "target": "softmax"}, [0.7523136, 1.999877, 0.7514996, 1.559295, 8.817058]),
    ({"learn_sigma": True, "rows": 2}, [0.9896587, 22.26781, 20.44171, 156.339, 12.1496]),
]


@pytest.mark.parametrize(("settings", "expected"), GOLDEN, ids=str)
def test_two_steps_of_training_are_what_they_were(settings: dict[str, Any], expected: list[float]) -> None:
    assert two_steps(settings) == pytest.approx(expected, rel=1e-4)


def two_steps(settings: dict[str, Any]) -> list[float]:
    """The terms of two steps of gradient descent, and the norm of all weights behind them."""
    defense = Noisy(THREAT, **settings)
    net = defense.wrap(lenet5.build(Inputs(1, 16, 4, (0.3,), (0.5,)))).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    found = []
    for _ in range(2):
        data = Batch(torch.rand(12, 1, 16, 16), torch.arange(12) % 4, torch.arange(12), epoch=0, progress=0.0)
        terms = defense.loss(net, data, None)
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        found += [value.item() for value in terms.values()]
    return [*found, torch.cat([p.detach().flatten() for p in net.parameters()]).norm().item()]


def test_the_planner_reads_both_files() -> None:
    for name in ("noisy", "noisy_sampled"):
        plugin = catalog.get("defenses", name)
        assert plugin.uses_threat is False
        assert plugin.resolve({"site": "input"})["sigma"] == 0.6
        assert all(field.doc for field in plugin.fields)
        assert "2312.08877" in plugin.source
        with pytest.raises(ValueError, match="greater than 0"):
            plugin.resolve({"sigma": 0})


# Sampled noise


@pytest.mark.parametrize("site", ["first", "input"])
def test_sampled_noise_has_the_stated_scale_and_place(site: Any) -> None:
    defense = NoisySampled(THREAT, sigma=0.3, site=site, draws=200)
    conv, after = nn.Conv2d(1, 4, 3), nn.Flatten()
    data, seen = batch(2), {}
    conv.register_forward_pre_hook(lambda module, args: seen.update(image=args[0]))
    after.register_forward_pre_hook(lambda module, args: seen.update(z=args[0]))
    defense.loss(nn.Sequential(conv, after), data, None)
    image, z = seen["image"], seen["z"]
    clean = data.x.repeat(200, 1, 1, 1)
    noise = image - clean if site == "input" else z - conv(clean)
    quiet = z - conv(image) if site == "input" else image - clean
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise[0, 0].sub(noise[2, 0]).abs().max() > 0.1  # two draws of one image differ
    assert quiet.abs().max() < 1e-6


def test_sampled_loss_is_the_mean_cross_entropy_over_draws() -> None:
    """On a linear net the noise at the site is noise on the logits: compare with drawing it there."""
    net, data = Affine(), batch(size=3)
    few = NoisySampled(THREAT, sigma=0.8, draws=3)
    torch.manual_seed(5)
    found = few.loss(net, data, None)["ce"]
    torch.manual_seed(5)
    noise = torch.randn(24, 5)
    logits = net(data.x).repeat(3, 1) + 0.8 * noise
    torch.testing.assert_close(found, F.cross_entropy(logits, data.y.repeat(3)))


def test_sampled_noise_moves_batch_norm_once_a_step() -> None:
    defense = NoisySampled(THREAT, draws=4)
    net = defense.wrap(Small()).train()
    defense.loss(net, batch(), None)["ce"].backward()
    assert net.bn.num_batches_tracked == 1
    assert all(p.grad is not None for p in net.parameters())
