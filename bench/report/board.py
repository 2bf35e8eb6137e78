"""Rows -> the tables of the page: the columns of leaderboard.md, and for each number the evaluations behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from bench.report.canvas import Plot, slug
from bench.report.provenance import keys_behind
from bench.results.evaluations import EvaluationResult
from bench.results.labels import collapses, different_n, failures
from bench.results.rows import Row
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import GRAVE, Finding
from bench.tables.columns import columns as column_texts
from bench.tables.columns import natural, provisional_letters
from bench.tables.leaderboard import footnotes
from bench.tables.ranking import reasons
from bench.tables.sections import KINDS, Section, sections
from bench.tables.text import percent


@dataclass(frozen=True)
class BoardLine:
    """One row of a table: its rank, its cells in the order of the header, and the keys behind each cell."""

    row: Row
    rank: str
    cells: list[str]
    behind: list[list[str]]

    @property
    def findings(self) -> list[Finding]:
        """Findings with a message: neither passed, nor not applicable, nor not checked."""
        return [finding for finding in self.row.findings if finding.level in (*GRAVE, "I")]

    @property
    def unchecked(self) -> list[str]:
        """Codes of the checks that were not made."""
        codes = [finding.code for finding in self.row.findings if finding.level == "not checked"]
        return [code for code in dict.fromkeys(codes) if code in CHECKS]

    @property
    def evidence(self) -> list[tuple[EvaluationResult, str]]:
        """Every evaluation of the row by attack and seed, with its result; an INVALID row shows no numbers."""
        by_attack = sorted(self.row.provenance.entries.items(), key=lambda pair: natural(pair[0]))
        found = [entry for _, by_seed in by_attack for _, entry in sorted(by_seed.items())]
        return [(entry, "invalid" if self.row.verdict == "INVALID" else _result(entry)) for entry in found]


@dataclass(frozen=True)
class Board:
    """One table: a data set under one threat, one kind of predictor. `letters`: why rows are provisional."""

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

    @property
    def title(self) -> str:
        """`mnist, Linf eps = 0.1, deterministic`."""
        return f"{self.dataset}, {self.threat}, {self.kind.lower()}"

    def plot(
        self,
        name: str,
        alt: str,
        caption: str,
        header: Sequence[str],
        lines: Sequence[Sequence[object]],
        drawing: Figure,
        behind: Sequence[Mapping[int, Sequence[str]]],
        title: str = "",
    ) -> Plot:
        """A figure of the rows of this table. `title`: in front of that of the table."""
        return Plot(
            slug(name, self.dataset, self.threat, self.kind), title + self.title, alt, caption, header, lines, drawing,
            self.dataset, self.threat, behind,
        )  # fmt: skip


def boards(rows: list[Row]) -> list[Board]:
    """The sections of leaderboard.md, in their order and with their columns."""
    return [_board(section) for section in sections(rows)]


def _board(section: Section) -> Board:
    members, letters = section.rows, provisional_letters(section.rows)
    columns = column_texts(members, letters)
    lines = [
        BoardLine(row, rank, [show(row) for show in columns.values()], [keys_behind(row, name) for name in columns])
        for rank, row in section.ranked
    ]
    notes = [*reasons(members), *collapses(members), *different_n(members), *failures(members)]
    by_letter = {letter: reason for reason, letter in letters.items()}
    header = ["Rank", *columns]
    table = section.dataset, section.threat, KINDS[section.kind]
    return Board(*table, header, lines, by_letter, footnotes(members), notes)


def _result(entry: EvaluationResult) -> str:
    if entry.state != "done":
        return entry.state
    return f"{percent(entry.accuracy)} [{percent(entry.low)}, {percent(entry.high)}]"
