"""The adapter of torchattacks: every method, its native norm, and what the package leaves behind."""

from __future__ import annotations

import builtins
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attacks import _torchattacks as tables
from attacks.torchattacks import TorchAttacks
from bench.core.attack import Context
from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.threat import Norm, Threat

package = pytest.importorskip("torchattacks")
EPS: dict[Norm, str] = {"Linf": "8/255", "L2": "0.5", "L1": "3"}
CHEAP = {"steps": 2, "n_queries": 20, "nb_iter": 1, "nb_sample": 4, "binary_search_steps": 2, "max_iterations": 20}
CHEAP |= {"max_batch_size": 4, "gamma": 0.02, "restarts": 2, "popsize": 4, "num_iter_set": 3}
METHODS = [*tables.BOUNDED, *tables.MINIMAL]


def _model(channels: int = 3) -> tuple[Classifier, Tensor, Tensor]:
    """A net in eval mode, images with pixels at the edge of the box, and labels of which the last is wrong."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 256, 5),
    )  # fmt: skip
    model, x = Classifier(net), torch.rand(8, channels, 16, 16)
    x[:, :, :4] = 0
    net(x)
    with torch.no_grad():
        y = model.eval().predict(x)
        y[-1] = (y[-1] + 1) % 5
        return model, x, y


def _cheap(method: str) -> dict[str, Any]:
    accepted = inspect.signature(getattr(package, method)).parameters
    return {name: value for name, value in CHEAP.items() if name in accepted}


def _attack(method: str, norm: Norm, eps: str | None = None, **more: Any) -> TorchAttacks:
    return TorchAttacks(Threat(norm, Epsilon(eps or EPS[norm])), method=method, kwargs={**_cheap(method), **more})


def _state(model: nn.Module) -> list[Any]:
    modules = [module.training for module in model.modules()]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    return [modules, flags]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_rules_under_its_own_norms(method: str, channels: int) -> None:
    model, x, y = _model(channels)
    model.net[1].train()  # a trap: the package asks the outermost module only
    modes, tensors = _state(model), {name: value.clone() for name, value in model.state_dict().items()}
    native = tables.BOUNDED.get(method) or tables.MINIMAL[method]
    clean = torch.arange(8) < 7
    for norm in EPS:
        attack = _attack(method, norm)
        if norm not in native:
            assert attack.unsupported_reason(model) == f"{method}: no {norm} version; norms: {', '.join(native)}"
            continue
        assert attack.unsupported_reason(model) is None
        if method == "AutoAttack":  # its parts are run one by one; together they take seconds
            continue
        one, other = (attack.evaluate(model, x, y, Context(0)) for _ in range(2))
        assert one.x_adv is not None
        assert torch.equal(one.x_adv, other.x_adv)
        assert attack.threat.check(x, one.x_adv).max() > 0 or method in (*tables.MINIMAL, "Square")
        assert torch.equal(one.columns["clean"], clean)
        assert ("distance" in one.columns) == (method in tables.MINIMAL)
        assert ("pixels" in one.columns) == (method in tables.L0)
        for name in {"distance", "pixels"} & one.columns.keys():
            assert torch.equal(one.columns[name].isnan(), ~clean)
        none = _attack(method, norm, "0").evaluate(model, x, y, Context(0))
        assert torch.equal(none.columns["correct"], clean)
        assert none.x_adv is not None
        assert torch.equal(none.x_adv, x)
    assert _state(model) == modes
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_the_table_knows_the_whole_package() -> None:
    assert set(METHODS) | set(tables.REFUSED) == set(package.__all__)


@pytest.mark.parametrize("method", sorted(tables.REFUSED))
def test_what_no_norm_of_ours_bounds_says_so(method: str) -> None:
    model, x, y = _model()
    attack = TorchAttacks(Threat("Linf", Epsilon("8/255")), method=method)
    reason = attack.unsupported_reason(model)
    assert reason is not None
    with pytest.raises(ValueError, match=method):
        attack.evaluate(model, x, y, Context(0))


MINIMAL: list[tuple[str, Norm, dict[str, Any]]] = [
    ("DeepFool", "L2", {}), ("EADL1", "L1", {}), ("FAB", "Linf", {}),
    ("CW", "L2", {"c": 10.0, "lr": 0.1}), ("SparseFool", "L1", {}), ("JSMA", "L1", {}), ("Pixle", "L2", {}),
    ("OnePixel", "L1", {"pixels": 4, "popsize": 60, "steps": 8}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "norm", "kwargs"), MINIMAL)
def test_minimal_norm_methods_are_scored_at_eps(method: str, norm: Norm, kwargs: dict[str, Any]) -> None:
    model, x, y = _model()
    model, x, y = model, x[:-1], y[:-1]
    wide = TorchAttacks(Threat(norm, Epsilon(500)), method=method, kwargs=kwargs).evaluate(model, x, y, Context(0))
    distance = wide.columns["distance"]
    broken = ~wide.columns["correct"]
    assert broken.any()
    assert torch.equal(torch.isfinite(distance), broken)
    torch.testing.assert_close(distance[broken], wide.columns["size"][broken])
    cut = float(distance[broken].median())
    tight = TorchAttacks(Threat(norm, Epsilon(cut)), method=method, kwargs=kwargs).evaluate(model, x, y, Context(0))
    torch.testing.assert_close(tight.columns["distance"], distance)
    if method in tables.L0:
        assert wide.x_adv is not None
        changed = (wide.x_adv != x).any(1).flatten(1).sum(1).float()
        assert torch.equal(wide.columns["pixels"][broken], changed[broken])
        assert wide.columns["pixels"][~broken].isinf().all()
    assert torch.equal(~tight.columns["correct"], broken & (distance <= cut))
    assert torch.equal(tight.x_adv[tight.columns["correct"]], x[tight.columns["correct"]])


def test_spsa_is_an_attack_at_any_eps() -> None:
    model, x, y = _model()
    for eps in ("0.1", "0.3"):  # one step of the package's own length is 0.01
        spsa = TorchAttacks(Threat("Linf", Epsilon(eps)), method="SPSA", kwargs={"nb_iter": 5}).evaluate(
            model, x[:-1], y[:-1], Context(0)
        )
        noise = x + float(Epsilon(eps)) * torch.randn_like(x).sign()
        with torch.no_grad():
            by_chance = model.predict(noise.clamp(0, 1))[:-1] == y[:-1]
        assert spsa.columns["size"].max() == pytest.approx(float(Epsilon(eps)), abs=1e-5)
        assert spsa.columns["correct"].sum() < by_chance.sum()
    assert not spsa.columns["correct"].any()


class _Shifted(nn.Module):
    """The same decisions from logits far below 0, as log-probabilities are."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - 100


