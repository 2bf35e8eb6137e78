"""Test-time noisy: trained as `noisy`, deployed as a vote that certifies."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import pytest
import torch
import toys
from scipy.stats import norm as normal
from torch import Tensor, nn

from attacks.certify import Certify
from attacks.pgd import PGD
from bench.core.attack import Context
from bench.core.epsilon import Epsilon
from bench.core.stochastic import InputNoise, noise_off, noise_sites
from bench.core.threat import Threat
from bench.models import lenet5
from bench.models.common import Inputs
from bench.noise.inner_smoothing import InnerSmoothed
from bench.planning import catalog
from defenses.noisy import Noisy
from defenses.noisy_vote import NoisyVote

INPUTS = Inputs(1, 16, 4, (0.3,), (0.5,))


def steps(defense: Noisy, count: int = 3) -> tuple[nn.Module, list[Tensor]]:
    """A few steps of training, and what they logged."""
    net = defense.wrap(toys.net(batch_norm=True))
    updater, logged = toys.Descent(net), []
    torch.manual_seed(2)
    for _ in range(count):
        logged += list(defense.step(net, updater, toys.batch()).values())
    return net, logged + list(defense.metrics(net).values())


@pytest.mark.parametrize(
    "settings",
    [{}, {"learn_sigma": True}, {"structure": "diag"}, {"site": "input"}, {"structure": "ungated"}],
    ids=str,
)
def test_training_is_noisys_bit_for_bit(settings: dict[str, Any]) -> None:
    (one, seen), (other, expected) = steps(NoisyVote(toys.NONE, **settings)), steps(Noisy(toys.NONE, **settings))
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)  # the sources keep nothing: weights of noisy load
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    torch.testing.assert_close(seen, expected, rtol=0, atol=0, equal_nan=True)  # a toy that diverged logs NaN


def test_settings_and_defaults_are_noisys_and_two_more() -> None:
    own, base = catalog.get("defenses", "noisy_vote"), catalog.get("defenses", "noisy")
    mine, theirs = ({f.name: (f.default, f.type) for f in p.fields} for p in (own, base))
    assert {name: mine[name] for name in theirs} == theirs
    assert set(mine) - set(theirs) == {"n_vote", "alpha"}
    assert [f.name for f in fields(NoisyVote)] == ["threat", *mine]


def test_the_noise_is_where_the_training_had_it() -> None:
    torch.manual_seed(0)
    x = torch.rand(400, 1, 16, 16)
    for where, kind in (("input", "input"), ("first", "output")):
        lenet = NoisyVote(toys.NONE, sigma=0.7, site=where).wrap(lenet5.build(INPUTS)).eval()
        (site,) = noise_sites(lenet)
        assert (site.layer, site.kind) == (lenet if where == "input" else lenet.conv1, kind)
    first = NoisyVote(toys.NONE, sigma=0.7).wrap(lenet5.build(INPUTS)).eval()
    seen: list[Tensor] = []
    first.pool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        first(x)
        with noise_off(first):
            first(x)
    noise = seen[0] - seen[2]  # the pool runs twice a pass
    assert float(noise.std()) == pytest.approx(0.7, rel=0.02)
    assert abs(float((noise[0] * noise[1]).mean())) < 0.1  # of its own for each image


def test_the_learned_scale_is_the_one_deployed_also_in_a_copy() -> None:
    net, _ = steps(NoisyVote(toys.NONE, learn_sigma=True, sigma=0.3, w_prob=0.0, sigma_lr=5.0))
    learned = float(net.noise.sigma().detach())
    assert learned < 0.29
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.noise.rho.fill_(2.0)
    (mine,), (copied,) = noise_sites(net), noise_sites(twin)
    assert mine.source.sigma == pytest.approx(learned)
    assert float(mine.source.std(torch.zeros(1))) == pytest.approx(learned)
    assert copied.source.sigma == pytest.approx(float(twin.noise.sigma().detach()))
    assert copied.source.sigma > 2


class Lines(nn.Module):
    """A linear layer and the larger of two of its outputs: the boundary is a hyperplane, through whichever layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 4)  # one position: a linear map of 16 pixels
        self.head = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv((x - 0.5) / 0.25).flatten(1))


@pytest.mark.parametrize("sigma", [0.3, 3.0])
def test_certified_radius_against_the_true_distance(sigma: float) -> None:
    torch.manual_seed(1)
    defense = NoisyVote(toys.NONE, sigma=sigma)
    net = defense.wrap(Lines()).eval()
    with torch.no_grad():  # orthogonal filters of one length, so that all directions between the outputs count alike
        net.conv.weight.copy_(nn.init.orthogonal_(torch.empty(2, 16)).view(2, 1, 4, 4))
    x = torch.rand(40, 1, 4, 4)
    filters = net.conv.weight.detach().flatten(1)
    gap = 4 * (filters[0] - filters[1])  # the net divides by 0.25
    with noise_off(net):
        logits = net(x).detach()
    distance = (logits[:, 0] - logits[:, 1]).abs() / gap.norm()
    model = defense.deploy(net)
    assert model.radius_unit(x) == pytest.approx(sigma / 4, rel=1e-6)
    columns = Certify(Threat("L2", Epsilon(0)), n=2000).evaluate(model, x, logits.argmax(1), Context(1)).columns
    sure = columns["prediction"] >= 0
    assert (columns["radius"] <= distance).all()
    assert torch.equal(columns["prediction"][sure], logits.argmax(1)[sure])
    # the difference of two outputs has noise of sqrt(2) s and moves by sqrt(2) ||W1|| at most: the bound is tight
    ideal = torch.tensor(normal.cdf(distance.numpy() * 4 / sigma))
    bound = torch.tensor(normal.cdf(columns["radius"].numpy() * 4 / sigma))
    assert sure.any()
    assert ((ideal - bound) < 0.1)[sure].all()


def test_what_cannot_certify_says_so() -> None:
    net = toys.net().eval().float()
    judge = Certify(Threat("L2", Epsilon(0)), n=100)
    InputNoise(0.3).attach(net.second, "output")
    model = InnerSmoothed(net, 20)
    assert judge.unsupported_reason(model) == (
        "the noise on the output of second is behind tanh; expected only affine steps from the image"
    )
    assert model.predict(toys.batch().x.float()).shape == (10,)  # it votes all the same
    first = NoisyVote(toys.NONE)
    both = first.wrap(toys.net().eval().float())
    InputNoise(0.3).attach(both.second, "output")
    assert judge.unsupported_reason(first.deploy(both)) is None
    with pytest.raises(ValueError, match="Sequential has no Conv2d or Linear layer to inject the noise after"):
        NoisyVote(toys.NONE).wrap(nn.Sequential(nn.Flatten()))


def test_attacks_and_vote_see_the_noise() -> None:
    defense = NoisyVote(toys.NONE, sigma=0.5, n_vote=50)
    model = defense.deploy(defense.wrap(toys.net().float()).eval())
    x = toys.batch(30).x.float()
    assert (model.predict(x) == -1).any()
    with noise_off(model):
        y = model(x).argmax(1)
    attack = PGD(Threat("L2", Epsilon("0.5")), steps=5, rel_step_size=0.3)
    columns = attack.evaluate(model, x, y, Context(0)).columns
    assert "share" in columns  # it was judged as a randomized model
    assert columns["backwards"].min() > 0
