"""Smaller passes after running out of memory: the same verdicts and gradients, less held for the way back."""

from __future__ import annotations

import copy

import pytest

from bench.planning.evaluations import shard_of
from bench.planning.job_fields import JobThreat, PluginChoice

torch = pytest.importorskip("torch")

from fake_jobs import evaluate, train  # noqa: E402
from torch import nn  # noqa: E402

from bench import plugins  # noqa: E402
from bench.core.attack import Context  # noqa: E402
from bench.core.classifier import Classifier  # noqa: E402
from bench.core.epsilon import Epsilon  # noqa: E402
from bench.jobs import microbatch as passes  # noqa: E402


class Watched(nn.Module):
    """Notes how many images each pass held."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        return self.inner(x)


@pytest.fixture
def model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(Watched()).eval()


def test_a_block_is_halved_as_often_as_told() -> None:
    job = evaluate(train(0), n=10_000)
    assert passes.rows(job, 0) is None
    assert [passes.rows(job, times) for times in (1, 2, 3)] == [250, 125, 62]
    assert passes.rows(evaluate(train(0), n=100), 1) == 50
    shard = shard_of(job, 500, 580)
    assert passes.rows(shard, 3) == 10
    assert passes.rows(train(0), 2) is None


def test_no_pass_is_larger_and_logits_and_gradients_are_the_same(model: Classifier) -> None:
    x = torch.rand(20, 1, 4, 4, requires_grad=True)
    whole = model(x)
    (gradient,) = torch.autograd.grad(whole.logsumexp(1).sum(), x)
    held = copy.deepcopy(model)
    model.net.seen.clear()
    passes.limit(model, 6)
    cut = model.surrogate()(x)
    (again,) = torch.autograd.grad(cut.logsumexp(1).sum(), x)
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(again, gradient, rtol=1e-6, atol=1e-6)
    assert max(model.net.seen) == 6
    assert sorted(model.net.seen) == sorted([6, 6, 6, 2] * 2)  # each part once more on the way back
    with torch.no_grad():
        assert torch.equal(model.predict(x), held.predict(x))
    assert model.net.seen[-4:] == [6, 6, 6, 2]


def test_a_copy_of_a_limited_model_runs_its_own_weights(model: Classifier) -> None:
    passes.limit(model, 6)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        assert float(other(torch.rand(20, 1, 4, 4)).abs().sum()) == 0.0


def test_verdicts_of_an_attack_do_not_change(model: Classifier) -> None:
    x, y = torch.rand(30, 1, 4, 4), torch.arange(30) % 4
    with torch.no_grad():
        y = torch.where(torch.arange(30) % 3 > 0, model.predict(x), y)
    attack = plugins.make("attacks", PluginChoice("pgd", {"steps": 10}), JobThreat("Linf", str(Epsilon(0.1))))
    before = attack.evaluate(model, x, y, Context(7))
    passes.limit(model, 4)
    after = attack.evaluate(model, x, y, Context(7))
    assert 0 < int(before.columns["correct"].sum()) < 30
    assert torch.equal(before.columns["correct"], after.columns["correct"])
    assert torch.equal(before.columns["forwards"], after.columns["forwards"])
    torch.testing.assert_close(after.x_adv, before.x_adv, rtol=0, atol=1e-6)


def test_less_is_held_for_the_way_back(model: Classifier) -> None:
    def held() -> int:
        sizes: dict[int, int] = {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(torch.rand(64, 1, 4, 4, requires_grad=True)).sum()
        return sum(sizes.values())

    whole = held()
    passes.limit(model, 8)
    assert held() < whole / 2


def test_a_model_that_draws_is_refused(model: Classifier) -> None:
    model.stochastic = True
    with pytest.raises(passes.FixedBatch, match="smaller passes would change its noise draws"):
        passes.limit(model, 8)
