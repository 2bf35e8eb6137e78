"""Fast adversarial training: both variants by formula, and the guard against catastrophic overfitting."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import (
    Descent,
    Net,
    assert_leaves_no_trace,
    assert_loss,
    assert_same,
    batch,
    cost,
    net,
    plain_weights,
    threat,
    weights_after,
)

from bench.core.defense import Batch, Losses
from defenses.fast_at import FastAT


@pytest.mark.parametrize(("variant", "noise", "step"), [("fgsm_rs", 1.0, 1.25), ("n_fgsm", 2.0, 1.0)])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_images_and_loss_equal_the_formula(variant: Any, noise: float, step: float, batch_norm: bool) -> None:
    defense, model, reference, data = FastAT(threat(), variant=variant), net(batch_norm), net(batch_norm), batch()
    torch.manual_seed(6)
    adv = defense.inner(model, data)
    torch.manual_seed(6)
    x, eps = data.x, 0.05
    start = (x + torch.empty_like(x).uniform_(-noise * eps, noise * eps)).clamp(0, 1).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(reference(start), data.y), start)
    expected = start.detach() + step * eps * g.sign()
    if variant == "fgsm_rs":
        expected = torch.min(torch.max(expected, x - eps), x + eps)
    expected = expected.clamp(0, 1)
    torch.testing.assert_close(adv, expected, rtol=0, atol=1e-12)
    reach = float((adv - x).abs().max())
    assert reach <= eps + 1e-12 if variant == "fgsm_rs" else 2 * eps < reach <= 3 * eps
    wanted = -reference(adv).log_softmax(1)[torch.arange(10), data.y].mean()
    assert_loss(defense.loss(model, data, adv), wanted, model, reference)
    for name, value in reference.state_dict().items():  # batch statistics in the attack too: moved twice
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-12)


def test_the_step_can_be_set() -> None:
    data = batch(low=0.4, high=0.6)
    adv = FastAT(threat(), variant="n_fgsm", noise=0.0, rel_step_size=0.5).inner(net(), data)
    torch.testing.assert_close((adv - data.x).abs(), torch.full_like(data.x, 0.025), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["fgsm_rs", "n_fgsm"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_no_budget_is_plain_training(variant: Any, batch_norm: bool) -> None:
    found = weights_after(FastAT(threat(eps="0"), variant=variant), batch_norm=batch_norm)
    assert_same(found, plain_weights(batch_norm))


def test_cost() -> None:
    for variant in ("fgsm_rs", "n_fgsm"):
        hooks, work = cost(FastAT(threat(), variant=variant))  # type: ignore[arg-type]
        assert hooks == 5
        assert 4.8 < work < 5


def test_the_attack_leaves_no_trace() -> None:
    for mode in ("eval", "train_frozen_stats"):
        assert_leaves_no_trace(lambda model, m=mode: FastAT(threat(), attack_bn_mode=m).inner(model, batch()))


class _Wrecks(Descent):
    """Plain descent until told to ruin the classifier, as overfitting does within a few steps."""

    def __init__(self, model: Net) -> None:
        super().__init__(model)
        self.model, self.ruin = model, False

    def descend(self, terms: Losses) -> None:
        super().descend(terms)
        if self.ruin:
            with torch.no_grad():
                self.model.head.weight *= -1


def _easy(count: int = 40) -> Batch:
    """Two classes, far apart: black and white images."""
    y = torch.arange(count) % 2
    x = (0.2 + 0.6 * y).double().view(-1, 1, 1, 1).expand(-1, 1, 6, 6).contiguous()
    return Batch(x, y, torch.arange(count), 0, 0.0)


def _epochs(
    defense: FastAT, model: Net, updater: Descent, first: int, last: int, steps: int = 5, total: int = 100
) -> list[Losses]:
    found = []
    for epoch in range(first, last):
        for place in range(steps):
            progress = (epoch + place / steps) / total
            found.append(defense.step(model, updater, dataclasses.replace(_easy(), epoch=epoch, progress=progress)))
    return found


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_the_guard_rolls_back_and_stops() -> None:
    defense, model = FastAT(threat()), net(batch_norm=True)
    updater = _Wrecks(model)
    _epochs(defense, model, updater, 0, 8)
    assert defense.metrics(model)["guard_best"] == 1
    assert defense.metrics(model)["guard_stopped"] == 0
    good = {name.removeprefix("good."): v for name, v in defense.state_dict().items() if name.startswith("good.")}
    updater.ruin = True
    _epochs(defense, model, updater, 8, 9, steps=3)
    updater.ruin = False
    saved = {name.removeprefix("good."): v for name, v in defense.state_dict().items() if name.startswith("good.")}
    assert any(not torch.equal(saved[name], value) for name, value in good.items())  # the check before epoch 8 saved
    steps, modes = updater.steps, [m.training for m in model.modules()]
    terms = _epochs(defense, model, updater, 9, 11)
    assert updater.steps == steps
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    found = {name: float(value) for name, value in defense.metrics(model).items()}
    assert found == {"guard_stopped": 1, "guard_best": 1, "guard_checks": 9, "guard_skipped_steps": 10}
    assert all(float(t["ce"]) == float(terms[0]["ce"]) and not t["ce"].requires_grad for t in terms)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    # the state survives a kill: the fresh guard is stopped too
    fresh = FastAT(threat())
    fresh.load_state_dict(defense.state_dict())
    before = _state(model)
    assert float(_epochs(fresh, model, updater, 11, 12)[0]["ce"]) == float(terms[0]["ce"])
    assert updater.steps == steps
    assert fresh.metrics(model)["guard_skipped_steps"] == 15
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_guard_also_sees_the_last_step_of_training() -> None:
    defense, model = FastAT(threat()), net()
    updater = _Wrecks(model)
    _epochs(defense, model, updater, 0, 3, total=4)
    updater.ruin = True
    _epochs(defense, model, updater, 3, 4, total=4)  # five ruined steps: an odd number of sign flips
    assert defense.metrics(model)["guard_stopped"] == 1
    with torch.no_grad():
        assert (model(_easy().x).argmax(1) == _easy().y).all()


def test_without_the_guard_the_ruin_stays() -> None:
    defense, model = FastAT(threat(), guard=False), net()
    updater = _Wrecks(model)
    _epochs(defense, model, updater, 0, 3)
    updater.ruin = True
    _epochs(defense, model, updater, 3, 4, steps=1)
    updater.ruin = False
    steps = updater.steps
    _epochs(defense, model, updater, 4, 5, steps=1)
    assert updater.steps == steps + 1
    assert defense.metrics(model)["guard_stopped"] == 0
    assert not any(name.startswith("good.") for name in defense.state_dict())


def test_the_guard_allows_a_fall_by_less_than_the_largest_one() -> None:
    defense, model = FastAT(threat(), max_drop=1.0), net()
    updater = _Wrecks(model)
    _epochs(defense, model, updater, 0, 3)
    updater.ruin = True
    _epochs(defense, model, updater, 3, 5, steps=1)
    assert defense.metrics(model)["guard_stopped"] == 0


def test_a_sound_run_is_not_disturbed_by_the_guard() -> None:
    runs = []
    for guard in (True, False):
        model = net(batch_norm=True)
        torch.manual_seed(8)
        _epochs(FastAT(threat(), guard=guard), model, Descent(model), 0, 4, total=4)
        runs.append(_state(model))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_a_warm_up_of_the_budget_does_not_move_the_guard() -> None:
    """The guard attacks with all of eps while training is still at a part of it."""
    defense, model = FastAT(threat(eps="0.5")), net()
    updater = Descent(model)
    full = defense.threat
    for epoch in range(4):
        defense.threat = full.scaled(0.01)
        _epochs(defense, model, updater, epoch, epoch + 1)
    assert defense.metrics(model)["guard_best"] < 0.6  # 0.5 covers the whole gap between the classes
