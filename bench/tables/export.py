"""The leaderboard as JSON under the keys of RobustBench's model files."""

from __future__ import annotations

import math
import re

from bench.planning.job import IMPORTED
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.tables.citations import paper_page
from bench.tables.columns import paper
from bench.tables.pareto import KINDS, fronts
from bench.tables.ranking import unreliable
from bench.tables.sections import Section
from bench.tables.text import json_text, percent

_AUTHORS = re.compile(r"\(([^()]*?) (?:19|20)\d\d\b")


def robustbench(sections: list[Section]) -> str:
    """A JSON list, one entry per row in the order of the leaderboard.

    RobustBench's keys, numbers as text in percent, null where a thing is unknown; `reported`, a paper's own number, is
    never known here. `autoattack_acc` is AutoAttack standard alone; `external` the worst case where some attack is
    stronger. What has no key there stands under `bench`. An UNSOUND or INVALID row is `unreliable`.
    """
    on = fronts(row for section in sections for row in section.rows)
    found = [_entry(each.kind, rank, row, on.get(id(row), {})) for each in sections for rank, row in each.ranked]
    return json_text(found) + "\n"


def _entry(kind: str, rank: str, row: Row, on: dict[str, bool]) -> dict[str, object]:
    accuracy, worst, source = row.accuracy, row.accuracy.worst, paper(row.defense) or ""
    authors = _AUTHORS.search(source)
    standard = accuracy.autoattack.values and row.deploys == "deterministic"
    stronger = worst.values and not (standard and worst.mean >= accuracy.autoattack.mean)
    return {
        "link": paper_page(row.defense),
        "name": row.method,
        "authors": authors[1] if authors else None,
        "additional_data": None if row.recipe == IMPORTED else False,
        "number_forward_passes": "1" if row.deploys == "deterministic" else None,
        "dataset": row.dataset,
        "venue": source or None,
        "architecture": row.model,
        "eps": row.eps,
        "clean_acc": _percent(accuracy.clean),
        "reported": None,
        "autoattack_acc": _percent(accuracy.autoattack) if standard else None,
        "external": _percent(worst) if stronger else None,
        "unreliable": {"yes": True, "no": False}.get(unreliable(row)),
        "footnote": "; ".join(row.provisional) or None,
        "bench": {
            "rank": rank, "section": kind, "norm": row.norm, "verdict": row.verdict, "worst_case": _percent(worst),
            "n": worst.n if worst.values else None, "seeds": list(row.seeds), "train_eps": row.train_eps,
            "train_key": row.provenance.train_key,
            "keys": sorted(key for keys in row.provenance.keys.values() for key in keys), "interval": _interval(row),
            "collapsed": list(accuracy.collapsed), "pareto": {name: on.get(name) for name in KINDS},
        },
    }  # fmt: skip


def _percent(cell: SeedValues) -> str | None:
    return percent(cell.mean) if cell.values and not math.isnan(cell.mean) else None


def _interval(row: Row) -> list[str] | None:
    return [percent(end) for end in row.accuracy.worst.interval()] if row.accuracy.worst.values else None
