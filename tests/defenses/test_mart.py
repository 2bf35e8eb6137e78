"""MART against its formula, its limits, and saturated outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import assert_leaves_no_trace, assert_loss, assert_same, batch, cost, gradients, net, threat, weights_after

from bench.core.defense import Batch
from bench.core.threat import Norm
from defenses.mart import MART


def _formula(model: nn.Module, data: Batch, adv: Tensor, beta: float) -> Tensor:
    """One image at a time from the softmax outputs of two separate batches."""
    p, q = model(data.x).softmax(1), model(adv).softmax(1)
    total = torch.zeros((), dtype=p.dtype)
    for i, label in enumerate(data.y.tolist()):
        others = torch.cat([q[i, :label], q[i, label + 1 :]])
        bce = -q[i, label].log() - (1.0001 - others.max() + 1e-12).log()
        divergence = (p[i] * (p[i].log() - q[i].log())).sum()
        total = total + bce + beta * divergence * (1.0000001 - p[i, label])
    return total / len(data.x)


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("beta", [0.0, 5.0])
def test_loss_equals_the_formula(batch_norm: bool, beta: float) -> None:
    defense, model, reference, data = MART(threat(), beta=beta), net(batch_norm), net(batch_norm), batch()
    adv = defense.inner(model, data)
    assert_loss(defense.loss(model, data, adv), _formula(reference, data, adv, beta), model, reference)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_images_climb_cross_entropy_in_eval_mode(norm: Norm) -> None:
    defense, model, data = MART(threat(norm), steps=4, rel_step_size=0.3), net(batch_norm=True), batch()
    torch.manual_seed(5)
    adv = defense.inner(model, data)
    torch.manual_seed(5)
    start = 0.001 * torch.randn_like(data.x)
    x = data.x

    def project(delta: Tensor) -> Tensor:
        if norm == "Linf":
            return delta.clamp(-0.05, 0.05)
        return delta * (0.05 / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)

    model.eval()
    moved = (x + project(start)).clamp(0, 1)
    for _ in range(4):
        moved = moved.detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(moved), data.y), moved)
        unit = g.sign() if norm == "Linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = (x + project(moved.detach() + 0.3 * 0.05 * unit - x)).clamp(0, 1)
    torch.testing.assert_close(adv, moved, rtol=0, atol=1e-7)


def test_gradient_flows_through_weight_and_both_arguments() -> None:
    """Detaching the weight, or the clean output in KL (common errors), gives another gradient."""
    defense, model, data = MART(threat()), net(), batch()
    adv = defense.inner(model, data)
    found = gradients(defense.loss(model, data, adv)["kl"], model)

    def variant(weight: bool, clean: bool) -> list[Tensor]:
        p, q = model(data.x).softmax(1), model(adv).softmax(1)
        doubt = 1.0000001 - p.gather(1, data.y[:, None]).squeeze(1)
        p = p if clean else p.detach()
        doubt = doubt if weight else doubt.detach()
        return gradients(5 * ((p * (p.log() - q.log())).sum(1) * doubt).mean(), model)

    assert_same(found, variant(True, True))
    for weight, clean in ((False, True), (True, False)):
        wrong = variant(weight, clean)
        assert any((a - b).abs().max() > 1e-5 for a, b in zip(found, wrong, strict=True))


def test_saturated_outputs_stay_finite() -> None:
    """p' one-hot on the wrong class and on the right one, in float32."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    nn.init.constant_(model[1].weight, 0.0)
    with torch.no_grad():
        model[1].weight[0] = 500.0
    x = torch.ones(2, 1, 2, 2)
    data = Batch(x, torch.tensor([0, 1]), torch.arange(2), 0, 0.0)
    terms = MART(threat()).loss(model, data, x)
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(g).all() for g in gradients(terms["bce"] + terms["kl"], model))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_no_budget_is_boosted_cross_entropy(batch_norm: bool) -> None:
    """eps = 0: KL vanishes, so beta does not matter."""
    one, other = (weights_after(MART(threat(eps="0"), beta=b), batch_norm=batch_norm) for b in (0.0, 5.0))
    assert_same(one, other)


def test_cost() -> None:
    hooks, work = cost(MART(threat()))
    assert hooks == 26
    assert 25.7 < work < 26


def test_the_attack_leaves_no_trace() -> None:
    assert_leaves_no_trace(lambda model: MART(threat()).inner(model, batch()))


def test_a_weak_attack_is_refused() -> None:
    with pytest.raises(ValueError, match="less than the budget"):
        MART(threat(), steps=2)
