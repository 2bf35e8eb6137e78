"""Why a row has no rank: too few images, or not the attacks that a claim needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.data import datasets

if TYPE_CHECKING:
    from bench.analysis.rows import Row

RANKED_N = 1000
PROTOCOL = ("eot", "closed_form", "transfer")  # what a claim about a randomised model needs (evaluation protocol)


def why_provisional(row: Row) -> tuple[str, ...]:
    """Why this row has no rank; empty where it has one."""
    facts = datasets.KNOWN.get(row.dataset)
    needed = min(RANKED_N, facts.test) if facts else RANKED_N
    reasons = [] if row.worst.values else ["no worst case"]
    if row.worst.values and row.worst.n < needed:
        reasons.append(f"worst case over {row.worst.n} images, ranking needs {needed}")
    if row.deploys != "deterministic":
        lacking = [name for name in PROTOCOL if not _has(row, name)]
        reasons += [f"randomised protocol lacks {', '.join(lacking)}"] if lacking else []
    elif not row.autoattack.values:
        reasons.append("AutoAttack standard is not in the attack set")
    return tuple(reasons)


def _has(row: Row, attack: str) -> bool:
    """Is an attack of this name in the row, done or found not to apply?"""
    cells = [cell for name, cell in row.attacks.items() if name.split(" ")[0] == attack]
    return any(cell.values or cell.state() == "unsupported" for cell in cells)
