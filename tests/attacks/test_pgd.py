"""PGD and FGSM against a linear model, whose margin is known, and against the traps that weaken an attack."""

from __future__ import annotations

import functools
import gzip
import os
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import pgd
from attacks.autoattack import AutoAttack
from attacks.fgsm import FGSM
from attacks.pgd import PGD
from attacks.square import Square
from attacks.torchattacks import TorchAttacks
from bench.core.attack import Attack, Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.pgd import AttackLoss, dlr
from bench.core.smoothing import Smoothed
from bench.core.threat import Norm, Threat


class Linear(nn.Module):
    """Two classes with logits +-(w x + b) / 2, and a third that never wins."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(pixels))
        self.origin = torch.full((pixels,), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) - self.origin) @ self.w / 2
        return torch.stack([score, -score, torch.full_like(score, -100.0)], dim=1)


def _linear(norm: Norm) -> tuple[Classifier, Tensor, Tensor, Tensor]:
    """A linear model, images well inside the box, their labels and exact distances |w x + b| / ||w||_dual."""
    torch.manual_seed(1)
    net = Linear(64)
    x = 0.5 + 0.04 * torch.randn(40, 1, 8, 8)
    model = Classifier(net)
    with torch.no_grad():
        score = (x.flatten(1) - 0.5) @ net.w
        distance = score.abs() / Threat(norm, Epsilon(1)).dual_norm(net.w[None])
        return model, x, model.predict(x), distance


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
def test_pgd_fails_just_below_the_margin_and_succeeds_just_above(norm: Norm, loss: AttackLoss) -> None:
    model, x, y, distance = _linear(norm)
    for share, broken in ((0.97, False), (1.03, True)):
        for i in range(0, len(x), 8):
            threat = Threat(norm, Epsilon(share * float(distance[i])))
            attack = PGD(threat, steps=20, rel_step_size=0.25, loss=loss)
            found = attack.evaluate(model, x[i : i + 1], y[i : i + 1], Context(0))
            assert found.columns["correct"].item() is not broken
            assert found.columns["size"].item() <= threat.radius + 1e-6


def test_l1_steps_pass_over_pixels_that_cannot_move() -> None:
    torch.manual_seed(2)
    net = Linear(64)
    model, x = Classifier(net), 0.5 + 0.04 * torch.randn(1, 1, 8, 8)
    label = torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        net.w[:8] *= 20  # the pixels that count most stand at the edge already, the gradient pointing out of the box
        x.view(-1)[:8] = (net.w[:8] < 0).float()
        net.origin = x.flatten() - 0.4 * net.w / net.w.square().sum()
        score = (x.flatten(1) - net.origin) @ net.w
        distance = float(score) / float(net.w[8:].abs().max())
    for share, broken in ((0.97, False), (1.03, True)):
        attack = PGD(Threat("L1", Epsilon(share * distance)), steps=20, rel_step_size=0.25)
        assert attack.evaluate(model, x, label, Context(0)).columns["correct"].item() is not broken


@pytest.mark.parametrize(("sparsity", "moved"), [(0.0, 64), (0.75, 16), (0.99, 1)])
def test_an_l1_step_moves_the_largest_coordinates_by_the_same(sparsity: float, moved: int) -> None:
    model, x, y, distance = _linear("L1")
    threat = Threat("L1", Epsilon(float(distance.min()) / 2))
    attack = PGD(threat, steps=1, rel_step_size=1.0, start="zero", sparsity=sparsity)
    found = attack.evaluate(model, x, y, Context(0))
    assert found.x_adv is not None
    change = (found.x_adv - x).flatten(1)
    w = model.net.w.detach()
    towards = torch.where(y[:, None] == 0, -w.sign(), w.sign())
    chosen = torch.zeros_like(w).index_fill_(0, w.abs().topk(moved).indices, threat.radius / moved)
    torch.testing.assert_close(change, towards * chosen, rtol=0, atol=1e-7)
    steps = attack._direction(torch.randn_like(x), x)  # before any projection
    torch.testing.assert_close(threat.norm_of(steps), torch.ones(len(x)))


class _Scripted(Classifier):
    """Two linear logits whose weight is another one at each pass, in a known order."""

    stochastic = True

    def __init__(self, weights: Tensor) -> None:
        super().__init__(nn.Identity())
        self.weights, self.passes = weights, 0

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) - 0.5) @ self.weights[self.passes % len(self.weights)]
        self.passes += 1
        return torch.stack([score, -score], dim=1)


def test_eot_climbs_the_mean_gradient_of_fresh_draws() -> None:
    torch.manual_seed(0)
    weights, x = torch.randn(6, 16), 0.5 + 0.01 * torch.randn(5, 1, 4, 4)
    y = torch.tensor([0, 1, 0, 1, 1])
    threat = Threat("L2", Epsilon("0.1"))
    for eot in (1, 3, 6):
        model = _Scripted(weights)
        attack = PGD(threat, steps=1, rel_step_size=1.0, start="zero", loss="cw", eot=eot)
        found, _ = attack.perturb(model, x, y, Context(0))
        assert model.passes == eot + 1
        mean = weights[:eot].mean(0)
        change = torch.where(y[:, None] == 0, -1, 1) * 0.1 * mean / mean.norm()
        torch.testing.assert_close((found - x).flatten(1), change, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_eot_changes_nothing_for_a_deterministic_model(norm: Norm) -> None:
    x, y = blobs(30)
    model, threat = Classifier(_conv()), Threat(norm, Epsilon({"Linf": "0.1", "L2": "0.6", "L1": "3"}[norm]))
    one, other = (PGD(threat, steps=8, rel_step_size=0.25, eot=n).evaluate(model, x, y, Context(0)) for n in (1, 3))
    assert one.x_adv is not None
    assert other.x_adv is not None
    assert torch.equal(one.x_adv, other.x_adv)
    assert torch.equal(one.columns["forwards"], other.columns["forwards"])
    assert 0 < one.columns["correct"].float().mean() < 1


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fgsm_is_exact_on_a_linear_model(norm: Norm) -> None:
    model, x, y, distance = _linear(norm)
    threat = Threat(norm, Epsilon(float(distance.median())))
    found = FGSM(threat).evaluate(model, x, y, Context(0))
    sure = (distance / distance.median() - 1).abs() > 1e-3
    assert torch.equal(found.columns["correct"][sure], (distance > distance.median())[sure])


@functools.cache
def _conv(channels: int = 1, classes: int = 5) -> nn.Module:
    """A small network trained on `blobs`."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 36, classes)
    )
    x, y = blobs(400, channels)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval()


