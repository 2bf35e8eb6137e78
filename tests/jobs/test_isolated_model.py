"""Models of users that disturb what is around them: the numbers are those of the same model that does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Bench
from torch import Tensor, nn

from bench.core.classifier import frozen
from bench.core.rng import scope
from bench.jobs.isolated_model import IsolatedModel
from bench.planning.job import EvaluateJob
from bench.records.store import Store


class Around(nn.Module):
    """A linear net, and what its forward pass does besides."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.does = nn.Sequential(nn.Flatten(), nn.Linear(18, 4)), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self.net, x)


def model(forward: Callable[[nn.Module, Tensor], Tensor], stochastic: bool = False) -> IsolatedModel:
    return IsolatedModel(Around(forward), stochastic).eval()


def images() -> Tensor:
    with scope(1):
        return torch.rand(5, 2, 3, 3)


def centered(net: nn.Module, x: Tensor) -> Tensor:
    x -= 0.5
    return net(x)


def reseeding(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return net(x)


def doubling(net: nn.Module, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return net(x)


def descending(net: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        net(x.detach()).sum().backward()
    return net(x)


def adapting(net: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(net(x.detach()).logsumexp(1).mean(), [net[1].bias])
    return net(x) - gradient


def test_the_images_stay_and_their_gradient_arrives() -> None:
    net, x = model(centered), images()
    assert net.writes_into(x)
    assert not model(lambda net, x: net(x)).writes_into(x)
    leaf = x.clone().requires_grad_()
    net(leaf).sum().backward()
    assert torch.equal(leaf, x)
    assert leaf.grad is not None
    expected = net.net.net[1].weight.sum(0).view(1, 2, 3, 3).expand(5, 2, 3, 3)  # type: ignore[index,union-attr]
    torch.testing.assert_close(leaf.grad, expected)


def test_seeds_that_a_net_sets_do_not_reach_the_attack() -> None:
    net, x = model(reseeding), images()
    drawn = []
    for passes in (0, 1, 2):
        with scope(5):
            for _ in range(passes):
                net(x)
            drawn.append((torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()))
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_stochastic_net_leaves_the_generators_that_it_does_not_use() -> None:
    net, x, drawn = model(lambda net, x: net(x + torch.randn_like(x)), stochastic=True), images(), []
    for passes in (0, 1, 3):
        with scope(5):
            for _ in range(passes):
                net(x)
            drawn.append((np.random.rand(3).tolist(), random.random()))
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_stochastic_net_draws_anew_in_each_pass_and_the_same_for_one_seed() -> None:
    noisy = model(
        lambda net, x: net(x + torch.randn_like(x) + torch.from_numpy(np.random.randn(*x.shape)).float()), True
    )
    x, found = images(), []
    for _ in range(2):
        with scope(3):
            found.append([noisy(x), noisy(x)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(*found[0])


def test_gradient_mode_and_default_dtype_are_put_back() -> None:
    net, x = model(doubling), images().requires_grad_()
    net(x)
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()


def test_no_gradient_is_left_on_weights() -> None:
    net = model(descending)
    net(images())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_net_that_adapts_its_weights_works_while_an_attack_holds_them_fixed() -> None:
    net, x = model(adapting), images()
    expected = net(x)
    with frozen(net):
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(net(leaf), expected)
        assert torch.autograd.grad(net(leaf).sum(), leaf)[0].abs().min() > 0
        assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_another_error_is_not_taken_for_a_missing_gradient() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(lambda net, x: net(x[:, :1]))(images())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_are_float32(dtype: torch.dtype) -> None:
    assert model(lambda net, x: net(x).to(dtype))(images()).dtype == torch.float32


def test_a_net_may_view_images_that_come_in_channels_last() -> None:
    net = model(lambda net, x: net(x.view(len(x), -1)))
    x = images()
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), net(x))


FILE = """\
import os
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, does):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.does = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), does

    def forward(self, x):
        return self.does(self.net, x)

P = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))

def reseeds():
    def does(net, x):
        torch.manual_seed(0)
        return net(x + P)
    return Net(does)

def plain():
    return Net(lambda net, x: net(x + P))

def in_place():
    def does(net, x):
        x += P
        return net(x)
    return Net(does)

def half():
    return Net(lambda net, x: net(x + P).half())

def other():
    scale = int.from_bytes(os.urandom(2), "big")
    return Net(lambda net, x: net(x + scale * P))

drawn_as_the_file_was_imported = torch.rand(3)

def unseeded():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def reseeds_and_draws():
    def does(net, x):
        torch.manual_seed(0)
        return net(x + torch.randn_like(x))
    return Net(does)
"""
CHOSEN = ("--attack", "clean,fgsm,pgd", "--eps", "0.1", "--n", 30, "--checks", "off", "--device", "cpu")


def verdicts(bench: Bench, name: str) -> dict[str, Any]:
    outcome = bench("eval", f"models.py:{name}", *CHOSEN, "--results-dir", name)
    assert outcome.code == 0, outcome.err
    assert ("the model writes into its input" in outcome.out) == (name == "in_place")
    store = Store(Path(name))
    jobs = [job for job in store.jobs().values() if isinstance(job, EvaluateJob)]
    return {job.attack.name: store.samples(job.key)["correct"].tolist() for job in jobs}


def test_models_that_disturb_have_the_verdicts_of_one_that_does_not(bench: Bench) -> None:
    Path("models.py").write_text(FILE)
    expected = verdicts(bench, "plain")
    assert len(expected) == 3
    assert verdicts(bench, "reseeds") == expected
    assert verdicts(bench, "in_place") == expected
    assert len(verdicts(bench, "half")) == 3


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("other", (), "is another model each time it is built"),
        ("reseeds_and_draws", ("--randomized",), "gives the same answer to an image twice"),
        ("plain", ("--randomized",), "gives the same answer to an image twice"),
    ],
)
def test_a_model_that_cannot_be_scored_is_refused(bench: Bench, name: str, options: tuple[str, ...], said: str) -> None:
    Path("models.py").write_text(FILE)
    outcome = bench("eval", f"models.py:{name}", *options, *CHOSEN)
    assert outcome.code == 2
    assert said in outcome.err


def test_a_file_may_draw_as_it_is_imported(bench: Bench) -> None:
    """It is imported once in a process and its function called twice; the first call had other random numbers."""
    Path("models.py").write_text(FILE)
    outcome = bench("eval", "models.py:unseeded", *CHOSEN[2:], "--attack", "clean")
    assert outcome.code == 0, outcome.err
