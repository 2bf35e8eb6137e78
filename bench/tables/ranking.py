"""Findings and verdicts as text, and the order of rows in a table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from bench.results.evaluations import EvaluationResult, Evaluations
from bench.results.rows import Row
from bench.results.significance import places
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import GRAVE, Finding
from bench.soundness.verdicts import NOT_KEPT, required

FLAG = "⚑"
FEW = 3  # up to so many open checks are named; more mean that there was no audit
UNRANKED = {"DID NOT LEARN": "did not learn", "UNSOUND": "unsound", "INVALID": "invalid"}
# AutoAttack's own warnings (RobustBench: potentially unreliable evaluation); the first four need an audit
_AUTOATTACK, _AUDITED = ("C1", "C2", "C4", "C6", "C13"), ("C1", "C2", "C4", "C6")


def grave(row: Row) -> list[Finding]:
    """Findings that are flagged or worse, by code, the most severe of each code first."""
    found = [finding for finding in row.findings if finding.level in GRAVE]
    return sorted(found, key=lambda f: (int(f.code[1:]), -GRAVE.index(f.level), f.attack or ""))


def flags(row: Row) -> str:
    """`C8 F, C13 U`: each code once with its most severe level, and `C16 not checked` if only a few checks are open;
    otherwise "none", or "not checked" if most are open."""
    found: dict[str, str] = {}
    for finding in grave(row):
        found.setdefault(finding.code, f"{finding.code} {finding.level}")
    missing = open_checks(row)
    if len(missing) <= FEW:
        found |= {code: f"{code} not checked" for code in missing if code not in found}
    return ", ".join(found.values()) or ("not checked" if missing else "none")


def open_checks(row: Row) -> dict[str, str]:
    """Why checks have no answer that the verdict needs, by code; empty unless the row is NOT CHECKED."""
    if row.verdict != "NOT CHECKED":
        return {}
    answered = {finding.code for finding in row.findings if finding.level != "not checked"}
    why = {finding.code: finding.note for finding in row.findings if finding.level == "not checked"}
    return {code: why.get(code, "") for code in sorted(required(row) - answered, key=lambda code: int(code[1:]))}


def verdict_text(row: Row) -> str:
    """Verdict and what it rests on in one cell: `FLAG (C15, C24)`, `OK (images not kept)`; behind NOT CHECKED the
    checks that were not made, `NOT CHECKED (C6; flag C24)`."""
    about = list(dict.fromkeys(finding.code for finding in grave(row)))
    if row.verdict == "OK" and any(f.code == "C16" and NOT_KEPT in f.note for f in row.findings):
        about = [NOT_KEPT]
    if row.verdict == "FLAG" and row.accuracy.unlearned:
        about.append(f"seed {', '.join(map(str, row.accuracy.unlearned))} did not learn")
    text = ", ".join(about)
    if row.verdict == "NOT CHECKED":
        missing = open_checks(row)
        text = "; ".join(
            filter(None, (", ".join(missing) if len(missing) <= FEW else "", f"flag {text}" if text else ""))
        )
    return row.verdict + (f" ({text})" if text else "")


def order(row: Row) -> tuple[int, bool, float, str, str]:
    """Sort key within a section: ranked rows, provisional ones, unlearned, unsound, invalid; then best worst case."""
    group = {"DID NOT LEARN": 2, "UNSOUND": 3, "INVALID": 4}.get(row.verdict, 1 if row.provisional else 0)
    none = not row.accuracy.worst.values
    return group, none, 0.0 if none else -row.accuracy.worst.mean, row.method, row.config


def ranked(rows: Iterable[Row]) -> list[tuple[str, Row]]:
    """Rows in order with their rank or the word in its place; rows that tie share a rank (bench.results.significance).

    Provisional rows are ranked separately, after the others, and carry a † if there are others. Unsound, invalid and
    unlearned rows, and those without a worst case, have no rank.
    """
    found = sorted(rows, key=order)
    counted = [row for row in found if row.verdict not in UNRANKED and row.accuracy.worst.values]
    ranks: dict[int, str] = {}
    for provisional in (False, True):
        group = [row for row in counted if bool(row.provisional) == provisional]
        sign = "†" if provisional and len(group) < len(counted) else ""
        for place, row in zip(places(group), group, strict=True):
            ranks[id(row)] = f"{place}{sign}" + (f" {FLAG}" if row.verdict == "FLAG" else "")
    return [(ranks.get(id(row)) or UNRANKED.get(row.verdict, "–"), row) for row in found]


def unreliable(row: Row) -> str:
    """RobustBench's column: yes if AutoAttack's own warnings, or worse, were found; no, or not checked."""
    about = [finding for finding in row.findings if finding.code in _AUTOATTACK and finding.attack is None]
    if row.verdict in ("UNSOUND", "INVALID") or any(finding.level in GRAVE for finding in about):
        return "yes"
    answered = {finding.code for finding in about if finding.level != "not checked"}
    return "no" if set(_AUDITED) <= answered and row.accuracy.autoattack.values else "not checked"


def titles(rows: Iterable[Row]) -> list[str]:
    """One line with the codes among the flags of these rows, and what they check; none without flags."""
    codes = {finding.code for row in rows for finding in grave(row)}
    known = [f"{code} {check.title}" for code, check in CHECKS.items() if code in codes]
    return [f"flags, checks not passed: {'; '.join(known)} (bench explain CODE says more)"] if known else []


def not_made(rows: Iterable[Row]) -> list[str]:
    """One line per reason why checks have no answer that a verdict needs: the checks, the reason, the rows."""
    lines: dict[str, dict[str, None]] = {}
    for row in rows:
        by_reason: dict[str, list[str]] = {}
        for code, why in open_checks(row).items():
            by_reason.setdefault(why, []).append(code)
        for why, codes in by_reason.items():
            few = len(codes) <= FEW
            named = ", ".join(f"{code} {CHECKS[code].title}" for code in codes) if few else f"{len(codes)} checks"
            lines.setdefault(f"not checked: {named}: {why or 'no audit'}", {})[row.name] = None
    return [f"{line} ({', '.join(methods)})" for line, methods in lines.items()]


def reasons(rows: Iterable[Row]) -> list[str]:
    """One line per unsound or invalid row: which checks it fails, and why."""
    lines = []
    for _, row in ranked(rows):
        if row.verdict in ("UNSOUND", "INVALID"):
            level = "U" if row.verdict == "UNSOUND" else "X"
            failed = [f"{_named(f.code)}: {f.note or 'no details'}" for f in grave(row) if f.level == level]
            place = f" at {row.norm} eps {row.eps}" if row.norm else ""
            lines.append(f"{row.name}{place} is {UNRANKED[row.verdict]}; it fails {'; '.join(failed)}")
    return lines


def _named(code: str) -> str:
    return f"{code} ({CHECKS[code].title})" if code in CHECKS else code


def hide_invalid(known: Evaluations, rows: list[Row]) -> Evaluations:
    """Without the accuracies of evaluations that belong to INVALID rows only (clean belongs to the row of each eps)."""
    budgets = [(row, budget) for row in rows for budget in ((row.norm, row.eps), (None, None))]
    valid = {(row.config, *budget) for row, budget in budgets if row.verdict != "INVALID"}
    hidden = {(row.config, *budget) for row, budget in budgets if row.verdict == "INVALID"} - valid

    def shown(e: EvaluationResult) -> EvaluationResult:
        if (e.config, e.norm, e.eps) not in hidden:
            return e
        return replace(e, state="invalid", accuracy=math.nan, low=math.nan, high=math.nan)

    return known._replace(readable=[shown(e) for e in known.readable])
