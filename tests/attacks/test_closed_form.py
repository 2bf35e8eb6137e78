"""The attack through the closed form: its gradient, its limits, what it keeps, and a model on which draws mislead."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.closed_form import ClosedForm
from attacks.pgd import PGD
from bench.core.attack import Context
from bench.core.classifier import Classifier, Counted, frozen
from bench.core.epsilon import Epsilon
from bench.core.pgd import ascend, attack_loss
from bench.core.rng import scope
from bench.core.smoothing import Smoothed
from bench.core.stochastic import noise_sites
from bench.core.threat import Norm, Threat
from bench.noise import losses as ex
from bench.noise.gaussian_noise import NoiseFreeDeployment
from defenses.noisy import Noisy
from defenses.pni import PNI
from defenses.rse import RSE

NONE = Threat("Linf", Epsilon(0))
EPS = Threat("Linf", Epsilon("0.1"))
KINDS = ["smoothing", "rse", "pni", "noisy"]

pytestmark = pytest.mark.usefixtures("seeded")


class Net(nn.Module):
    """Two convolutions, BatchNorm, a pool and a head, with margins of some size."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(36, 4)
        with torch.no_grad():
            self.head.weight *= 8

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn(self.first(x)))
        return self.head(F.relu(F.max_pool2d(self.second(z), 2)).flatten(1))


def deployed(kind: str, net: nn.Module | None = None, **settings: Any) -> Classifier:
    net = (Net() if net is None else net).double().eval()
    if kind == "smoothing":
        return Smoothed(net, 0.1, n_vote=20)
    made: Any = {
        "rse": lambda: RSE(NONE, **settings),
        "pni": lambda: PNI(NONE, **settings),
        "noisy": lambda: Noisy(NONE, **{"sigma": 0.3, **settings}),
    }[kind]()
    model: Classifier = made.deploy(made.wrap(net).double())
    return model.eval()


def images(count: int = 12) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 1, 6, 6, dtype=torch.float64), torch.arange(count) % 4


def mostly_right(model: Classifier) -> tuple[Tensor, Tensor]:
    x, y = images()
    with torch.no_grad():
        return x, torch.where(torch.arange(len(y)) < 10, model.net(x).argmax(1), y)


# The loss


