"""Digits, the honest nets and the audit of each fake, once a session."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes import FAKES
from honest_nets import EPS, Split, trained
from torch import Tensor, nn

from bench.core.classifier import Classifier
from bench.core.threat import Threat
from bench.data import images as data
from bench.soundness.audit import Unseen
from bench.soundness.audit_model import audit
from bench.soundness.checks import Finding

Audited = tuple[list[Finding], dict[str, Tensor]]
AuditOf = Callable[[Classifier], Audited]


@pytest.fixture(scope="session")
def digits() -> tuple[Split, Split]:
    """Training images, and 256 test images."""
    loaded = data.load("digits", root=Path("unused"), device=torch.device("cpu"))
    train, test = (Split(data.to_float(part.x), part.y) for part in (loaded.train, loaded.test))
    return train, Split(test.x[:256], test.y[:256])


@pytest.fixture(scope="session")
def trained_nets(digits: tuple[Split, Split]) -> dict[str, nn.Module]:
    """The three honest nets."""
    return {kind: trained(kind, digits[0]) for kind in ("standard", "adversarial", "batchnorm")}


@pytest.fixture
def nets(trained_nets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of the honest nets: some fakes change what they are made of."""
    return copy.deepcopy(trained_nets)


@pytest.fixture(scope="session")
def audited(digits: tuple[Split, Split]) -> AuditOf:
    """A quick audit at eps 0.1, as of an imported model."""
    (x, y), other = digits[1], Unseen(*(t[:200] for t in digits[0]), seed=0)

    def call(model: Classifier) -> Audited:
        threats, report = [Threat("Linf", EPS)], lambda *progress: None
        return audit(model, x, y, threats, "quick", seed=0, claimed=None, report=report, unseen=other)

    return call


@pytest.fixture(scope="session")
def of_fake(
    trained_nets: dict[str, nn.Module], digits: tuple[Split, Split], audited: AuditOf
) -> Callable[[str], list[Finding]]:
    """Findings of a fake by name, audited once."""
    done: dict[str, list[Finding]] = {}

    def call(name: str) -> list[Finding]:
        if name not in done:
            done[name] = audited(FAKES[name][0](copy.deepcopy(trained_nets), digits[1]))[0]
        return done[name]

    return call
