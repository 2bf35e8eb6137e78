"""Adversarial weight perturbation against a proxy network written from the paper, and what must hold around a step."""

from __future__ import annotations

import copy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from bench.core.defense import Defense, Losses
from bench.core.weights import layer_weights, shifted
from bench.planning import catalog
from bench.planning.labels import label
from bench.planning.plan import plan
from bench.planning.spec import build
from defenses._randomized_trades import noise_like
from defenses.awp import AWP
from defenses.mart import MART
from defenses.pgd_at import PGDAT
from defenses.rat import RAT
from defenses.rat_release import RATRelease
from defenses.standard import Standard
from defenses.trades import TRADES

THREAT = toys.threat()
CHEAP = {"steps": 3, "rel_step_size": 0.4}


class Decayed(toys.Descent):
    """SGD with momentum and a strong weight decay, which must act at the perturbed weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.3)


def awp(base: str, gamma: float = 0.05, **settings: Any) -> AWP:
    return AWP(THREAT, base={"name": base, "set": settings}, gamma=gamma, warmup=0.0)


def total(terms: Losses) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def proxy_step(model: nn.Module, updater: Any, base: Defense, gamma: float, rate: float, early: bool = False) -> None:
    """One step as the paper writes it: a copy of the net climbs by plain SGD, its change gives the direction."""
    data = toys.batch()
    adv = base.inner(model, data)
    proxy = copy.deepcopy(model)
    total(base.ascent_loss(proxy, data, adv)).backward()
    shifts = {}
    for (name, weight), moved in zip(model.named_parameters(), proxy.parameters(), strict=True):
        if weight.dim() > 1:
            change = rate * moved.grad  # type: ignore[operator]
            shifts[name] = gamma * weight.detach().norm() * change / (change.norm() + 1e-20)
    with torch.no_grad():
        for name, shift in shifts.items():
            model.get_parameter(name).add_(shift)
    updater.optimizer.zero_grad()
    total(base.loss(model, data, adv)).backward()
    for late in (early, not early):
        if late:
            with torch.no_grad():
                for name, shift in shifts.items():
                    model.get_parameter(name).sub_(shift)
        else:
            updater.optimizer.step()


@pytest.mark.parametrize("rate", [0.01, 0.1])
@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("trades", TRADES(THREAT, **CHEAP)),  # type: ignore[arg-type]
        ("pgd_at", PGDAT(THREAT, **CHEAP)),  # type: ignore[arg-type]
        ("mart", MART(THREAT, **CHEAP)),  # type: ignore[arg-type]
        ("rat", RAT(THREAT, sigma=0.3, **CHEAP)),  # type: ignore[arg-type]
        ("rat_release", RATRelease(THREAT, noise_std=0.0, **CHEAP)),  # type: ignore[arg-type]
    ],
)
def test_steps_equal_the_papers_proxy(name: str, base: Defense, rate: float) -> None:
    extra: dict[str, Any] = {"rat": {"sigma": 0.3}, "rat_release": {"noise_std": 0.0}}.get(name, {})
    defense, model, reference = awp(name, **CHEAP, **extra), toys.net(True), toys.net(True)
    updater, other = Decayed(model), Decayed(reference)
    torch.manual_seed(3)
    for _ in range(3):
        defense.step(model, updater, toys.batch())
    torch.manual_seed(3)
    for _ in range(3):
        proxy_step(reference, other, base, 0.05, rate)
    for key, value in reference.state_dict().items():  # BatchNorm's statistics move with the base, not the ascent
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=1e-10)


def test_momentum_and_weight_decay_act_at_the_perturbed_weights() -> None:
    defense, model, wrong = awp("trades", **CHEAP), toys.net(), toys.net()
    torch.manual_seed(3)
    defense.step(model, Decayed(model), toys.batch())
    torch.manual_seed(3)
    proxy_step(wrong, Decayed(wrong), TRADES(THREAT, **CHEAP), 0.05, 0.1, early=True)  # type: ignore[arg-type]
    assert toys.differ(list(model.parameters()), list(wrong.parameters()))


def test_the_perturbation_has_each_layers_size_and_leaves_no_trace() -> None:
    defense, data = awp("trades", gamma=0.02), toys.batch()
    toys.assert_leaves_no_trace(lambda model: defense.perturbation(model, data, data.x + 0.01))
    model = toys.net(batch_norm=True)
    before = copy.deepcopy(model.state_dict())
    shifts = defense.perturbation(model, data, data.x + 0.01)
    assert [w is p for (w, _), p in zip(shifts, layer_weights(model), strict=True)] == [True] * 3
    assert [tuple(w.shape) for w, _ in shifts] == [(3, 1, 3, 3), (8, 3, 3, 3), (4, 288)]
    for weight, shift in shifts:
        assert float(shift.norm() / weight.detach().norm()) == pytest.approx(0.02, rel=1e-12)
        assert not shift.requires_grad
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        low = float(total(defense.loss(model, data, data.x + 0.01)))
        with shifted(shifts):
            assert float(total(defense.loss(model, data, data.x + 0.01))) > low


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_shift_without_a_step_restores_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000, dtype=dtype) * torch.logspace(-12, 2, 1000).to(dtype)
    saved = weight.clone()
    with shifted([(weight, torch.randn_like(weight))]):
        assert not torch.equal(weight, saved)
    assert torch.equal(weight, saved)
    with pytest.raises(KeyError), shifted([(weight, torch.randn_like(weight))]):
        raise KeyError
    assert torch.equal(weight, saved)
    with shifted([(weight, torch.ones_like(weight))]):
        weight.sub_(0.5)
    torch.testing.assert_close(weight, saved - 0.5, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "laplace"])
def test_weight_noise_has_mean_0_variance_1_and_its_own_tails(kind: Any) -> None:
    torch.manual_seed(0)
    noise = noise_like(torch.zeros(400, 500), kind)
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.var()) == pytest.approx(1, rel=0.02)
    assert float(noise.pow(4).mean()) == pytest.approx({"gaussian": 3, "uniform": 1.8, "laplace": 6}[kind], rel=0.06)


@pytest.mark.parametrize("name", ["trades", "pgd_at", "standard"])
def test_without_size_or_before_its_time_it_is_the_base(name: str) -> None:
    settings: dict[str, Any] = {} if name == "standard" else CHEAP
    kind: Any = {"trades": TRADES, "pgd_at": PGDAT, "standard": Standard}[name]
    plain = toys.weights_after(kind(THREAT, **settings), batch_norm=True)
    late = AWP(THREAT, base={"name": name, "set": settings}, warmup=0.6)
    for defense in (awp(name, 0.0, **settings), late):
        toys.assert_same(toys.weights_after(defense, batch_norm=True), plain, atol=0)
        assert float(defense.metrics(toys.net())["awp_steps"]) == 0
    tiny = toys.weights_after(awp(name, 1e-9, **settings), batch_norm=True)
    toys.assert_same(tiny, plain, atol=1e-6)
    assert toys.differ(toys.weights_after(awp(name, 0.05, **settings), batch_norm=True), plain)


def test_it_says_in_how_many_steps_it_was_active_and_survives_a_kill() -> None:
    defense = AWP(THREAT, base={"name": "rat", "set": CHEAP}, warmup=0.25)
    model = toys.net()
    for progress in (0.0, 0.2, 0.25, 0.9):
        defense.step(model, toys.Descent(model), toys.batch(progress=progress))
    found = defense.metrics(model)
    assert (float(found["awp_steps"]), float(found["awp_share"])) == (2, 0.5)
    assert "share_first" in found  # the base's own
    again = AWP(THREAT, base={"name": "rat", "set": CHEAP})
    again.load_state_dict(defense.state_dict())
    assert again.metrics(model)["awp_share"] == 0.5


def test_a_warm_up_of_the_budget_reaches_the_base() -> None:
    defense, data = awp("pgd_at", **CHEAP), toys.batch()
    defense.threat = toys.threat(eps="0.001")
    assert float((defense.inner(toys.net(), data) - data.x).abs().max()) <= 0.001 + 1e-12


def test_costs() -> None:
    bases = {"pgd_at": 26, "trades": 33, "mart": 32, "rat": 33, "rat_release": 33, "standard": 6}
    for base, expected in bases.items():
        units, work = toys.cost(AWP(THREAT, base={"name": base}, warmup=0.0))
        assert units == expected
        assert work <= expected + (1.2 if base == "rat" else 0.2)  # the head is a large part of this net


class NoLoss(Defense):
    """A defense that forgot its loss."""


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"name": "nobody"}, "base 'nobody' is not a file"),
        ({"name": "../trades"}, "is not a file"),
        ({"nme": "trades"}, "base must be"),
        ({"name": "trades", "beta": 1}, "base must be"),
        ({"name": "trades", "set": {"bta": 1}}, "bta"),
        ({"name": "trades", "set": {"beta": -1}}, "beta"),
        ({"name": "awp"}, "ordinary step"),
        ({"name": "no_loss"}, "a loss of its own"),
        ({"name": "rse"}, "deploys a randomised model"),
    ],
)
def test_what_cannot_be_a_base_is_refused(base: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("defenses.no_loss")
    module.__spec__ = ModuleSpec("defenses.no_loss", None)
    module.NoLoss = type("NoLoss", (NoLoss,), {"__module__": "defenses.no_loss"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "defenses.no_loss", module)
    with pytest.raises(ValueError, match=message):
        AWP(THREAT, base=base)


@pytest.mark.usefixtures("fresh_catalog")
def test_the_key_holds_the_bases_settings_and_the_label_names_it() -> None:
    resolve = catalog.get("defenses", "awp").resolve
    trades = catalog.get("defenses", "trades").resolve({})
    assert resolve({})["base"] == {"name": "trades", "set": trades, "revision": 1}
    assert resolve({"base": "trades"}) == resolve({"base": {"name": "trades", "set": {"beta": 6}}}) == resolve({})
    assert label("defenses", "awp", resolve({})) == "awp (base=trades)"
    other = resolve({"base": {"name": "pgd_at", "set": {"steps": 7}}, "gamma": "0.01"})
    assert label("defenses", "awp", other) == "awp (base=pgd_at (steps=7), gamma=0.01)"
    AWP(THREAT, **other)  # what the planner resolves is what the class takes
    with pytest.raises(LookupError, match="Did you mean 'beta'"):
        resolve({"base": {"name": "trades", "set": {"bta": 1}}})
    with pytest.raises(LookupError, match="Did you mean 'trades'"):
        resolve({"base": "trade"})
    for wrong in ({"name": "trades", "beta": 1}, {"set": {}}, {"name": "trades", "set": [1]}):
        with pytest.raises(ValueError, match="expected"):
            resolve({"base": wrong})
    with pytest.raises(ValueError, match="cannot be its own base"):
        resolve({"base": "awp"})


@pytest.mark.usefixtures("fresh_catalog")
def test_each_base_and_each_of_its_settings_is_a_training_of_its_own() -> None:
    def key(defense: str, norm: str = "L2", **settings: Any) -> str:
        entry = {"name": defense, "set": settings}
        spec = build({"threat": {"norm": norm, "eps": "0.5"}, "defenses": [entry], "attacks": ["clean"]})
        return next(job.key for job in plan(spec, Path("no-data-here")) if job.kind == "train")

    sets: list[dict[str, Any]] = [{}, {"beta": 1}, {"beta": 1.0}, {"steps": 12}]
    keys = [key("awp", base={"name": "trades", "set": each}) for each in sets]
    assert keys[1] == keys[2]
    assert keys[0] == key("awp") == key("awp", base="trades")
    assert len({*keys, key("trades"), key("awp", base="pgd_at")}) == 5
    with pytest.raises(ValueError, match="no L1 version; its norms: Linf, L2"):
        key("awp", norm="L1")
    with pytest.raises(ValueError, match="no Linf version; its norms: L2"):
        key("smoothadv", norm="Linf")
