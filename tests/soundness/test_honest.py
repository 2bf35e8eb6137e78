"""Honest nets pass, and an audit leaves no trace of itself."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import AuditOf
from honest_nets import EPS, Split
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.epsilon import Epsilon
from bench.core.smoothing import Smoothed
from bench.core.stochastic import InputNoise, Randomized
from bench.core.threat import Norm, Threat
from bench.soundness.audit import Unseen
from bench.soundness.audit_model import audit
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import Finding, verdict

REQUIRED = frozenset(c.code for c in CHECKS.values() if c.source == "model")


def _audit(
    model: nn.Module, digits: tuple[Split, Split], *eps: str, norm: Norm = "Linf", claimed: float | None = None
) -> tuple[list[Finding], dict[str, Tensor]]:
    threats = [Threat(norm, Epsilon(value)) for value in eps]
    calls: list[tuple[int, int, str]] = []
    report = lambda done, total, note: calls.append((done, total, note))  # noqa: E731
    train, (x, y) = digits
    other = Unseen(train.x[:200], train.y[:200], seed=3)
    found = audit(model, x, y, threats, "quick", seed=3, claimed=claimed, report=report, unseen=other)  # type: ignore[arg-type]
    assert calls[-1][0] == calls[-1][1] == len(REQUIRED)
    return found


@pytest.mark.parametrize("kind", ["standard", "adversarial", "batchnorm"])
def test_an_honest_net_is_neither_unsound_nor_invalid(
    kind: str, nets: dict[str, nn.Module], digits: tuple[Split, Split]
) -> None:
    net, test = nets[kind], digits[1]
    with torch.no_grad():
        right = net(test.x).argmax(1) == test.y
    findings, columns = _audit(Classifier(net), digits, "0.05", "0.1", claimed=float(right.float().mean()))
    assert not [f for f in findings if f.level not in ("ok", "F")]
    assert verdict(findings, REQUIRED) in ("OK", "FLAG")
    assert not [f for f in findings if f.level == "F" and f.code != "C10"]
    names = {f"{attack}@{eps}" for attack in ("fgsm", "pgd-ce", "pgd-cw", "noise") for eps in ("0.05", "0.1")}
    assert set(columns) == {"clean", *names}
    assert torch.equal(columns["clean"], right)
    for name in names:
        assert columns[name].dtype == torch.bool
        assert not bool((columns[name] & ~right).any())
    for attack in ("fgsm", "pgd-ce", "pgd-cw"):  # attacks, not their absence
        assert int(columns[f"{attack}@0.1"].sum()) < int(columns[f"{attack}@0.05"].sum()) < int(right.sum()) - 10


def test_an_l2_budget_is_audited_in_its_own_ball(nets: dict[str, nn.Module], digits: tuple[Split, Split]) -> None:
    findings, _ = _audit(Classifier(nets["adversarial"]), digits, "0.5", norm="L2")
    assert not [f for f in findings if f.level not in ("ok", "F")]
    assert {f.eps for f in findings if f.code == "C9"} == {"8"}  # holds every image of 64 pixels


@pytest.mark.parametrize("kind", ["smoothed", "randomised"])
def test_declared_noise_is_no_fault(kind: str, nets: dict[str, nn.Module], digits: tuple[Split, Split]) -> None:
    if kind == "smoothed":
        model: Classifier = Smoothed(nets["adversarial"], 0.05, n_vote=20)
    else:
        net = nn.Sequential(nets["adversarial"])
        InputNoise(0.05).attach(net)
        model = Randomized(net, draws=5)
    findings, columns = _audit(model, digits, "0.1")
    level = {f.code: f.level for f in findings}
    assert level["C1"] == "I"
    assert not [f for f in findings if f.level in ("U", "X", "not checked")]
    assert {code for code, at in level.items() if at == "n/a"} == {"C7", "C8", "C10", "C11", "C12", "C19", "C29"}
    assert set(columns) == {"clean", "fgsm@0.1", "pgd-ce@0.1", "pgd-cw@0.1"}


def test_the_same_seed_gives_the_same_audit_and_nothing_else_changes(
    nets: dict[str, nn.Module], digits: tuple[Split, Split], audited: AuditOf
) -> None:
    model = Classifier(nets["batchnorm"]).train()
    model.net.bn1.eval()  # type: ignore[union-attr,operator]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[union-attr]
    first, columns = audited(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]  # type: ignore[union-attr]
    torch.manual_seed(6)
    second, again = audited(model)
    assert first == second
    assert all(torch.equal(columns[name], again[name]) for name in columns)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))  # type: ignore[arg-type]
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("gap", "level"), [(0.0, "ok"), (-0.1, "ok"), (0.03, "ok"), (0.06, "X")])
def test_the_claimed_accuracy_is_compared_with_the_measured_one(
    gap: float, level: str, nets: dict[str, nn.Module], digits: tuple[Split, Split]
) -> None:
    from bench.soundness.audit import Audit, accuracy
    from bench.soundness.forward_checks import pixel_space

    test, threats = digits[1], [Threat("Linf", EPS)]
    state = Audit(Classifier(nets["adversarial"]), test.x, test.y, threats, "quick", 0, None)
    state.claimed = accuracy(state.clean) + gap
    (found,) = pixel_space(CHECKS["C18"], state)
    assert found.level == level
    assert found.value == pytest.approx(gap, abs=1e-6)


def test_two_classes_in_the_other_order_are_not_taken_for_another_scale(
    nets: dict[str, nn.Module], digits: tuple[Split, Split]
) -> None:
    from bench.soundness.audit import Audit
    from bench.soundness.forward_checks import pixel_space

    class Pair(nn.Module):
        """The logits of the digits 0 and 1, in this order or the other one."""

        def __init__(self, order: list[int]) -> None:
            super().__init__()
            self.net, self.order = nets["standard"], order

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)[:, self.order]

    of_two = digits[1].y < 2
    x, y, threats = digits[1].x[of_two], digits[1].y[of_two], [Threat("Linf", EPS)]
    (found,) = pixel_space(CHECKS["C18"], Audit(Classifier(Pair([1, 0])), x, y, threats, "quick", 0, None))
    assert found.level == "X"
    assert "with the two classes exchanged" in found.note
    (found,) = pixel_space(CHECKS["C18"], Audit(Classifier(Pair([0, 1])), x, y, threats, "quick", 0, None))
    assert found.level == "ok"


def test_a_budget_divided_by_255_twice_is_reported(nets: dict[str, nn.Module], digits: tuple[Split, Split]) -> None:
    few = Split(*(t[:32] for t in digits[1]))
    findings, _ = _audit(Classifier(nets["standard"]), (digits[0], few), "8/65025", "8/255")
    (flag,) = [f for f in findings if f.code == "C18" and f.level == "F"]
    assert "8/65025" in flag.note
    assert flag.eps == "8/65025"


def test_bad_input_is_one_line(nets: dict[str, nn.Module], digits: tuple[Split, Split]) -> None:
    x, y = digits[1]
    report = lambda *progress: None  # noqa: E731
    both = [Threat("Linf", EPS), Threat("L2", EPS)]
    for images, threats in ((x, both), (x, []), (x[:0], both[:1])):
        with pytest.raises(ValueError, match="an audit needs images and threats of one norm"):
            audit(Classifier(nets["standard"]), images, y, threats, "quick", seed=0, claimed=None, report=report)
