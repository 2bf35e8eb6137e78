"""What a reader wants first about one table: what won, by how much, what is flagged and what is missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from bench.report.board import Board
from bench.results.rows import Row
from bench.results.significance import better, difference, same_images
from bench.soundness.verdicts import VERDICTS
from bench.tables.ranking import UNRANKED, grave
from bench.tables.text import percent
from bench.terminal import counted

MOST = 4  # names or reasons of a sentence; the table has all


class Answer(NamedTuple):
    """One of the four questions, its answer in a few words, and sentences that qualify it."""

    question: str
    short: str
    more: list[str]


def summary(board: Board) -> list[Answer]:
    """The four answers for the rows of this table."""
    ranked = [row for row in board.rows if row.accuracy.worst.values and row.verdict not in UNRANKED]
    return [_winner(ranked), _margin(ranked), _flagged(board.rows), _missing(board)]


def _winner(ranked: list[Row]) -> Answer:
    if not ranked:
        return Answer("Best", "nothing is ranked yet", [])
    worst = ranked[0].accuracy.worst
    low, high = (percent(end, 1) for end in worst.interval())
    ties = [row.name for row in ranked[1:] if not better(ranked[0], row)]
    more = [f"{percent(worst.mean, 1)} % robust (95 % interval {low} to {high}) on {counted(worst.n, 'image')}."]
    more += [f"Not significantly better than {_some(ties)}."] if ties else []
    return Answer("Best", ranked[0].name, more)


def _margin(ranked: list[Row]) -> Answer:
    """Over the best row that is significantly worse, and over the undefended baseline."""
    others = ranked[1:]
    beaten = next((row for row in others if better(ranked[0], row)), None)
    baseline = next((row for row in others if row.defense == "standard"), None)
    more = [
        f"{_gap(ranked[0], row)} over {row.name}."
        for row in {id(row): row for row in (beaten, baseline) if row}.values()
    ]
    if beaten is None:
        return Answer("By how much", "nothing is significantly worse" if others else "nothing to compare with", more)
    more[0] = more[0].removesuffix(".") + ", the best that is significantly worse."
    return Answer("By how much", " ".join(more[0].split(" ")[:2]), more)


def _gap(first: Row, row: Row) -> str:
    """`3.0 points (95 % interval 1.0 to 5.0)`, on the images that both share."""
    found = difference(first.accuracy.robust, row.accuracy.robust) if same_images(first, row) else None
    if found is None:
        return f"{100 * (first.accuracy.worst.mean - row.accuracy.worst.mean):.1f} points on different images"
    gap, low, high = (f"{100 * value:.1f}" for value in found[:3])
    return f"{gap} points (95 % interval {low} to {high})"


def _flagged(rows: list[Row]) -> Answer:
    about = {name: [row for row in rows if row.verdict == name] for name in VERDICTS}
    short = ", ".join(f"{len(found)} {name}" for name, found in about.items() if found)
    more = []
    for name in (name for name in VERDICTS if name not in ("OK", "NOT CHECKED") and about[name]):
        codes = [", ".join(dict.fromkeys(f.code for f in grave(row))) for row in about[name]]
        named = [f"{row.name}{f' ({code})' if code else ''}" for row, code in zip(about[name], codes, strict=True)]
        more.append(f"{name}: {_some(named)}.")
    return Answer("Flagged", short, more or ["No check found a symptom of false robustness."])


def _missing(board: Board) -> Answer:
    open_ = [line.unchecked for line in board.lines if line.row.verdict == "NOT CHECKED"]
    codes = Counter(code for codes in open_ for code in codes).most_common()
    empty = [row.name for row in board.rows if not row.accuracy.worst.values]
    more = [f"Not checked: {_some(f'{code} in {count}' for code, count in codes)}."] if codes else []
    more += [f"Without a worst case: {_some(empty)}."] if empty else []
    more += [f"Order provisional: {_some(board.letters.values())}."] if board.letters else []
    short = f"checks in {len(open_)} of {len(board.rows)} rows" if open_ else f"{len(empty)} numbers" if empty else ""
    return Answer("Missing", short or ("a final order" if more else "nothing"), more)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    rest = len(listed) - MOST
    return ", ".join(listed[:MOST]) + (f" and {rest} more" if rest > 0 else "")