@pytest.mark.parametrize("structure", ["diag", "adjoint", "jacobian"])
@pytest.mark.parametrize("loss", ["margin", "log_win", "ece_bound"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_finite_differences(kind: str, loss: Any, structure: Any) -> None:
    model, (x, y) = deployed(kind), images(3)
    attack = ClosedForm(EPS, loss=loss, structure=structure, rivals=2)
    with frozen(model):
        objective = attack._objective(Counted(model))
        point = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(objective(point, y).sum(), point)
        direction, h = torch.randn_like(x), 1e-6
        ends = [objective(x + s * h * direction, y).detach() for s in (1, -1)]
    found = (grad * direction).flatten(1).sum(1)
    torch.testing.assert_close(found, (ends[0] - ends[1]) / (2 * h), rtol=1e-4, atol=1e-5)
    assert float(found.abs().max()) > 0.1


def test_losses_by_hand() -> None:
    mean = torch.tensor([[1.0, 3.0, 2.5, 0.0]]).double()
    q, y, rivals = torch.tensor([[4.0], [0.25], [1.0]]).double(), torch.tensor([0]), torch.tensor([[1, 2, 3]])
    assert ex.margin_ratio(mean, q, y, rivals).item() == pytest.approx(3.0)  # (2.5 - 1) / .5 beats (3 - 1) / 2
    wins = ex.log_win(mean, q, y, rivals)
    assert ex.log_joint_loss(mean, q, y, rivals).item() == pytest.approx((-wins.sum(0)).log().item())


def test_a_sure_win_still_has_a_gradient_in_float32() -> None:
    """-log Phi(t) and its slope are 0 from t = 13 on; its logarithm rises by t for each unit."""
    y, rivals, q = torch.tensor([0]), torch.tensor([[1]]), torch.ones(1, 1)
    for t in (4.9, 5.1, 20.0, 60.0):
        mean = torch.tensor([[t, 0.0]], requires_grad=True)
        (plain,) = torch.autograd.grad(-ex.log_win(mean, q, y, rivals).sum(), mean)
        (slope,) = torch.autograd.grad(ex.log_joint_loss(mean, q, y, rivals).sum(), mean)
        assert slope[0, 0].item() == pytest.approx(-t, rel=0.05)
        assert (plain[0, 0] == 0) == (t > 13)


def test_settings_reach_the_loss() -> None:
    """Each site kind, the factor on the noise, and the number of rivals change what is climbed."""
    x, y = images()
    for kind in KINDS:
        model = deployed(kind)
        with frozen(model):
            values = [
                ClosedForm(EPS, **settings)._objective(Counted(model))(x, y).detach()
                for settings in ({"rivals": 0}, {"rivals": 0, "noise": 0.5}, {"loss": "log_win", "rivals": 0},
                                 {"loss": "log_win", "rivals": 1}, {"structure": "diag"})
            ]  # fmt: skip
        assert all(not torch.allclose(a, b) for i, a in enumerate(values) for b in values[:i])
        # half the noise, twice the ratio, as far as the mean does not move
        share = float((values[1] / values[0]).median())
        assert share == pytest.approx(2) if kind == "noisy" else 1.3 < share < 2.3


# The limits


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("loss", "plain"), [("margin", "cw"), ("ece_bound", "ce")])
def test_without_noise_it_is_pgd_on_the_deterministic_loss(loss: Any, plain: Any, norm: Norm) -> None:
    threat, model = Threat(norm, Epsilon("0.03")), deployed("noisy")
    x, y = mostly_right(model)
    settings: dict[str, Any] = {"steps": 8, "rel_step_size": 0.3, "restarts": 2}
    ours = ClosedForm(threat, loss=loss, noise=0.0, rivals=0, **settings).evaluate(model, x, y, Context(3))
    theirs = PGD(threat, loss=plain, **settings).evaluate(Classifier(model.net), x, y, Context(3))
    assert 0 < theirs.columns["correct"].float().mean() < 1
    assert ours.x_adv is not None
    torch.testing.assert_close(ours.x_adv, theirs.x_adv, rtol=0, atol=1e-9)


def test_little_noise_is_nearly_none() -> None:
    """The exact moments of smoothing at sigma 1e-5 climb as PGD does on the net."""
    net = Net().double().eval()
    model, (x, y) = Smoothed(net, 1e-5, n_vote=20), images(40)
    with frozen(model):
        counted = Counted(model)
        with scope(1):
            found, _ = ClosedForm(EPS, loss="ece_bound", steps=5, rel_step_size=0.3).perturb(counted, x, y, Context(0))
        with scope(1):
            objective = attack_loss("ce", y)
            plain = ascend(lambda z: objective(net(z)), x, EPS, steps=5, rel_step_size=0.3)
        ours, theirs = (F.cross_entropy(net(z), y) for z in (found, plain))
    assert float(ours) == pytest.approx(float(theirs), rel=0.02)


# Where draws mislead

PIXELS, SLOPE = 400, 0.3


def kinked() -> Smoothed:
    """Two classes of margin b + sum_i |u_i| - SLOPE u_i, u the noisy pixels around 1/2: one draw has the slope of the
    kink, whose sign is chance, and the mean has -SLOPE. Raising every pixel is what loses."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * PIXELS, 2))
    sigma = 0.5
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([-0.5, 0.5]))
        net[3].weight.zero_()
        net[3].weight[0, :PIXELS], net[3].weight[0, PIXELS:] = 1 - SLOPE, 1 + SLOPE
        net[3].bias.zero_()
        net[3].bias[0] = 3.0 - PIXELS * sigma * (2 / torch.pi) ** 0.5  # the mean margin at the image is 3
    return Smoothed(net.eval(), sigma, n_vote=1000)


@pytest.mark.parametrize("structure", ["diag", "adjoint"])
def test_it_finds_what_few_draws_cannot(structure: Any) -> None:
    model, x, y = kinked(), torch.full((4, 1, 20, 20), 0.5), torch.zeros(4, dtype=torch.int64)
    found = ClosedForm(EPS, structure=structure, rivals=1, steps=10, rel_step_size=0.25).evaluate(
        model, x, y, Context(0)
    )
    assert found.x_adv is not None
    torch.testing.assert_close(found.x_adv, x + 0.1)
    assert not found.columns["correct"].any()
    with frozen(model), scope(0), torch.no_grad():
        assert bool((model.predict(x) == y).all())
        draws = [1, 3]
        for count in draws:  # as many passes as the closed form needs, and more

            def objective(z: Tensor, count: int = count) -> Tensor:
                return torch.stack([attack_loss("cw", y)(model(z)) for _ in range(count)]).mean(0)

            with torch.enable_grad():
                misled = ascend(objective, x, EPS, steps=10, rel_step_size=0.25)
            assert bool((model.predict(misled) == y).all())
            assert float((misled - x).mean().abs()) < 0.02


# What is kept, what is left


def test_of_a_random_model_the_iterate_of_highest_loss_is_kept() -> None:
    model, (x, y) = deployed("rse", sigma_init=0.3), images(30)
    attack = ClosedForm(EPS, steps=4, rel_step_size=1.0, loss="log_win")  # steps that overshoot
    with frozen(model):
        objective = attack._objective(Counted(model))
        with scope(1):
            found, _ = attack.perturb(Counted(model), x, y, Context(0))
        with scope(1):
            last = ascend(lambda z: objective(z, y), x, EPS, steps=4, rel_step_size=1.0)
        best, end = objective(found, y).detach(), objective(last, y).detach()
    assert bool((best >= end - 1e-9).all())
    assert bool((best > end + 1e-3).any())


def test_more_restarts_raise_the_loss_of_a_random_model() -> None:
    model, (x, y) = deployed("smoothing"), images(30)
    with frozen(model):
        objective = ClosedForm(EPS)._objective(Counted(model))
        values = []
        for restarts in (1, 4):
            with scope(1):
                found, _ = ClosedForm(EPS, steps=3, rel_step_size=0.5, restarts=restarts).perturb(
                    Counted(model), x, y, Context(0)
                )
            values.append(objective(found, y).detach())
    assert bool((values[1] >= values[0] - 1e-9).all())
    assert bool((values[1] > values[0] + 1e-3).any())


def test_a_deterministic_model_judges_every_iterate_itself() -> None:
    """What was wrong once on the way is wrong in the end, whatever its loss."""
    model = deployed("noisy", sigma=3.0)
    x = images(60)[0]
    y = model.predict(x)
    seen: list[tuple[Tensor, Tensor]] = []
    # `adjoint` climbs the mean of the noisy net, so that loss and verdict differ
    attack = ClosedForm(Threat("Linf", Epsilon("0.05")), structure="adjoint", steps=6, rel_step_size=0.5)
    with frozen(model):
        judged = model.register_forward_hook(lambda m, args, out: seen.append((args[0].clone(), out.argmax(1) != y)))
        found, _ = attack.perturb(Counted(model), x, y, Context(0))
        judged.remove()
        wrong = model.predict(found) != y
        objective = attack._objective(Counted(model))
        losses = torch.stack([objective(z, y).detach() for z, _ in seen])
    ever = torch.stack([bad for _, bad in seen])
    assert len(seen) == 7
    assert torch.equal(wrong, ever.any(0))
    highest = losses.argmax(0)
    assert bool((wrong & ~ever.gather(0, highest[None]).squeeze(0)).any())  # by loss alone it would have been lost


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("kind", KINDS)
def test_inside_the_ball_and_nothing_left_behind(kind: str, norm: Norm) -> None:
    model, threat = deployed(kind), Threat(norm, Epsilon("0.05"))
    x, y = images()
    x[:, :, :3] = 0  # at the edge of the box
    before, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    switches = [site.source.enabled for site in noise_sites(model.net)]
    for structure in ("diag", "adjoint", "jacobian"):
        attack = ClosedForm(threat, structure=structure, steps=3, rel_step_size=0.5)  # type: ignore[arg-type]
        found = attack.evaluate(model, x, y, Context(0))
        assert found.x_adv is not None
        threat.check(x, found.x_adv)
        assert not torch.equal(found.x_adv, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()] == flags
    assert [site.source.enabled for site in noise_sites(model.net)] == switches
    assert all(p.grad is None for p in model.parameters())


def test_passes_of_a_run_are_counted() -> None:
    x, y = images()
    smoothed, pni, noisy = (deployed(kind) for kind in ("smoothing", "pni", "noisy"))
    settings: dict[str, Any] = {"steps": 5, "rel_step_size": 0.3}
    cases: list[tuple[Classifier, dict[str, Any], int, int]] = [
        (smoothed, {"structure": "diag", "rivals": 0}, 2 * 6, 2 * 5),
        (smoothed, {"rivals": 2}, 2 * 6, 2 * 6 + 6 * 5),  # 2 rows for the value of 6 iterates, 2 + 4 for 5 gradients
        (smoothed, {"loss": "ece_bound"}, 2 * 6, 4 * 6 + 10 * 5),
        (pni, {"structure": "diag"}, 3 * 6, 3 * 5),
        (pni, {"rivals": 1}, 4 * 6, 2 * 6 + 8 * 5),
    ]
    for model, own, forwards, backwards in cases:
        columns = ClosedForm(EPS, **settings, **own).evaluate(model, x, y, Context(0)).columns
        assert columns["forwards"].unique().tolist() == [forwards]
        assert columns["backwards"].unique().tolist() == [backwards]
    x, y = mostly_right(noisy)
    tiny = Threat("Linf", Epsilon("1e-9"))
    for own, rows in (({"rivals": 3}, 3), ({"loss": "training"}, 2)):  # of training: a probe and a competitor
        columns = ClosedForm(tiny, **settings, **own).evaluate(noisy, x, y, Context(0)).columns  # type: ignore[arg-type]
        share = float(columns["clean"].float().mean())
        assert columns["forwards"].unique().tolist() == pytest.approx([(6 + 6) * share])  # and one to judge
        assert columns["backwards"].unique().tolist() == pytest.approx([(rows * 6 + (1 + 2 * rows) * 5) * share])


# The noise of `noisy`, which is withdrawn


def test_the_training_loss_is_climbed_at_the_learnt_noise() -> None:
    defense = Noisy(NONE, sigma=0.3, learn_sigma=True, probes=0, rows=2, w_mse=0.5, w_prob=2.0)
    net = defense.wrap(Net()).double().eval()
    keys = set(net.state_dict())
    model, (x, y) = defense.deploy(net), images()
    assert set(model.net.state_dict()) == keys
    assert not model.stochastic
    attack = ClosedForm(EPS, loss="training")
    with frozen(model):
        objective = attack._objective(Counted(model))
        before = objective(x, y).detach()
        terms, _, _ = defense.terms(net, x, y, net.noise.sigma())
        torch.testing.assert_close(before, (terms["mse"] + terms["prob"]).detach())
        with torch.no_grad():
            net.noise.rho += 1.0  # as if it had been learnt
        assert not torch.allclose(objective(x, y).detach(), before, rtol=0.01)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        net.noise.rho += 5.0
    with frozen(twin):
        again = attack._objective(Counted(twin))(x, y).detach()
    with torch.no_grad():
        net.noise.rho -= 6.0
    with frozen(model):
        torch.testing.assert_close(objective(x, y).detach(), before)
        assert not torch.allclose(again, before, rtol=0.01)  # a copy keeps the noise of its own


@pytest.mark.parametrize(
    "settings",
    [{}, {"site": "input", "w_mse": 0.0}, {"structure": "diag"}, {"structure": "ungated"}, {"rows": 0, "probes": 0}],
)
def test_every_form_of_noisy_can_be_attacked(settings: dict[str, Any]) -> None:
    model = deployed("noisy", **settings)
    x, y = mostly_right(model)
    clean = (model.predict(x) == y).float().mean()
    threat = Threat("Linf", Epsilon("0.3"))
    for loss in ("margin", "training"):
        found = ClosedForm(threat, loss=loss, steps=10).evaluate(model, x, y, Context(0))  # type: ignore[arg-type]
        assert found.columns["correct"].float().mean() < clean


def test_models_without_known_noise_are_refused_in_one_line() -> None:
    net = Net()
    assert ClosedForm(EPS).unsupported_reason(Classifier(net)) == "no Gaussian noise at known sites"
    assert (
        ClosedForm(EPS, loss="training").unsupported_reason(Smoothed(net, 0.1))
        == "was not trained on a closed-form loss"
    )
    assert (
        ClosedForm(Threat("L1", Epsilon(1))).unsupported_reason(Smoothed(net, 0.1)) == "no L1 version; norms: Linf, L2"
    )
    for kind in KINDS:
        assert ClosedForm(EPS).unsupported_reason(deployed(kind)) is None
    assert isinstance(deployed("noisy"), NoiseFreeDeployment)
    with pytest.raises(ValueError, match="restarts equal"):
        ClosedForm(EPS, start="zero", restarts=2)
    with pytest.raises(ValueError, match="less than the budget"):
        ClosedForm(EPS, steps=3)
