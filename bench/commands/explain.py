"""`bench explain`: what a soundness check measures, why, and what to do about it."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer

from bench.planning import catalog
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import Check, Level
from bench.terminal import columns, say, wrapped

LEVELS: dict[Level, str] = {
    "X": "INVALID: no number is shown",
    "U": "UNSOUND: listed, not ranked",
    "F": "FLAG: ranked, with a mark",
    "I": "information",
    "ok": "information",
}
WIDE = 110  # columns; longer lines are hard to read
SOURCES = {
    "model": "measured on the model by an audit",
    "images": "measured on the stored adversarial images by an audit",
    "records": "derived from the stored records",
    "harness": "a test of the harness itself; no row carries it",
}


def explain(
    code: Annotated[
        str | None, typer.Argument(help="Such as C8; without it all are listed.", show_default=False)
    ] = None,
) -> None:
    """Explain a soundness check. What it measures, its threshold, why it matters, what to do."""
    if code is None:
        longest = max(len(check.title) for check in CHECKS.values())
        for check in CHECKS.values():
            say(f"{check.code:4} {check.title:{longest}} {_worst(check)}")
        say("\nbench explain CODE shows the details; a verdict without findings means only: no known symptom.")
        return
    found = CHECKS.get(code.upper()) or CHECKS.get(f"C{code}")
    if found is None:
        raise LookupError(f"no check '{code}'.{_suggest(code)} Known: C1 to C{len(CHECKS)}")
    print(f"{found.code}: {found.title}")
    parts = {"measures": found.measures, "threshold": found.threshold, "severity": _worst(found)}
    parts |= {"source": SOURCES[found.source], "why": found.why, "to do": found.todo}
    for name, text in parts.items():
        print(wrapped(f"  {name:10} {text}", min(columns() or WIDE, WIDE)))


def _worst(check: Check) -> str:
    return "no row carries it" if check.source == "harness" else f"at worst {LEVELS.get(check.worst, check.worst)}"


def _suggest(code: str) -> str:
    """The nearest code, or the code of the check with the nearest title."""
    if code[:1] in "cC0123456789":
        return catalog.suggest(code.upper(), list(CHECKS))
    titles = {check.title.lower(): check.code for check in CHECKS.values()}
    near = difflib.get_close_matches(code.lower(), titles, n=1, cutoff=0.4)
    return f" Did you mean '{titles[near[0]]}'?" if near else ""
