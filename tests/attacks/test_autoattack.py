"""AutoAttack: the package's own verdicts, no traces, honest on randomized models, clear about few classes."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks.autoattack import AutoAttack
from attacks.square import Square
from bench.core.attack import Context
from bench.core.classifier import Classifier, Counted, frozen
from bench.core.epsilon import Epsilon
from bench.core.rng import scope
from bench.core.threat import Norm, Threat


def _model(classes: int = 6) -> tuple[Classifier, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, classes)).eval()
    model, x = Classifier(net), torch.rand(24, 1, 8, 8)
    x[:, :, :2] = 0
    with torch.no_grad():
        return model, x, model.predict(x)


def _hasten(suite: Any) -> None:
    """A tenth of the package's iterations, with its checkpoints moved along."""
    for part in (suite.apgd, suite.apgd_targeted):
        part.n_restarts, part.n_iter, part.n_iter_orig, part.n_iter_2, part.n_iter_min = 1, 10, 10, 3, 2
    suite.fab.n_restarts, suite.fab.n_iter = 1, 5


@dataclass
class _Quick(AutoAttack):
    def _suite(self, *args: Any, **kwargs: Any) -> Any:
        suite = super()._suite(*args, **kwargs)
        _hasten(suite)
        return suite


@pytest.mark.parametrize(("norm", "eps"), [("Linf", "2/255"), ("L2", "0.1"), ("L1", "0.7")])
def test_the_cascade_is_the_packages_own(norm: Norm, eps: str) -> None:
    from pyautoattack import AutoAttack as Suite

    model, x, y = _model(classes=10)
    threat = Threat(norm, Epsilon(eps))
    attack = _Quick(threat, version="custom", attacks_to_run=["apgd-ce", "apgd-t", "fab-t"], batch_size=10)
    ours, columns = _perturb(attack, model, x, y)
    suite = Suite(model, attacks=["apgd-ce", "apgd-t", "fab-t"], eps=threat.radius, norm=norm, seed=5, version="custom")
    _hasten(suite)
    with frozen(model), scope(0):
        theirs, _ = suite.run_standard_evaluation(x, y, batch_size=10)
    assert torch.equal(ours, theirs)
    broken = columns["stage"] > 0
    assert 0 < broken.float().mean() < 1
    assert torch.equal(broken, model.predict(ours) != y)
    threat.check(x, ours)


def test_fab_goes_to_every_other_class_and_its_targeted_form_to_one_at_a_time() -> None:
    from pyautoattack import AutoAttack as Suite

    model, x, y = _model(classes=10)
    threat, found = Threat("Linf", Epsilon("4/255")), []
    for name in ("fab", "fab-t"):
        ours, columns = _perturb(_Quick(threat, version="custom", attacks_to_run=[name]), model, x, y)
        suite = Suite(model, attacks=[name], eps=threat.radius, norm="Linf", seed=5, version="custom")
        _hasten(suite)
        with frozen(model), scope(0):
            theirs, _ = suite.run_standard_evaluation(x, y, batch_size=100)
        assert torch.equal(ours, theirs)
        assert (columns["stage"] > 0).any()
        found.append(ours)
    assert not torch.equal(*found)


