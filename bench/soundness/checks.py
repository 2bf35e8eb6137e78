"""The soundness checks as data: what each measures, its threshold, how severe a failure is, and what to do.

No list of checks is sufficient (Carlini et al. 2019, arXiv 1902.06705), so the best verdict says "no known symptom",
never "verified". Measured ones come from an audit of the model (bench.soundness.audit_model),
the others from records alone
(bench.soundness.verdicts). Thresholds without a source are judgments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "I", "F", "U", "X", "n/a", "not checked"]
Verdict = Literal["OK", "FLAG", "UNSOUND", "INVALID", "NOT CHECKED"]
Source = Literal["model", "images", "records", "harness"]


@dataclass(frozen=True)
class Check:
    """One symptom of false robustness.

    `worst`: the gravest level a failure can have. `source`: measured on the "model", on the stored adversarial
    "images", derived from "records", or a test of the "harness" itself that no row carries.
    """

    code: str
    title: str
    measures: str
    threshold: str
    worst: Level
    source: Source
    why: str
    todo: str


@dataclass(frozen=True)
class Finding:
    """What one check found: a measured value, the threshold it was held to, and how grave that is.

    `level`: ok; I (information), F (flagged), U (unsound: listed, not ranked), X (invalid: no number shown); n/a
    where the question does not arise; "not checked" where it could not be asked, with the reason in `note`. `eps`: the
    budget it speaks of, None for all. `attack`: the one attack it speaks of (then at most F), None for the model.
    """

    code: str
    level: Level
    value: float | None = None
    threshold: float | None = None
    note: str = ""
    eps: str | None = None
    attack: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a record."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Finding:
        """Rebuild a finding of a record. Raises TypeError for unknown fields."""
        return cls(**values)


def verdict(findings: list[Finding], required: frozenset[str]) -> Verdict:
    """INVALID or UNSOUND where any finding says so; NOT CHECKED where a `required` code has no answer; FLAG; OK."""
    levels = {finding.level for finding in findings}
    if "X" in levels:
        return "INVALID"
    if "U" in levels:
        return "UNSOUND"
    answered = {finding.code for finding in findings if finding.level != "not checked"}
    if required - answered:
        return "NOT CHECKED"
    return "FLAG" if "F" in levels else "OK"
