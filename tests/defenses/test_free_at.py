"""Free adversarial training: replays by formula, what persists, and its cost."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from toys import (
    Descent,
    assert_leaves_no_trace,
    assert_same,
    batch,
    cost,
    differ,
    net,
    plain_weights,
    threat,
    weights_after,
)

from bench.core.defense import Losses
from bench.core.threat import Norm
from bench.training.optimizer import build_updater
from bench.training.recipe import Recipe
from defenses.free_at import FreeAT


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_replays_equal_the_formula(norm: Norm, batch_norm: bool) -> None:
    """Two minibatches, the second one smaller: weights, perturbation and loss after three replays each."""
    eps, step = 0.05, 0.6
    defense, model, reference = FreeAT(threat(norm), replays=3, rel_step_size=step), net(batch_norm), net(batch_norm)
    updater, mine = Descent(model), torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    full = batch()
    small = dataclasses.replace(full, x=full.x[4:] ** 2, y=full.y[4:], index=full.index[4:])
    delta = torch.zeros_like(full.x)
    for data in (full, small):
        terms = defense.step(model, updater, data)
        for _ in range(3):
            n = len(data.x)
            leaf = (data.x + delta[:n]).clamp(0, 1).requires_grad_()
            loss = -reference(leaf).log_softmax(1)[torch.arange(n), data.y].mean()
            mine.zero_grad()
            loss.backward()
            mine.step()
            g = leaf.grad
            assert g is not None
            unit = g.sign() if norm == "Linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            moved = delta[:n] + step * eps * unit
            length = moved.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            moved = moved.clamp(-eps, eps) if norm == "Linf" else moved * (eps / length).clamp(max=1)
            delta = torch.cat([moved, delta[n:]])
        torch.testing.assert_close(terms["ce"], loss, rtol=1e-8, atol=0)
        assert_same([p.detach() for p in model.parameters()], [p.detach() for p in reference.parameters()], 1e-8)
        torch.testing.assert_close(defense.state_dict()["delta"], delta, rtol=0, atol=1e-7)
    assert updater.steps == 6


def test_first_gradients_equal_plain_ones_to_rounding() -> None:
    """The one backward pass gives exactly the weight gradient and exactly the image gradient."""
    model, data, seen = net(), batch(), {}

    class Look(Descent):
        def descend(self, terms: Losses) -> None:
            super().descend(terms)
            seen["weights"] = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    x = data.x.clone().requires_grad_()
    loss = F.cross_entropy(model(x), data.y)
    *weights, image = torch.autograd.grad(loss, [*model.parameters(), x])
    defense = FreeAT(threat(), replays=1)
    defense.step(model, Look(model), data)
    assert_same(seen["weights"], weights)
    torch.testing.assert_close(defense.state_dict()["delta"], 0.05 * image.sign(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_limits(batch_norm: bool) -> None:
    plain = plain_weights(batch_norm)
    assert_same(weights_after(FreeAT(threat(eps="0"), replays=1), batch_norm=batch_norm), plain)
    assert_same(weights_after(FreeAT(threat(eps="0"), replays=3), steps=1, batch_norm=batch_norm), plain)
    # m = 1: the first update is plain, later ones meet the perturbation that persists
    assert_same(
        weights_after(FreeAT(threat(), replays=1), steps=1), weights_after(FreeAT(threat(eps="0"), replays=1), steps=1)
    )
    assert differ(weights_after(FreeAT(threat(), replays=1), batch_norm=batch_norm), plain)


@pytest.mark.parametrize("replays", [1, 4])
def test_cost(replays: int) -> None:
    hooks, work = cost(FreeAT(threat(), replays=replays))
    assert hooks == 3 * replays
    assert work == pytest.approx(3 * replays)  # images learn too, so the first layer saves nothing


def test_the_state_survives_a_kill() -> None:
    model, data = net(), batch()
    defense, updater = FreeAT(threat(), replays=2), Descent(model)
    assert defense.state_dict() == {}
    defense.step(model, updater, data)
    fresh = FreeAT(threat(), replays=2)
    fresh.load_state_dict({name: value.clone() for name, value in defense.state_dict().items()})
    assert torch.equal(fresh.inner(model, data), defense.inner(model, data))
    fresh.load_state_dict({})
    assert torch.equal(fresh.inner(model, data), data.x)


def test_a_larger_or_other_batch_starts_from_zero() -> None:
    model, defense = net(), FreeAT(threat(), replays=1)
    defense.step(model, Descent(model), batch(6))
    larger = batch(10)
    assert torch.equal(defense.inner(model, larger), larger.x)


def test_the_attack_leaves_no_trace() -> None:
    assert_leaves_no_trace(lambda model: FreeAT(threat()).inner(model, batch()))


def test_an_updater_without_a_backward_pass_is_refused() -> None:
    class Idle:
        def descend(self, terms: Losses) -> None:
            """Does nothing."""

    with pytest.raises(ValueError, match="needs its backward pass"):
        FreeAT(threat()).step(net(), Idle(), batch())


def test_the_schedule_ends_with_the_training_and_not_after_its_first_replays() -> None:
    defense = FreeAT(threat("Linf"), replays=4)
    linear = torch.nn.Linear(2, 3)
    settings = {"optimizer": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "schedule": "cosine"}
    recipe = Recipe.model_validate({**settings, "epochs": 2, "batch_size": 8, "augment": False})
    updater = build_updater(defense, linear, recipe, steps_per_epoch=5)
    rates = []
    for _ in range(2 * 5 * defense.replays):
        rates.append(updater.optimizer.param_groups[0]["lr"])
        updater.descend({"ce": linear(torch.ones(1, 2)).square().sum()})
    assert rates[len(rates) // 2] == pytest.approx(0.5)
    assert updater.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)
