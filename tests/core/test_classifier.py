"""What attacking a model must leave untouched, and what is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bench.core.attack import Attack, Columns, Context
from bench.core.classifier import BatchNormMode, Classifier, Counted, frozen, keep_buffers, predicted
from bench.core.epsilon import Epsilon
from bench.core.smoothing import Smoothed
from bench.core.stochastic import Randomized, class_counts, draw_columns
from bench.core.threat import Threat


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 3))


@pytest.mark.parametrize(("mode", "moves"), [("eval", False), ("train", True), ("train_frozen_stats", False)])
def test_frozen_restores_modes_flags_and_statistics(mode: BatchNormMode, moves: bool) -> None:
    net = _net().train()
    net[2].eval()
    net[1].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.rand(5, 4).requires_grad_()
    with frozen(net, mode) as target:
        assert all(module.training == (mode != "eval") for module in target.modules())
        torch.autograd.grad(target(x).sum(), x)
    assert [m.training for m in net] == [True, True, False, True, True, True]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    assert all(p.grad is None for p in net.parameters())
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == ({"2.running_mean", "2.running_var", "2.num_batches_tracked"} if moves else set())


def test_keep_buffers_restores_bit_for_bit() -> None:
    net = _net().train()
    net(torch.rand(5, 4))
    before = [buffer.clone() for buffer in net.buffers()]
    with keep_buffers(net):
        net(torch.rand(5, 4))
        assert not torch.equal(next(net.buffers()), before[0])
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), before, strict=True))


def test_counted_counts_images() -> None:
    counted = Counted(_net().eval())
    x = torch.rand(5, 4).requires_grad_()
    torch.autograd.grad(counted(x).sum(), x)
    with torch.no_grad():
        counted(x[:2])
    assert (counted.forwards, counted.backwards) == (7, 5)
    assert not counted.training
    assert Counted(Smoothed(_net(), sigma=0.1)).stochastic
    with pytest.raises(AttributeError):
        counted.nothing_of_this_name


class _Nothing(Attack):
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        return x, {}


def test_without_a_budget_a_stochastic_model_keeps_its_clean_verdicts() -> None:
    model = Smoothed(_net().eval(), sigma=5.0, n_vote=15, alpha=0.9)
    x = torch.rand(200, 1, 2, 2)
    y = model.predict(x).mode().values.expand(200)
    found = _Nothing(Threat("Linf", Epsilon(0))).evaluate(model, x, y, Context(0))
    assert torch.equal(found.columns["correct"], found.columns["clean"])
    assert 0 < found.columns["clean"].float().mean() < 1


def test_clean_errors_are_not_attacked_and_not_robust() -> None:
    model = Classifier(_net().eval())
    x = torch.rand(20, 1, 2, 2)
    with torch.no_grad():
        y = (model.predict(x) + (torch.arange(20) % 2)) % 3
    found = _Nothing(Threat("Linf", Epsilon("8/255"))).evaluate(model, x, y, Context(0))
    assert found.columns["correct"].tolist() == found.columns["clean"].tolist() == [i % 2 == 0 for i in range(20)]
    moved = _RandomStart(Threat("Linf", Epsilon("8/255"))).evaluate(model, x, y, Context(0))
    assert (moved.columns["size"] > 0).tolist() == moved.columns["clean"].tolist()


class _RandomStart(Attack):
    """A random point of the ball."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        return self.threat.project_to_image(x, x + self.threat.radius * torch.randn_like(x)), {}


def test_the_draws_of_an_attack_are_those_of_its_seed() -> None:
    attack, model, x = _RandomStart(Threat("Linf", Epsilon("0.1"))), Classifier(_net()).eval(), torch.full((3, 4), 0.5)
    found = [attack.evaluate(model, x, model.predict(x), Context(seed)).x_adv for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_nan_is_a_prediction_of_no_class() -> None:
    class Broken(nn.Module):
        """Images of which the first pixel is 1 get NaN."""

        def forward(self, x: Tensor) -> Tensor:
            logits = torch.tensor([[2.0, 1.0, float("-inf")]]).repeat(len(x), 1)
            return logits.masked_fill(x[:, :1] == 1, float("nan"))

    x, y, net = torch.eye(2), torch.zeros(2, dtype=torch.int64), Broken()
    assert predicted(net(x)).tolist() == [-1, 0]
    assert predicted(torch.tensor([[1.0, float("nan"), 3.0]])).tolist() == [-1]
    assert Classifier(net).predict(x).tolist() == [-1, 0]
    assert Randomized(net, draws=2).predict(x).tolist() == [-1, 0]
    assert class_counts(net, x, 4).tolist() == [[0, 0, 0], [4, 0, 0]]
    columns = draw_columns(net, x, y, 0)
    assert {name: values.tolist() for name, values in columns.items()} == {
        "select": [0, 1], "share": [0, 1], "vote": [False, True], "always": [False, True]
    }  # fmt: skip
    smoothed = Smoothed(net, sigma=1e-30, n_vote=20)
    assert smoothed.predict(x).tolist() == [-1, 0]
    assert smoothed.counts(x, 5, 7, batch_size=4).tolist() == [[[0, 0, 0], [0, 0, 0]], [[5, 0, 0], [7, 0, 0]]]
