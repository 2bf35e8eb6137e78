"""Rows -> the tables of the page: a few columns, the others of the leaderboard on demand, and for each number the
evaluations behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from bench.report.canvas import Plot, slug
from bench.report.captions import mark_of
from bench.report.provenance import of_clean, of_training, of_worst
from bench.results.evaluations import EvaluationResult
from bench.results.labels import collapses, different_n, failures
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import GRAVE, Finding
from bench.tables.columns import columns as column_texts
from bench.tables.columns import natural, provisional_letters
from bench.tables.leaderboard import footnotes
from bench.tables.overview import training_cost
from bench.tables.ranking import reasons, verdict_text
from bench.tables.sections import KINDS, Section, sections
from bench.tables.text import percent

# columns of the leaderboard that the short table has in its own form
SHORT = ("Method", "Standard accuracy", "Best known robust accuracy", "Verdict", "95 % interval", "n", "Seeds")


class Cell(NamedTuple):
    """The text of a cell, and the keys of the records that it was computed from."""

    text: str
    keys: Sequence[str]


@dataclass(frozen=True)
class BoardLine:
    """One row of a table: its rank, its name, and its cells in the columns that are shown only on demand."""

    row: Row
    rank: str
    name: str
    more: list[str]

    @property
    def mark(self) -> str:
        """That of its model."""
        return mark_of(self.row)

    @property
    def clean(self) -> Cell:
        """Clean accuracy in percent."""
        return Cell(_percent(self.row.accuracy.clean), of_clean(self.row))

    @property
    def robust(self) -> Cell:
        """The worst case in percent."""
        return Cell(_percent(self.row.accuracy.worst), of_worst(self.row))

    @property
    def bar(self) -> list[str]:
        """Low end, mean and high end of the worst case, and clean accuracy, in percent; empty without a worst case."""
        worst, clean = self.row.accuracy.worst, self.row.accuracy.clean
        values = [worst.interval()[0], worst.mean, worst.interval()[1], clean.mean if clean.values else 0.0]
        return [percent(value, 1) for value in values] if worst.values else []

    @property
    def size(self) -> str:
        """`1000 × 2/3`: images, seeds done and planned."""
        worst = self.row.accuracy.worst
        done, planned = len(worst.values), len(self.row.seeds)
        return f"{worst.n} × {done}" + (f"/{planned}" if done < planned else "") if worst.values else "–"

    @property
    def cost(self) -> Cell:
        """Work of the training, and its time as a multiple of that of `standard`, as in the leaderboard."""
        return Cell(training_cost(self.row), of_training(self.row))

    @property
    def qualified(self) -> str:
        """What its verdict rests on: `(C15)`, or `(images not kept)`."""
        return verdict_text(self.row).removeprefix(self.row.verdict)

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
    """One table: a data set under one threat, one kind of predictor. `header`: of the columns shown on demand;
    `letters`: why rows are provisional."""

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
        **more: Any,
    ) -> Plot:
        """A figure of the rows of this table. `title`: in front of that of the table; `more`: of `Plot`."""
        return Plot(
            slug(name, self.dataset, self.threat, self.kind), title + self.title, alt, caption, header, lines, drawing,
            self.dataset, self.threat, behind, **more,
        )  # fmt: skip


def boards(rows: list[Row]) -> list[Board]:
    """The sections of leaderboard.md, in their order and with their columns."""
    return [_board(section) for section in sections(rows)]


def _board(section: Section) -> Board:
    members, letters = section.rows, provisional_letters(section.rows)
    texts = {name: [show(row) for _, row in section.ranked] for name, show in column_texts(members, letters).items()}
    header = [name for name, cells in texts.items() if name not in SHORT and set(cells) != {"–"}]
    lines = [
        BoardLine(row, rank, row.name, [texts[name][k] for name in header])
        for k, (rank, row) in enumerate(section.ranked)
    ]
    notes = [*reasons(members), *collapses(members), *different_n(members), *failures(members)]
    by_letter = {letter: reason for reason, letter in letters.items()}
    table = section.dataset, section.threat, KINDS[section.kind]
    return Board(*table, header, lines, by_letter, footnotes(members), notes)


def _percent(cell: SeedValues) -> str:
    return percent(cell.mean, 1) if cell.values else cell.state()


def _result(entry: EvaluationResult) -> str:
    if entry.state != "done":
        return entry.state
    return f"{percent(entry.accuracy)} [{percent(entry.low)}, {percent(entry.high)}]"
