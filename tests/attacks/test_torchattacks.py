"""The adapter of torchattacks: every method, its native norm, and what the package leaves behind."""

from __future__ import annotations

import builtins
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attacks.torchattacks as adapter
from attacks.torchattacks import TorchAttacks
from bench.core.attack import Context
from bench.core.classifier import Classifier
from bench.core.numbers import Number
from bench.core.threat import Norm, Threat

package = pytest.importorskip("torchattacks")
EPS: dict[Norm, str] = {"Linf": "8/255", "L2": "0.5", "L1": "3"}
CHEAP = {"steps": 3, "n_queries": 20, "nb_iter": 1, "nb_sample": 4, "binary_search_steps": 2, "max_iterations": 20}
METHODS = [*adapter._BOUNDED, *adapter._MINIMAL]


def _model() -> tuple[Classifier, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 256, 5)
    )
    model, x = Classifier(net), torch.rand(12, 3, 16, 16)
    x[:, :, :4] = 0
    net(x)
    with torch.no_grad():
        return model.eval(), x, model.predict(x)


def _attack(method: str, norm: Norm, eps: str | None = None, **more: Any) -> TorchAttacks:
    accepted = inspect.signature(getattr(package, method)).parameters
    kwargs = {name: value for name, value in CHEAP.items() if name in accepted}
    return TorchAttacks(Threat(norm, Number(eps or EPS[norm])), method=method, kwargs={**kwargs, **more})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_under_its_own_norms_only(method: str) -> None:
    model, x, y = _model()
    native = adapter._BOUNDED.get(method) or adapter._MINIMAL[method]
    for norm in EPS:
        if norm not in native:
            assert f"{method} has no {norm} version" in str(_attack(method, norm).supports(model))
        elif method != "AutoAttack":  # its parts are run one by one; together they take seconds
            attack = _attack(method, norm)
            assert attack.supports(model) is None
            one, other = (attack.evaluate(model, x, y, Context(0)) for _ in range(2))
            assert torch.equal(one.x_adv, other.x_adv)
            assert one.columns["size"].max() <= attack.threat.radius + 1e-6
            assert (one.x_adv != x).any() or method in adapter._MINIMAL


def test_the_table_knows_the_whole_package() -> None:
    assert set(METHODS) | set(adapter._REFUSED) == set(package.__all__)


@pytest.mark.parametrize("method", sorted(adapter._REFUSED))
def test_what_no_norm_of_ours_bounds_says_so(method: str) -> None:
    model, x, y = _model()
    attack = TorchAttacks(Threat("Linf", Number("8/255")), method=method)
    reason = attack.supports(model)
    assert reason is not None
    with pytest.raises(ValueError, match=method):
        attack.evaluate(model, x, y, Context(0))


@pytest.mark.parametrize("method", ["MIFGSM", "CW"])
def test_every_submodule_keeps_its_mode(method: str) -> None:
    model, x, y = _model()
    model.train()
    model.net[1].eval()
    modes = [module.training for module in model.modules()]
    statistics = model.net[1].running_mean.clone()
    _attack(method, "Linf" if method == "MIFGSM" else "L2").evaluate(model, x, y, Context(0))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.net[1].running_mean, statistics)


@pytest.mark.parametrize("method", ["DeepFool", "EADL1"])
def test_minimal_norm_methods_are_scored_at_eps(method: str) -> None:
    model, x, y = _model()
    norm: Norm = "L2" if method == "DeepFool" else "L1"
    wide = TorchAttacks(Threat(norm, Number(50)), method=method).evaluate(model, x, y, Context(0))
    distance = wide.columns["distance"]
    broken = ~wide.columns["correct"]
    assert broken.any()
    assert torch.equal(torch.isfinite(distance), broken)
    torch.testing.assert_close(distance[broken], wide.columns["size"][broken])
    cut = float(distance[broken].median())
    tight = TorchAttacks(Threat(norm, Number(cut)), method=method).evaluate(model, x, y, Context(0))
    assert torch.equal(~tight.columns["correct"], broken & (distance <= cut))
    assert torch.equal(tight.x_adv[tight.columns["correct"]], x[tight.columns["correct"]])


def test_step_sizes_follow_eps_unless_given() -> None:
    model, _, _ = _model()

    def alpha(method: str, **given: Any) -> float:
        return adapter._build(method, given, model, Threat("Linf", Number("0.3")), 0, 5, 3).alpha

    assert alpha("PGD") == pytest.approx(2.5 * 0.3 / 10)
    assert alpha("PGD", steps=40) == pytest.approx(2.5 * 0.3 / 40)
    assert alpha("PGD", alpha=0.01) == 0.01
    assert alpha("FFGSM") == pytest.approx(1.25 * 0.3)


def test_mistakes_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = _model()
    threat = Threat("Linf", Number("8/255"))
    with pytest.raises(ValueError, match="no attack 'mifgs'; did you mean MIFGSM"):
        TorchAttacks(threat, method="mifgs")
    with pytest.raises(ValueError, match="PGD has no setting 'eps'"):
        TorchAttacks(threat, method="PGD", kwargs={"eps": 0.1}).evaluate(model, x, y, Context(0))
    grey, black = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 5))), torch.zeros(2, 1, 8, 8)
    label = grey.predict(black)
    with pytest.raises(ValueError, match="3 channels, got 1"):
        TorchAttacks(threat, method="PIFGSM").evaluate(grey, black, label, Context(0))

    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "torchattacks":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install --no-deps torchattacks"):
        TorchAttacks(threat).evaluate(model, x, y, Context(0))
