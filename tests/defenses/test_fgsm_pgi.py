"""FGSM with prior-guided initialization: three epochs by formula, what is kept for each image, limits, cost, state."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from toys import Descent, assert_same, batch, cost, differ, net, plain_weights, threat, weights_after

from bench.core.defense import Batch
from defenses.fgsm_pgi import FGSMPGI

EPS = 0.05


def _part(data: Batch, rows: list[int], epoch: int) -> Batch:
    """Some images of a training set, in this order."""
    index = torch.tensor(rows)
    return dataclasses.replace(data, x=data.x[index], y=data.y[index], index=index, epoch=epoch)


# three epochs of a training set of ten images, in other orders; image 9 is not in the first, as a dropped last batch
EPOCHS = [[[8, 1, 2, 3], [4, 5, 6, 7, 0]], [[9, 8, 7, 6], [0, 1, 2, 3, 4, 5]], [[2, 9], [4, 0, 1, 3]]]


@pytest.mark.parametrize("decay", [0.3, 0.0])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_epochs_equal_the_formula(decay: float, batch_norm: bool) -> None:
    """Weights, statistics, perturbations and momenta after each step, kept in a dict by a loop over images."""
    defense, model, reference = FGSMPGI(threat(), decay=decay), net(batch_norm), net(batch_norm)
    updater, mine, data = Descent(model), torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9), batch()
    prior: dict[int, Tensor] = {}
    momentum: dict[int, Tensor] = {}
    for epoch, orders in enumerate(EPOCHS):
        for rows in orders:
            part = _part(data, rows, epoch)
            torch.manual_seed(epoch)
            terms = defense.step(model, updater, part)
            torch.manual_seed(epoch)
            new = max(0, max(rows) + 1 - len(prior))
            signs = 2 * torch.empty(new, 1, 6, 6, dtype=torch.float64).bernoulli_(0.5) - 1
            for sign in signs:
                prior[len(prior)], momentum[len(momentum)] = EPS * sign, torch.zeros_like(sign)

            x = part.x
            start = torch.stack([(x[i] + prior[row]).clamp(0, 1) for i, row in enumerate(rows)]).requires_grad_()
            before = reference(start)
            (g,) = torch.autograd.grad(F.cross_entropy(before, part.y), start, retain_graph=True)
            moved = (start.detach() + EPS * g.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
            after = reference(moved)
            loss = -after.log_softmax(1)[torch.arange(len(rows)), part.y].mean()
            loss = loss + 10 / 4 * ((after - before) ** 2).sum(1).mean()
            mine.zero_grad()
            loss.backward()
            mine.step()
            size = sum(float(each.abs().sum()) for each in g)
            for i, row in enumerate(rows):
                momentum[row] = g[i] / size + decay * momentum[row]
                ahead = (start[i].detach() + EPS * momentum[row].sign()).clamp(x[i] - EPS, x[i] + EPS).clamp(0, 1)
                prior[row] = ahead - x[i]

            torch.testing.assert_close(torch.stack(list(terms.values())).sum(), loss, rtol=1e-9, atol=0)
            for name, value in reference.state_dict().items():
                torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=1e-9)
            state = defense.state_dict()
            known = torch.stack([prior[row] for row in sorted(prior)])
            torch.testing.assert_close(state["prior"], known, rtol=0, atol=1e-9)
            if decay:
                kept = torch.stack([momentum[row] for row in sorted(momentum)])
                torch.testing.assert_close(state["momentum"], kept, rtol=0, atol=1e-9)
            else:
                assert state["momentum"].numel() == 0
    assert len(state["prior"]) == 10


def test_the_images_are_inside_ball_and_box() -> None:
    defense, model, data = FGSMPGI(threat()), net(), batch()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for epoch in range(3):
        defense.step(model, Descent(model), dataclasses.replace(data, epoch=epoch))
    assert len(seen) == 6
    for images in seen:
        defense.threat.check(data.x, images)
    kept = defense.state_dict()["prior"]
    defense.threat.check(data.x, data.x + kept)


def test_perturbations_are_random_again_after_so_many_epochs() -> None:
    defense, model, data = FGSMPGI(threat(), reset=2), net(), batch()
    updater, starts = Descent(model), []
    for epoch in range(5):
        torch.manual_seed(8)
        starts.append(defense.inner(model, dataclasses.replace(data, epoch=epoch)))
        defense.step(model, updater, dataclasses.replace(data, epoch=epoch))
    assert torch.equal(starts[0], starts[2])  # of the same draw
    assert torch.equal(starts[0], starts[4])
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[3])


def test_a_warm_up_keeps_starts_inside_the_present_ball_and_does_not_shrink_the_random_signs() -> None:
    defense, data = FGSMPGI(threat()), batch(low=0.4, high=0.6)
    full = defense.threat
    defense.threat = full.scaled(0.1)
    start = defense.inner(net(), data)
    torch.testing.assert_close((start - data.x).abs(), torch.full_like(data.x, 0.1 * EPS), rtol=0, atol=1e-12)
    defense.threat = full
    start = defense.inner(net(), data)
    torch.testing.assert_close((start - data.x).abs(), torch.full_like(data.x, EPS), rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_limits(batch_norm: bool) -> None:
    plain = plain_weights(batch_norm)
    assert_same(weights_after(FGSMPGI(threat(eps="0")), batch_norm=batch_norm), plain, 1e-8)
    assert differ(weights_after(FGSMPGI(threat()), batch_norm=batch_norm), plain)
    # where nothing is kept and nothing pulls the logits together, FGSM from random signs
    defense, model, reference, data = FGSMPGI(threat(), lam=0.0), net(batch_norm), net(batch_norm), batch(epoch=0)
    torch.manual_seed(2)
    start = defense.inner(model, data).requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(reference(start), data.y), start)
    moved = (start.detach() + EPS * g.sign()).clamp(data.x - EPS, data.x + EPS).clamp(0, 1)
    mine = torch.optim.SGD(reference.parameters(), lr=0.1)
    F.cross_entropy(reference(moved), data.y).backward()
    mine.step()
    defense.step(model, Descent(model), data)
    assert_same([p.detach() for p in model.parameters()], [p.detach() for p in reference.parameters()])


def test_an_image_without_a_gradient_keeps_its_start() -> None:
    model, data = net(), batch(epoch=0)
    torch.nn.init.zeros_(model.head.weight)
    defense = FGSMPGI(threat())
    start = defense.inner(model, data)
    defense.step(model, Descent(model, lr=0.0), data)
    state = defense.state_dict()
    torch.testing.assert_close(data.x + state["prior"], start, rtol=0, atol=1e-12)
    assert state["momentum"].abs().max() == 0


def test_cost() -> None:
    hooks, work = cost(FGSMPGI(threat()))
    assert hooks == 3 + 5  # hooks take the gradient at the start for one that reaches the weights too
    assert 6.7 < work < 7


def test_the_state_survives_a_kill() -> None:
    data, model, defense = batch(), net(), FGSMPGI(threat())
    updater = Descent(model)
    defense.step(model, updater, _part(data, [0, 3, 5], 0))
    fresh = FGSMPGI(threat())
    fresh.load_state_dict({name: value.clone() for name, value in defense.state_dict().items()})
    after: list[dict[str, Any]] = []
    for one in (defense, fresh):
        torch.manual_seed(9)
        again = net()
        for epoch, rows in ((0, [9, 1]), (1, [5, 9, 2, 0])):
            one.step(again, Descent(again), _part(data, rows, epoch))
        after.append({**one.state_dict(), **again.state_dict()})
    for name, value in after[0].items():
        assert torch.equal(value, after[1][name]), name
