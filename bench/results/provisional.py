"""Why a row is provisional, ranked with a dagger behind the others: too few images, or too few attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.data import datasets
from bench.soundness.catalog import CHECKS
from bench.terminal import counted

if TYPE_CHECKING:
    from bench.results.rows import Row

PROTOCOL = ("eot", "closed_form", "transfer")  # required of a stochastic model (evaluation protocol)


def images_to_rank(dataset: str) -> int:
    """Images that the worst case of a row needs, else it is provisional: the limit of C22, or the whole test set."""
    facts, limit = datasets.KNOWN.get(dataset), int(CHECKS["C22"].limits["I"])
    return min(limit, facts.test) if facts else limit


def why_provisional(row: Row, draws: dict[str, int]) -> tuple[str, ...]:
    """Why this row is provisional; empty if it is not. `draws`: noise draws per step, by attack."""
    needed = images_to_rank(row.dataset)
    reasons = [] if row.accuracy.worst.values else ["no worst case"]
    if row.accuracy.worst.values and row.accuracy.worst.n < needed:
        reasons.append(f"worst case over {counted(row.accuracy.worst.n, 'image')}, ranking needs {needed}")
    if row.deploys != "deterministic":
        lacking = [name for name in PROTOCOL if not _has(row, name, draws)]
        reasons += [f"randomized protocol lacks {', '.join(lacking)}"] if lacking else []
    elif not row.accuracy.autoattack.values:
        reasons.append("AutoAttack standard is not in the attack set")
    return tuple(reasons)


def _has(row: Row, attack: str, draws: dict[str, int]) -> bool:
    """Is an attack of this name in the row, done or unsupported? EOT over one draw does not count."""
    named = [name for name in row.accuracy.attacks if name.split(" ")[0] == attack]
    cells = [row.accuracy.attacks[name] for name in named if attack != "eot" or draws.get(name, 0) > 1]
    return any(cell.values or cell.state() == "unsupported" for cell in cells)