def blobs(count: int, channels: int = 1, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Images `b c 12 12`, most pixels exactly 0 or 1, with a noisy patch whose place is the class."""
    generator = torch.Generator().manual_seed(count)
    y = torch.arange(count) % classes
    x = (torch.rand(count, channels, 12, 12, generator=generator) < 0.1).float()
    for i in range(count):
        row, column = divmod(int(y[i]), 3)
        patch = 0.5 + 0.5 * torch.rand(channels, 3, 3, generator=generator)
        x[i, :, 4 * row : 4 * row + 3, 4 * column : 4 * column + 3] = patch
    return x, y


def _inside_graph_pgd(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> Tensor:
    """The clipping trap: the clip to the box is differentiated, so pixels outside lose their gradient."""
    delta = torch.empty_like(x).uniform_(-eps, eps)
    for _ in range(steps):
        delta.requires_grad_(True)
        loss = F.cross_entropy(model((x + delta).clamp(0, 1)), y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, delta)
        delta = (delta.detach() + 0.1 * eps * grad.sign()).clamp(-eps, eps)
    return (x + delta).clamp(0, 1)


def test_images_at_the_edge_of_the_box_are_no_shelter() -> None:
    net = _conv()
    x, y = blobs(150)
    model, threat = Classifier(net), Threat("Linf", Epsilon("0.2"))
    found = PGD(threat, steps=20).evaluate(model, x, y, Context(0)).columns["correct"].float().mean()
    trapped = model.predict(_inside_graph_pgd(net, x, y, threat.radius, 20)) == y
    with torch.no_grad():
        signs = model.predict(threat.project_to_image(x, x + 0.2 * torch.randn_like(x).sign())) == y
    assert found < trapped.float().mean() - 0.3
    assert found < signs.float().mean()


@pytest.mark.parametrize(("norm", "method"), [("Linf", "PGD"), ("L2", "PGDL2")])
@pytest.mark.parametrize("eps", ["0.15", "0.2"])
def test_pgd_is_no_weaker_than_torchattacks(norm: Norm, method: str, eps: str) -> None:
    pytest.importorskip("torchattacks")
    x, y = blobs(150)
    model = Classifier(_conv())
    threat = Threat(norm, Epsilon(eps) if norm == "Linf" else Epsilon(6 * Epsilon(eps)))
    ours = PGD(threat, steps=20).evaluate(model, x, y, Context(0))
    theirs = TorchAttacks(threat, method=method, kwargs={"steps": 20, "alpha": 0.1 * threat.radius})
    accuracy = ours.columns["correct"].float().mean()
    assert accuracy <= theirs.evaluate(model, x, y, Context(0)).columns["correct"].float().mean()
    assert 0 < accuracy < 1


def test_cost_is_two_passes_a_step_and_one() -> None:
    x, y = blobs(40)
    model, threat = Classifier(_conv()), Threat("Linf", Epsilon("0.001"))
    found = PGD(threat, steps=7, rel_step_size=0.2).evaluate(model, x, y, Context(0)).columns
    attacked = found["clean"].float().mean()
    assert found["forwards"].unique().tolist() == pytest.approx([8 * float(attacked)])
    assert found["backwards"].unique().tolist() == pytest.approx([7 * float(attacked)])


def test_more_steps_restarts_and_budget_never_help_the_model() -> None:
    x, y = blobs(100)
    model = Classifier(_conv())

    def accuracy(eps: str, steps: int = 10, restarts: int = 1) -> float:
        attack = PGD(Threat("Linf", Epsilon(eps)), steps=steps, rel_step_size=0.25, restarts=restarts, loss="cw")
        return float(attack.evaluate(model, x, y, Context(3)).columns["correct"].float().mean())

    assert accuracy("0") >= accuracy("0.1") >= accuracy("0.2") >= accuracy("0.5") == 0
    assert 0 < accuracy("0.2", restarts=3) <= accuracy("0.2")
    assert accuracy("0.2", steps=40) <= accuracy("0.2") + 0.02


ADAPTERS = [FGSM, PGD, Square, AutoAttack, TorchAttacks]


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("smoothed", [False, True])
def test_without_a_budget_it_is_clean_accuracy(adapter: type[Attack], smoothed: bool) -> None:
    x, y = blobs(60)
    y = torch.where(torch.arange(60) < 5, (y + 1) % 5, y)
    model = Smoothed(_conv(), sigma=0.3, n_vote=20) if smoothed else Classifier(_conv())
    found = adapter(Threat("Linf", Epsilon(0))).evaluate(model, x, y, Context(0))
    assert torch.equal(found.columns["correct"], found.columns["clean"])
    assert found.x_adv is not None
    assert torch.equal(found.x_adv, x)
    if not smoothed:
        assert torch.equal(found.columns["correct"], model.predict(x) == y)


def test_weak_settings_are_refused() -> None:
    threat = Threat("Linf", Epsilon("0.1"))
    with pytest.raises(ValueError, match="less than the budget"):
        PGD(threat, steps=5, rel_step_size=0.1)
    with pytest.raises(ValueError, match="restarts equal"):
        PGD(threat, start="zero", restarts=2)
    with pytest.raises(ValueError, match="gradient of loss=kl is 0"):
        PGD(threat, start="zero", loss="kl")
    assert FGSM(Threat("L1", Epsilon(1))).unsupported_reason(Classifier(_conv())) == "no L1 version; norms: Linf, L2"


def _mnist(root: Path, train: bool, count: int) -> tuple[Tensor, Tensor]:
    """The first images and labels of MNIST, read from torchvision's folder without torchvision."""

    def read(name: str, header: int) -> Tensor:
        path = root / "MNIST" / "raw" / name
        content = path.read_bytes() if path.exists() else gzip.decompress(path.with_name(name + ".gz").read_bytes())
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:]

    part = "train" if train else "t10k"
    images = read(f"{part}-images-idx3-ubyte", 16)[: count * 784].view(count, 1, 28, 28)
    return images.float() / 255, read(f"{part}-labels-idx1-ubyte", 8)[:count].long()