@pytest.mark.parametrize("method", ["CW", "EADL1"])
def test_logits_below_zero_are_no_shelter(method: str) -> None:
    model, x, y = _model()
    norm: Norm = "L2" if method == "CW" else "L1"
    kwargs = {"c": 10.0, "lr": 0.1} if method == "CW" else {}
    attack = TorchAttacks(Threat(norm, Epsilon(50)), method=method, kwargs=kwargs)
    broken = ~attack.evaluate(model, x[:-1], y[:-1], Context(0)).columns["correct"]
    shifted = ~attack.evaluate(Classifier(_Shifted(model.net)), x[:-1], y[:-1], Context(0)).columns["correct"]
    assert broken.any()
    assert torch.equal(broken, shifted)


def test_cw_moves_black_pixels() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x = torch.zeros(4, 1, 4, 4)
    model = Classifier(net)
    y = model.predict(x)
    attack = TorchAttacks(Threat("L2", Epsilon(4)), method="CW", kwargs={"c": 10.0, "lr": 0.5, "steps": 100})
    assert not attack.evaluate(model, x, y, Context(0)).columns["correct"].any()


@pytest.mark.parametrize("method", tables.THREE)
def test_grey_images_are_attacked_as_one_of_three_channels(method: str) -> None:
    grey, x, y = _model(1)
    twin = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), *grey.net[1:]).eval()
    with torch.no_grad():
        twin[0].weight.zero_()[:, :1] = grey.net[0].weight
    one = _attack(method, "Linf").evaluate(grey, x, y, Context(0)).x_adv
    other = _attack(method, "Linf").evaluate(Classifier(twin), x.expand(-1, 3, -1, -1), y, Context(0)).x_adv
    assert one is not None
    assert other is not None
    assert (one != x).any()
    torch.testing.assert_close(one, other[:, :1], rtol=0, atol=1e-6)


def test_step_sizes_follow_eps_unless_given() -> None:
    model, _, _ = _model()

    def alpha(method: str, **given: Any) -> float:
        return tables.build(method, given, model, "Linf", 0.3, 0, 5).alpha

    assert alpha("PGD") == pytest.approx(2.5 * 0.3 / 10)
    assert alpha("PGD", steps=40) == pytest.approx(2.5 * 0.3 / 40)
    assert alpha("PGD", alpha=0.01) == 0.01
    assert alpha("FFGSM") == pytest.approx(1.25 * 0.3)


def test_mistakes_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = _model()
    threat = Threat("Linf", Epsilon("8/255"))
    with pytest.raises(ValueError, match="no attack 'mifgs'; did you mean MIFGSM"):
        TorchAttacks(threat, method="mifgs")
    with pytest.raises(ValueError, match="PGD has no setting 'eps'"):
        TorchAttacks(threat, method="PGD", kwargs={"eps": 0.1})
    with pytest.raises(ValueError, match="FAB runs once and untargeted"):
        TorchAttacks(threat, method="FAB", kwargs={"n_restarts": 2})
    with pytest.raises(ValueError, match="EADL1 max_iterations is 5; expected at least 10"):
        TorchAttacks(threat, method="EADL1", kwargs={"max_iterations": 5})
    two, black = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(128, 5))), torch.zeros(2, 2, 8, 8)
    label = two.predict(black)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        TorchAttacks(threat, method="PIFGSM").evaluate(two, black, label, Context(0))

    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name == "torchattacks":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install --no-deps torchattacks"):
        TorchAttacks(threat).evaluate(model, x, y, Context(0))
