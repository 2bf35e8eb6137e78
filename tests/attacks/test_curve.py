"""The security curve against a linear model, whose distances are known, and against what makes a curve lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import NoisyInput
from torch import Tensor, nn

from attacks.curve import Curve
from attacks.pgd import PGD
from bench import plugins
from bench.core.attack import Context, Outcome
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.stochastic import Randomized
from bench.core.threat import Norm, Threat
from bench.planning import catalog
from bench.planning.job_fields import JobThreat, PluginChoice

BUDGETS = ["0", "0.05", "0.1", "0.15", "0.18", "0.2", "0.22"]


class Linear(nn.Module):
    """Two classes with logits +-w (x - 1/2) / 2, and a third that never wins."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(pixels))

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) - 0.5) @ self.w / 2
        return torch.stack([score, -score, torch.full_like(score, -100.0)], dim=1)


class Trained(nn.Module):
    """A small network; `trained` fits it to `blobs`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def blobs(count: int) -> tuple[Tensor, Tensor]:
    """Images `b 1 12 12`, most pixels exactly 0 or 1, with a noisy patch whose place is the class."""
    generator = torch.Generator().manual_seed(count)
    y = torch.arange(count) % 5
    x = (torch.rand(count, 1, 12, 12, generator=generator) < 0.1).float()
    for i in range(count):
        row, column = divmod(int(y[i]), 3)
        patch = 0.5 + 0.5 * torch.rand(1, 3, 3, generator=generator)
        x[i, :, 4 * row : 4 * row + 3, 4 * column : 4 * column + 3] = patch
    return x, y


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    net = Trained()
    x, y = blobs(400)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def curve(budgets: list[str], norm: Norm = "Linf", **settings: Any) -> Curve:
    largest = max(map(Epsilon, budgets))
    return Curve(Threat(norm, largest), budgets=[Epsilon(b) for b in budgets], **settings)


def judged(attack: Curve, model: Classifier, x: Tensor, y: Tensor, seed: int = 0) -> tuple[Outcome, Tensor]:
    found = attack.evaluate(model, x, y, Context(seed))
    assert found.x_adv is not None
    return found, found.x_adv


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_the_budgets_bracket_the_true_distance(norm: Norm, loss: Any) -> None:
    torch.manual_seed(1)
    net, x = Linear(64), 0.5 + 0.04 * torch.randn(40, 1, 8, 8)
    model = Classifier(net)
    with torch.no_grad():
        distance = ((x.flatten(1) - 0.5) @ net.w).abs().double() / Threat(norm, Epsilon(1)).dual_norm(net.w[None])
    y = torch.where(torch.arange(40) < 4, 1 - model.predict(x), model.predict(x))
    spread = torch.linspace(0.3, 1.7, 8, dtype=torch.float64) * float(distance.median())
    budgets = [f"{b:.6f}" for b in spread]
    columns = judged(curve(budgets, norm, loss=loss, rel_step_size=0.25), model, x, y)[0].columns
    places = torch.tensor([float(b) for b in budgets] + [float("inf")], dtype=torch.float64)
    expected = places[torch.searchsorted(places, distance)]
    expected[:4] = 0  # wrong without an attack
    near = (distance[:, None] / places - 1).abs().amin(1) < 0.01
    assert near.sum() < 10
    assert columns["broken_at"].dtype == torch.float64
    assert torch.equal(columns["broken_at"][~near], expected[~near])
    assert len(columns["broken_at"].unique()) > 5
    assert torch.equal(columns["correct"], columns["broken_at"].isinf())


def test_every_image_lies_in_the_ball_that_broke_it(trained: nn.Module) -> None:
    x, y = blobs(100)
    found, x_adv = judged(curve(BUDGETS), Classifier(trained), x, y)
    at = found.columns["broken_at"]
    assert len(at.unique()) >= 5
    assert found.columns["correct"].any()
    size = (x_adv.double() - x.double()).flatten(1).abs().amax(1)
    assert bool((size <= at.clamp_max(0.22) + 1e-6).all())
    assert torch.allclose(size.float(), found.columns["size"])
    with torch.no_grad():
        assert torch.equal(trained(x_adv).argmax(1) == y, found.columns["correct"])


@pytest.mark.parametrize("stochastic", [False, True])
def test_budget_0_is_clean_accuracy(trained: nn.Module, stochastic: bool) -> None:
    x, y = blobs(60)
    y = torch.where(torch.arange(60) < 7, (y + 1) % 5, y)
    model = Randomized(NoisyInput(trained, 0.3), draws=5) if stochastic else Classifier(trained)
    only, x_adv = judged(curve(["0"]), model, x, y)
    assert torch.equal(x_adv, x)
    columns = judged(curve(BUDGETS), model, x, y)[0].columns
    assert torch.equal(only.columns["correct"], columns["clean"])
    assert torch.equal(columns["broken_at"] > 0, columns["clean"])
    assert torch.equal(only.columns["broken_at"] == 0, ~columns["clean"])
    if not stochastic:
        assert torch.equal(columns["clean"], model.predict(x) == y)


def test_one_budget_is_a_pgd_of_the_same_settings(trained: nn.Module) -> None:
    x, y = blobs(80)
    settings: dict[str, Any] = {"steps": 7, "rel_step_size": 0.3, "restarts": 2, "loss": "ce"}
    for norm, eps in (("Linf", "0.15"), ("L2", "1.1")):
        threat = Threat(norm, Epsilon(eps))  # type: ignore[arg-type]
        pgd = PGD(threat, **settings).evaluate(Classifier(trained), x, y, Context(5))
        found, x_adv = judged(Curve(threat, **settings), Classifier(trained), x, y, seed=5)
        assert pgd.x_adv is not None
        assert torch.equal(x_adv, pgd.x_adv)
        for name in ("correct", "clean", "size", "forwards", "backwards"):
            assert torch.equal(found.columns[name], pgd.columns[name]), name
        assert 0 < float(pgd.columns["correct"].float().mean()) < 1


def test_the_order_of_budgets_and_repetition_do_not_matter(trained: nn.Module) -> None:
    x, y = blobs(40)
    one, images = judged(curve(BUDGETS), Classifier(trained), x, y)
    other, same = judged(curve([*BUDGETS[::-1], "0.05"]), Classifier(trained), x, y)
    assert torch.equal(one.columns["broken_at"], other.columns["broken_at"])
    assert torch.equal(images, same)


class Plane(nn.Module):
    """The first two pixels, as distances d from 1/2, decide: wrong where `height(d)` is positive."""

    def height(self, d: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        height = self.height(x.flatten(1)[:, :2] - 0.5)
        return torch.stack([-height / 2, height / 2], 1)


class Bend(Plane):
    """Uphill in d_1, waves in d_2: uphill at 0, downhill at 0.1, and higher at -0.1 than at 0.2."""

    def height(self, d: Tensor) -> Tensor:
        return 10 * d[:, 0] + torch.cos(2 * torch.pi * (d[:, 1] - 0.04) / 0.14) - 2.8


class Ditch(Plane):
    """Uphill in d_1, but wrong only in a narrow strip on the way."""

    def height(self, d: Tensor) -> Tensor:
        return torch.where((d[:, 0] - 0.1).abs() < 0.01, 1.0, d[:, 0] - 1)


# one step as long as the budget: where each climb ends is known
ONE_STEP: dict[str, Any] = {"steps": 1, "rel_step_size": 1.0, "start": "zero"}


def _on_a_plane(net: nn.Module, *budgets: str) -> tuple[list[float], Tensor]:
    x, y = torch.full((3, 1, 2, 1), 0.5), torch.zeros(3, dtype=torch.long)
    found, x_adv = judged(curve(list(budgets), **ONE_STEP), Classifier(net), x, y)
    return found.columns["broken_at"].tolist(), x_adv[0].flatten() - 0.5


def test_the_strongest_point_of_a_budget_is_a_start_at_the_next() -> None:
    # from 0 the step goes to (0.2, 0.2), from (0.1, 0.1) to (0.2, -0.1)
    assert _on_a_plane(Bend(), "0.2")[0] == [float("inf")] * 3
    at, place = _on_a_plane(Bend(), "0.1", "0.2")
    assert at == [0.2] * 3
    torch.testing.assert_close(place, torch.tensor([0.2, -0.1]))


def test_what_is_broken_stays_broken() -> None:
    assert _on_a_plane(Ditch(), "0.3")[0] == [float("inf")] * 3
    at, place = _on_a_plane(Ditch(), "0.1", "0.3")
    assert at == [0.1] * 3
    torch.testing.assert_close(place, torch.tensor([0.1, 0.0]))


def test_the_curve_lies_below_separate_attacks(trained: nn.Module) -> None:
    x, y = blobs(100)
    at = judged(curve(BUDGETS, loss="ce"), Classifier(trained), x, y)[0].columns["broken_at"]
    for eps in BUDGETS[1:]:
        alone = PGD(Threat("Linf", Epsilon(eps))).evaluate(Classifier(trained), x, y, Context(0)).columns["correct"]
        assert (at > float(Epsilon(eps))).sum() <= alone.sum()


class _Coin(nn.Module):
    """Guesses between two classes, whatever the image; a gradient reaches the image all the same."""

    def forward(self, x: Tensor) -> Tensor:
        score = torch.randn(len(x), 1, device=x.device)
        return torch.cat([score, -score], 1) + 1e-9 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("draws", [1, 4])
def test_a_guess_is_half_right_at_every_budget(draws: int) -> None:
    model, x = Randomized(_Coin(), draws), torch.rand(400, 1, 3, 3)
    y = torch.arange(400) % 2
    found, x_adv = judged(curve(BUDGETS), model, x, y)
    assert sorted(found.columns["broken_at"].unique().tolist()) == [0, float("inf")]
    assert abs(float(found.columns["correct"].float().mean()) - 0.5) < 0.1
    assert not torch.equal(x_adv[~found.columns["clean"]], x[~found.columns["clean"]])  # all are attacked


def test_a_noisy_model_is_judged_by_its_own_rule(trained: nn.Module) -> None:
    x, y = blobs(100)
    model = Randomized(NoisyInput(trained, 0.2), draws=20)
    found, x_adv = judged(curve(["0", "0.05", "0.1", "0.2"]), model, x, y)
    held = found.columns["correct"].float().mean()
    torch.manual_seed(9)
    fresh = (model.predict(x_adv) == y).float().mean()
    assert 0 < held <= found.columns["clean"].float().mean()
    assert abs(held - fresh) < 0.1
    assert found.columns["size"].min() > 0.1
    shares = found.columns["share_at"]
    assert shares.shape == found.columns["select_at"].shape == (100, 4)
    assert torch.equal(shares[:, -1], found.columns["share"])
    steps = shares.mean(0).diff()
    assert bool((steps < -0.005).all())


def test_bad_budgets_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^curve: budget 0.3 is above the eps 0.2 of the threat; expected"):
        Curve(Threat("Linf", Epsilon("0.2")), budgets=[Epsilon("0.3")])
    with pytest.raises(ValueError, match="did you mean 8/255"):
        Curve(Threat("Linf", Epsilon("0.2")), budgets=[Epsilon(8)])
    with pytest.raises(ValueError, match="less than the budget"):
        curve(["0.1"], steps=5, rel_step_size=0.1)


def test_budgets_stay_exact_from_a_spec_to_the_attack() -> None:
    settings = catalog.get("attacks", "curve").resolve({"budgets": [0, "2/255", 0.03137254901960784]})
    assert settings["budgets"] == ["0", "2/255", "8/255"]
    made = plugins.make("attacks", PluginChoice("curve", settings), JobThreat("Linf", "8/255"))
    assert made.budgets == [Epsilon(0), Epsilon("2/255"), Epsilon("8/255")]