@functools.cache
def _mnist_net(root: Path) -> nn.Module:
    """A LeNet-like network after two short epochs of standard training: some seconds."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip
    x, y = _mnist(root, True, 10_000)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for rows in torch.randperm(2 * len(x)).remainder(len(x)).split(128):
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), y[rows]).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif("BENCH_DATA" not in os.environ, reason="needs real MNIST: set BENCH_DATA")
@pytest.mark.parametrize(("loss", "rival"), [("ce", "apgd-ce"), ("cw", "apgd-dlr")])
def test_pgd_40_is_as_strong_as_apgd_on_mnist(
    mnist_root: Path, loss: AttackLoss, rival: Literal["apgd-ce", "apgd-dlr"]
) -> None:
    # like with like: on this net PGD-40 on the margin leaves 57.5 % standing, on cross-entropy 56 %, APGD-CE x5 55 %
    model, threat = Classifier(_mnist_net(mnist_root)), Threat("Linf", Epsilon("0.1"))
    x, y = _mnist(mnist_root, False, 200)
    ours = PGD(threat, steps=40, rel_step_size=0.1, loss=loss).evaluate(model, x, y, Context(0)).columns
    apgd = AutoAttack(threat, version="custom", attacks_to_run=[rival]).evaluate(model, x, y, Context(0)).columns
    assert ours["clean"].float().mean() > 0.93
    assert ours["correct"].float().mean() <= apgd["correct"].float().mean() + 0.02
    assert ours["correct"].float().mean() < 0.9


def test_the_difference_of_logits_ratio_by_hand() -> None:
    logits, y = torch.tensor([[4.0, 1.0, 2.0, 0.0], [1.0, 2.0, 4.0, 0.0]]), torch.tensor([0, 1])
    torch.testing.assert_close(dlr(logits, y), torch.tensor([(2 - 4) / (4 - 1), (4 - 2) / (4 - 1)]))
    torch.testing.assert_close(dlr(3 * logits + 5, y), dlr(logits, y))


@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_images_whose_iterates_repeat_leave_with_the_same_results(
    loss: AttackLoss, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long attack with and without a look at repeats: equal images bit for bit, in fewer passes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 12), nn.Tanh(), nn.Linear(12, 4))
    model, x = Classifier(net.double()).eval(), torch.rand(30, 1, 8, 8, dtype=torch.float64)
    attack = PGD(Threat("Linf", Epsilon("0.02")), steps=100, rel_step_size=0.25, loss=loss, restarts=2)
    y = model.predict(x)
    early = attack.evaluate(model, x, y, Context(0))
    monkeypatch.setattr(pgd, "LONG", 101)
    whole = attack.evaluate(model, x, y, Context(0))
    assert early.x_adv is not None
    assert whole.x_adv is not None
    assert torch.equal(early.x_adv, whole.x_adv)
    assert torch.equal(early.columns["correct"], whole.columns["correct"])
    assert int(early.columns["correct"].sum()) > 0
    assert float(early.columns["forwards"][0]) < 0.8 * float(whole.columns["forwards"][0])
    assert float(early.columns["backwards"][0]) < 0.8 * float(whole.columns["backwards"][0])
