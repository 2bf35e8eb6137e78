"""Rows -> the tables of the page: what the leaderboard says, and behind each number the evaluations it rests on."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report.provenance import behind
from bench.results.evaluations import Evaluation
from bench.results.labels import failures
from bench.results.rows import Row
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import Finding
from bench.tables.columns import columns as column_texts
from bench.tables.columns import natural, percent, provisional_letters
from bench.tables.leaderboard import SECTIONS, footnotes, sections
from bench.tables.ranking import GRAVE, ranked, reasons


@dataclass(frozen=True)
class EvaluationLine:
    """One evaluation behind a row: what was asked, what came out and where its record lies."""

    attack: str
    seed: int
    result: str
    n: int
    eps: str
    device: str
    key: str
    train_key: str


@dataclass(frozen=True)
class BoardLine:
    """One row of a table: rank, cells in the order of the header and the keys behind each, findings and evaluations."""

    row: Row
    rank: str
    cells: list[str]
    behind: list[list[str]]
    found: list[Finding]
    unchecked: list[str]
    evidence: list[EvaluationLine]


@dataclass(frozen=True)
class Board:
    """One table: a data set under one threat, one kind of predictor."""

    dataset: str
    threat: str
    kind: str
    header: list[str]
    lines: list[BoardLine]
    letters: dict[str, str]
    footnotes: list[str]
    notes: list[str]

    @property
    def rows(self) -> list[Row]:
        """Its rows, in order."""
        return [line.row for line in self.lines]


def boards(rows: list[Row]) -> list[Board]:
    """The sections of leaderboard.md, in their order and with their columns."""
    found = []
    for (dataset, threat), kinds in sections(rows).items():
        for kind, members in kinds.items():
            if members:
                found.append(_board(dataset, threat, SECTIONS[kind], members))
    return found


def _board(dataset: str, threat: str, kind: str, members: list[Row]) -> Board:
    letters = provisional_letters(members)
    columns = column_texts(members, letters)
    lines = [
        BoardLine(
            row, rank, [show(row) for show in columns.values()], [behind(row, name) for name in columns],
            _flagged(row), _unchecked(row), _evidence(row),
        )
        for rank, row in ranked(members)
    ]  # fmt: skip
    notes = [*reasons(members), *failures(members)]
    told = {v: k for k, v in letters.items()}
    return Board(dataset, threat, kind, ["Rank", *columns], lines, told, footnotes(members), notes)


def _flagged(row: Row) -> list[Finding]:
    """Findings with a message: neither passed, nor not applicable, nor not checked."""
    return [finding for finding in row.findings if finding.level in (*GRAVE, "I")]


def _unchecked(row: Row) -> list[str]:
    return list(dict.fromkeys(f.code for f in row.findings if f.level == "not checked" and f.code in CHECKS))


def _evidence(row: Row) -> list[EvaluationLine]:
    """Every evaluation of the row by attack and seed; an INVALID row shows that they exist, never their numbers."""
    return [
        EvaluationLine(
            label, seed, "invalid" if row.verdict == "INVALID" else _result(entry), entry.n,
            f"{entry.norm} {entry.eps}" if entry.norm else "–",
            entry.device or "–", entry.key, entry.train_key,
        )
        for label, by in sorted(row.entries.items(), key=lambda pair: natural(pair[0]))
        for seed, entry in sorted(by.items())
    ]  # fmt: skip


def _result(entry: Evaluation) -> str:
    if entry.state != "done":
        return str(entry.state)
    return f"{percent(entry.accuracy)} [{percent(entry.low)}, {percent(entry.high)}]"
