"""EOT: averages point where single draws do not, luck is no success, and S grows only while it pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attacks.eot import EOT, MeanOfDraws
from attacks.pgd import PGD
from bench.core.attack import Context, Outcome
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.rng import scope
from bench.core.stochastic import Randomized
from bench.core.threat import Threat

THREAT = Threat("Linf", Epsilon("0.1"))


class _Coin(nn.Module):
    """Either of two classes at random, whatever the image."""

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.randint(0, 2, (len(x),))
        return torch.nn.functional.one_hot(heads, 2).float() * 10 + 0 * x.flatten(1).sum(1, keepdim=True)


class _NoisyGradient(nn.Module):
    """Class 0 as long as the mean pixel is below 0.55; every draw hides that slope under a random one."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        slope = 1 + self.noise * torch.randn_like(flat)
        z = (slope * (flat - 0.55)).mean(1)
        return torch.stack([torch.zeros_like(z), z * 20], dim=1)


class _Stochastic(Classifier):
    stochastic = True


def test_a_coin_scores_about_half_under_every_attack() -> None:
    model, x, y = Randomized(_Coin(), 9), torch.rand(400, 1, 2, 2), torch.zeros(400, dtype=torch.int64)
    for attack in (PGD(THREAT, steps=3, rel_step_size=0.5, restarts=3), EOT(THREAT, draws=[1, 4], judge=8)):
        columns = attack.evaluate(model, x, y, Context(3)).columns
        assert 0.42 < columns["correct"].float().mean() < 0.58  # four standard deviations
        assert 0.48 < columns["share"].mean() < 0.52
        assert not columns["always"].any()
        assert columns["select"].ne(columns["share"]).float().mean() > 0.8  # other draws


def test_draws_of_the_two_kinds_and_of_the_rule_are_independent() -> None:
    model, x, y = Randomized(_Coin(), 1), torch.rand(2000, 1, 2, 2), torch.zeros(2000, dtype=torch.int64)
    columns = PGD(THREAT, steps=2, rel_step_size=0.5).evaluate(model, x, y, Context(0)).columns
    pairs = torch.stack([columns["select"], columns["share"], columns["correct"].float()])
    off = torch.corrcoef(pairs) - torch.eye(3)
    assert off.abs().max() < 0.09  # four standard deviations of a correlation of 2000


def _attack(model: Classifier, attack: EOT | PGD) -> Outcome:
    x = torch.full((60, 1, 4, 4), 0.5)
    return attack.evaluate(model, x, torch.zeros(60, dtype=torch.int64), Context(1))


def test_more_draws_find_what_one_does_not() -> None:
    model = _Stochastic(_NoisyGradient(10.0))
    base = {"name": "pgd", "set": {"steps": 2, "rel_step_size": 0.5, "loss": "cw"}}
    one, many = (_attack(model, EOT(THREAT, base=base, draws=draws)) for draws in ([1], [256]))
    honest = Classifier(_NoisyGradient(0.0))
    assert one.x_adv is not None
    assert many.x_adv is not None
    margin = [honest(found.x_adv)[:, 1].mean() for found in (one, many)]  # of the model without its noise
    assert margin[1] > margin[0] + 0.5


def test_the_image_most_often_wrong_is_kept_and_s_stops_growing_when_it_no_longer_pays() -> None:
    quiet = _Stochastic(_NoisyGradient(0.01))
    base = {"name": "pgd", "set": {"steps": 2, "rel_step_size": 0.5}}
    columns = _attack(quiet, EOT(THREAT, base=base, draws=[1, 2, 4, 8])).columns
    assert columns["hit"].eq(1).all()  # the first S breaks every image in every draw
    assert columns["draws"].eq(1).all()
    assert 64 < columns["forwards"][0] < 80  # S = 1 and 2 only, judged by 32 draws each: the second brought nothing
    assert not columns["correct"].any()


def test_the_mean_of_draws_is_the_log_of_the_mean_probability() -> None:
    x, model = torch.rand(5, 1, 2, 2, requires_grad=True), _NoisyGradient(1.0)
    with scope(4):
        found = MeanOfDraws(model, 7)(x)
    with scope(4):
        expected = torch.stack([model(x).softmax(1) for _ in range(7)]).mean(0).log()
    torch.testing.assert_close(found, expected)
    assert found.requires_grad


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match="draws must rise"):
        EOT(THREAT, draws=[4, 1])
    with pytest.raises(ValueError, match="base 'nothing' is not a file of attacks/"):
        EOT(THREAT, base={"name": "nothing"})
    for name in ("eot", "transfer", "clean", "closed_form"):
        with pytest.raises(ValueError, match="is not a gradient attack within a budget"):
            EOT(THREAT, base={"name": name})
    assert "deterministic" in (EOT(THREAT).unsupported_reason(Classifier(_NoisyGradient(1.0))) or "")
    assert EOT(THREAT).unsupported_reason(_Stochastic(_NoisyGradient(1.0))) is None