def _perturb(attack: AutoAttack | Square, model: Classifier, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    with frozen(model), scope(0):
        return attack.perturb(Counted(model), x, y, Context(5))


def test_nothing_is_left_to_attack_once_all_are_broken() -> None:
    model, x, y = _model()
    attack = _Quick(Threat("Linf", Epsilon(1)))
    found = attack.evaluate(model, x, y, Context(0)).columns
    assert set(found["stage"].tolist()) == {1}
    assert not found["correct"].any()


def test_standard_runs_the_four_attacks_of_the_paper() -> None:
    model, x, _ = _model(classes=4)
    attack = AutoAttack(Threat("Linf", Epsilon("1/255")))
    suite = attack._suite(model, x, 4, 0, stochastic=False)
    assert suite.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (suite.apgd.n_restarts, suite.apgd.n_iter, suite.square.n_queries) == (1, 100, 5000)
    # 3 targets are all that 4 classes have
    assert (suite.apgd_targeted.n_target_classes, suite.fab.n_target_classes) == (3, 3)
    wide = attack._suite(model, x, 100, 0, stochastic=False)
    assert (wide.apgd_targeted.n_target_classes, wide.fab.n_target_classes) == (9, 9)
    rand = attack._suite(model, x, 10, 0, stochastic=True)
    assert (rand.attacks_to_run, rand.apgd.eot_iter) == (["apgd-ce", "apgd-dlr"], 20)


@pytest.mark.parametrize(
    ("classes", "version", "attacks"),
    [
        (3, "standard", ["apgd-ce", "apgd-dlr", "fab-t", "square"]),
        (2, "standard", ["apgd-ce", None, "fab-t", "square"]),
        (3, "plus", ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-dlr", "fab-t"]),
        (2, "plus", ["apgd-ce", None, "fab", "square", None, "fab-t"]),
        (2, "rand", ["apgd-ce", None]),
    ],
)
def test_few_classes_have_the_suite_that_is_defined_for_them(classes: int, version: Any, attacks: list[str]) -> None:
    model, x, y = _model(classes)
    attack = _Quick(Threat("Linf", Epsilon("2/255")), version=version, eot=2)
    suite = attack._suite(model, x, classes, 0, stochastic=False)
    assert suite.attacks_to_run == attacks
    assert suite.fab.n_target_classes == classes - 1
    found, columns = _perturb(attack, model, x, y)
    assert (columns["stage"] > 0).float().mean() > 0
    assert torch.equal(columns["stage"] > 0, model.predict(found) != y)


def test_a_custom_suite_with_a_loss_of_more_classes_is_refused() -> None:
    model, x, y = _model(classes=3)
    threat = Threat("Linf", Epsilon("2/255"))
    with pytest.raises(ValueError, match="AutoAttack's apgd-t needs 4 classes, this model has 3"):
        AutoAttack(threat, version="custom", attacks_to_run=["apgd-t"]).evaluate(model, x, y, Context(0))
    with pytest.raises(ValueError, match="version=custom needs attacks_to_run"):
        AutoAttack(threat, version="custom")
    with pytest.raises(ValueError, match="attacks_to_run goes with"):
        AutoAttack(threat, attacks_to_run=["square"])


class _Coin(Classifier):
    """Right or wrong by chance alone, whatever the image."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 5)
        logits[:, 0] = torch.randn(len(x)) + 0 * x.flatten(1).sum(1)
        logits[:, 1] = -logits[:, 0]
        return logits


def test_chance_is_not_success_on_a_coin_flip() -> None:
    coin = _Coin(nn.Identity())
    x, y = torch.rand(400, 1, 4, 4), torch.zeros(400, dtype=torch.long)
    attack = AutoAttack(Threat("Linf", Epsilon("8/255")), batch_size=400, eot=3)
    with torch.no_grad(), scope(0):
        found, _ = _gathered(attack, coin, x, y)
        accuracy = (coin.predict(found) == y).float().mean()
    # the package itself ends near 0 here, since each image is wrong in one of some hundred passes
    assert accuracy == pytest.approx(0.5, abs=0.08)


def _gathered(attack: AutoAttack, coin: _Coin, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    suite = attack._suite(coin, x, 5, 0, stochastic=True)
    suite.apgd.n_iter = 3
    state = attack._initial_state(x, 5)
    attack._attack_stochastic(suite, coin, x, y, Context(0), state)
    return state["x_adv"], state["stage"]


class _Shaky(Classifier):
    """A deterministic network behind strong input noise."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.05 * torch.randn_like(x))


def test_rand_moves_every_image_of_a_stochastic_model() -> None:
    model, x, y = _model()
    shaky = _Shaky(model.net)
    attack = _Quick(Threat("Linf", Epsilon("16/255")), eot=4)
    found = attack.evaluate(shaky, x, y, Context(0))
    assert (found.columns["size"] > 0).all()
    assert set(found.columns["stage"].tolist()) <= {1, 2}
    with torch.no_grad(), scope(9):
        clean = torch.stack([shaky.predict(x) == y for _ in range(50)]).float().mean()
        attacked = torch.stack([shaky.predict(found.x_adv) == y for _ in range(50)]).float().mean()
    assert attacked < clean - 0.2


def test_it_leaves_no_trace(capfd: pytest.CaptureFixture[str]) -> None:
    from pyautoattack import checks

    model, x, y = _model()
    trace, counters = sys.gettrace(), dict(checks.funcs)
    level, disabled = logging.getLogger("auto-attack").level, logging.root.manager.disable
    cudnn, generator = torch.backends.cudnn.deterministic, torch.get_rng_state()
    attack = _Quick(Threat("Linf", Epsilon("4/255")), version="custom", attacks_to_run=["apgd-dlr", "fab"])
    one, other = (attack.evaluate(model, x, y, Context(3)) for _ in range(2))
    assert torch.equal(one.x_adv, other.x_adv)
    assert sys.gettrace() is trace
    assert checks.funcs == counters
    assert (logging.getLogger("auto-attack").level, logging.root.manager.disable) == (level, disabled)
    assert torch.backends.cudnn.deterministic == cudnn
    assert torch.equal(torch.get_rng_state(), generator)
    assert capfd.readouterr() == ("", "")


def test_square_respects_queries_and_finds_what_gradients_find() -> None:
    model, x, y = _model()
    threat = Threat("Linf", Epsilon("0.3"))
    few = Square(threat, n_queries=10).evaluate(model, x, y, Context(0)).columns
    assert few["forwards"].max() <= 10 + 3
    many = Square(threat, n_queries=500).evaluate(model, x, y, Context(0)).columns
    assert many["correct"].float().mean() < few["correct"].float().mean() - 0.2
    assert many["backwards"].max() == 0
