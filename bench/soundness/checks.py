"""Soundness checks as data: what each measures, its limits, how severe a failure is, and what to do about it.

No list of checks is sufficient (Carlini et al. 2019, arXiv 1902.06705), so the best verdict is "no known symptom",
never "verified". An audit measures checks on the model (bench.soundness.audit_model), the others are derived from
records (bench.soundness.verdicts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from bench.core.stats import independent_difference, paired_difference

Level = Literal["ok", "I", "F", "U", "X", "n/a", "not checked"]
GRAVE: tuple[Level, ...] = ("F", "U", "X")  # levels that a verdict names
Verdict = Literal["OK", "FLAG", "DID NOT LEARN", "UNSOUND", "INVALID", "NOT CHECKED"]
Source = Literal["model", "images", "records", "harness"]
Subject = TypeVar("Subject")

ROUNDING = 1e-9  # 1 pp of 1000 images are 10 images; floating point must not count 10 as more than 10


class NotMeasured(Exception):
    """A check could not be made, for the reason in the text. Its finding is "not checked", never "ok"."""


class NotApplicable(Exception):
    """A check does not apply, for the reason in the text."""


class _Limit(float):
    """A limit in text: `{F:pp}` and `{F:%}` show a share of [0,1] in percentage points and in percent."""

    def __format__(self, unit: str) -> str:
        return f"{100 * self:g} {unit}" if unit else f"{float(self):g}"


@dataclass(frozen=True)
class Finding:
    """What one check found: the measured value, the limit it was compared with, and the severity.

    - `level`: ok; I (information), F (flagged), U (unsound: listed, not ranked), X (invalid: no number shown); n/a
      where the check does not apply; "not checked" where it could not be made, with the reason in `note`.
    - `eps`: the budget at which it was measured, None for all.
    - `attack`: the one attack that it concerns (then at most F), None for the model.
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


@dataclass(frozen=True)
class Check:
    """One symptom of false robustness. `code`: its key in the catalog.

    - `limits`: by level in order of severity, the largest value that does not have this level (the smallest one if
      `at_least`). A limit without a source is a judgment.
    - `measures`, `criterion`: the measured quantity and the limits in words; `{F:pp}` stands for the limit of level F.
    - `why`, `todo`: why a failure matters, with its source, and what to do about it.
    - `source`: measured on the "model", on the stored adversarial "images", derived from "records", or a test of the
      "harness" itself, which appears in no row.
    """

    title: str
    limits: dict[Level, float]
    measures: str
    criterion: str
    why: str
    todo: str
    source: Source = "model"
    at_least: bool = False
    code: str = ""

    @property
    def threshold(self) -> str:
        """The limits in words, such as `at most 0.5 pp`."""
        shown = {level: _Limit(limit) for level, limit in self.limits.items()}
        return self.criterion.format(**shown)

    @property
    def worst(self) -> Level:
        """The most severe level that a failure can have."""
        return list(self.limits)[-1]

    def finding(
        self,
        value: float,
        note: str = "",
        *,
        failure: str = "",
        eps: str | None = None,
        attack: str | None = None,
        certain: float | None = None,
    ) -> Finding:
        """The measured value with its level; "not checked" for NaN.

        `failure`: a note in place of `note` where the check fails. `certain`: the lower end of the 95 % interval of the
        value, which is compared with the limits in its place.
        """
        if value != value:
            return self.not_checked("the measured value is NaN")
        compared = value if certain is None else certain
        limits = list(self.limits.items())
        sign = -1 if self.at_least else 1
        passed = [(level, limit) for level, limit in limits if sign * (compared - limit) > ROUNDING]
        level, limit = passed[-1] if passed else ("ok", limits[0][1])
        if attack and passed:  # an attack that fails says little about the model: another one may succeed
            level, limit = "F", limits[0][1]
        return Finding(self.code, level, value, limit, (passed and failure) or note, eps, attack)

    def difference(
        self,
        a: Sequence[bool],
        b: Sequence[bool],
        note: str = "",
        *,
        failure: str = "",
        eps: str | None = None,
        attack: str | None = None,
        paired: bool = True,
    ) -> Finding:
        """The share of True in `a` minus that in `b` as a finding; outcomes on the same images if `paired`.

        It exceeds a limit only where the lower end of its 95 % interval does: one image of 32 is 3.1 pp.
        """
        if not len(a) or not len(b):
            return self.not_checked("no image in common" if paired else "no image")
        value, low, _ = paired_difference(a, b) if paired else independent_difference(a, b)
        if low <= min(self.limits.values()) < value - ROUNDING:
            note = f"{note}; not beyond the limit by the 95 % interval of the difference".lstrip("; ")
        return self.finding(value, note, failure=failure, eps=eps, attack=attack, certain=low)

    def failed(self, note: str) -> Finding:
        """A failure without a measured value, of the most severe level."""
        return Finding(self.code, self.worst, note=note)

    def not_checked(self, reason: str) -> Finding:
        """The finding of a check that could not be made."""
        return Finding(self.code, "not checked", note=reason)

    def findings(self, measure: Callable[[Check, Subject], Iterable[Finding]], subject: Subject) -> list[Finding]:
        """The findings of this check on a model under audit or on the evidence of a row."""
        try:
            return list(measure(self, subject))
        except NotApplicable as reason:
            return [Finding(self.code, "n/a", note=str(reason))]
        except NotMeasured as reason:
            return [self.not_checked(str(reason))]


def verdict(findings: list[Finding], required: frozenset[str]) -> Verdict:
    """INVALID or UNSOUND where a finding says so; NOT CHECKED where a `required` code has no answer; FLAG; OK."""
    levels = {finding.level for finding in findings}
    if "X" in levels:
        return "INVALID"
    if "U" in levels:
        return "UNSOUND"
    answered = {finding.code for finding in findings if finding.level != "not checked"}
    if required - answered:
        return "NOT CHECKED"
    return "FLAG" if "F" in levels else "OK"
