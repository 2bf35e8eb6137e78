"""Every false defense gets the code that names its reason, and every grave check is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import AuditOf
from fakes import FAKES, OWNERS
from honest_nets import Split
from torch import nn

from bench.soundness import audit_model as soundness
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import Finding, verdict

GRAVE = ("U", "X")
OfFake = Callable[[str], list[Finding]]


def _grave(findings: list[Finding]) -> set[str]:
    return {finding.code for finding in findings if finding.level in GRAVE}


@pytest.mark.parametrize("name", FAKES)
def test_a_false_defense_gets_the_expected_codes(name: str, of_fake: OfFake) -> None:
    found = {(finding.code, finding.level) for finding in of_fake(name)}
    assert set(FAKES[name][1].items()) <= found
    assert verdict(of_fake(name), frozenset()) in ("FLAG", "UNSOUND", "INVALID")


def test_a_dozen_ways_to_be_wrong_are_planted() -> None:
    assert len(FAKES) >= 12
    assert {code for _, codes in FAKES.values() for code in codes} >= set(OWNERS)


def test_every_grave_measured_check_owns_a_fake() -> None:
    grave = {c.code for c in CHECKS.values() if c.source == "model" and c.worst in GRAVE}
    assert grave == set(OWNERS)
    assert set(soundness.MEASURES) == {c.code for c in CHECKS.values() if c.source == "model"}


@pytest.mark.parametrize("code", OWNERS)
def test_only_its_check_sees_the_fake(
    code: str,
    of_fake: OfFake,
    audited: AuditOf,
    nets: dict[str, nn.Module],
    digits: tuple[Split, Split],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = OWNERS[code]
    assert _grave(of_fake(name)) == {code}
    monkeypatch.delitem(soundness.MEASURES, code)
    findings, _ = audited(FAKES[name][0](nets, digits[1]))
    assert not _grave(findings)
    assert code not in {finding.code for finding in findings}


@pytest.mark.parametrize("name", FAKES)
def test_no_finding_is_graver_than_its_check_and_those_on_one_attack_at_most_flag(name: str, of_fake: OfFake) -> None:
    order = ["n/a", "not checked", "ok", "I", "F", "U", "X"]
    for finding in of_fake(name):
        assert order.index(finding.level) <= order.index(CHECKS[finding.code].worst)
        if finding.attack is not None:
            assert finding.level in ("ok", "F")
        assert finding.note or finding.level not in ("U", "X", "not checked", "n/a")
