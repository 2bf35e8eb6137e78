"""Tables of a paper: LaTeX with booktabs, one table environment per section, with citations, caption and label."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.tables import citations, overview
from bench.tables.ranking import FLAG, UNRANKED, verdict_text
from bench.tables.sections import KINDS, Section
from bench.tables.text import decimals, percent
from bench.terminal import printable

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': "''", "–": "--", "†": r"\dag{}", "‡": r"\ddag{}", "×": r"$\times$", "±": r"$\pm$",
    FLAG: r"$\ast$", "`": r"\textasciigrave{}",
}  # fmt: skip
DEFAULT = ("rank", "method", "clean", "autoattack", "robust", "n", "verdict")


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is: nothing in it is a command, a comment, a dash or a line break."""
    plain = printable(text)
    shown = ("-{}" if c + after == "--" else _LATEX.get(c, c) for c, after in zip(plain, plain[1:] + " ", strict=True))
    return "".join(shown).strip()


@dataclass(frozen=True)
class Column:
    """A column: its head and cells as LaTeX, l or r, and the number (share in [0,1]) whose largest is bold."""

    head: str
    align: str
    cell: Callable[[str, Row], str]
    best: Callable[[Row], SeedValues] | None = None


COLUMNS: dict[str, Column] = {
    "rank": Column("Rank", "r", lambda rank, row: latex_text(rank)),
    "method": Column("Method", "l", lambda rank, row: _method(row)),
    "architecture": Column("Architecture", "l", lambda rank, row: latex_text(row.model)),
    "train_eps": Column(r"Train $\varepsilon$", "r", lambda rank, row: latex_text(row.train_eps)),
    "clean": Column("Clean", "r", lambda rank, row: _share(row.accuracy.clean), lambda row: row.accuracy.clean),
    "autoattack": Column(
        "AutoAttack", "r", lambda rank, row: _with_n(row, row.accuracy.autoattack), lambda row: row.accuracy.autoattack
    ),
    "robust": Column("Robust", "r", lambda rank, row: _robust(row), lambda row: row.accuracy.worst),
    "interval": Column(r"95 \% interval", "r", lambda rank, row: _interval(row)),
    "n": Column("$n$", "r", lambda rank, row: str(row.accuracy.worst.n) if row.accuracy.worst.values else "--"),
    "seeds": Column("Seeds", "r", lambda rank, row: f"{len(row.accuracy.worst.values)}/{len(row.seeds)}"),
    "verdict": Column("Verdict", "l", lambda rank, row: latex_text(verdict_text(row))),
    "seconds": Column("Training s", "r", lambda rank, row: _time(row, row.cost.train_seconds, 1)),
    "ratio": Column(r"$\times$ standard", "r", lambda rank, row: _time(row, row.cost.ratio, 2)),
}


def chosen_columns(names: Sequence[str], rows: Sequence[Row]) -> dict[str, Column]:
    """The columns of these names: those of `COLUMNS`, or attacks by their name. Raises LookupError for any other."""
    attacks = {name: name for row in rows for name in row.accuracy.attacks}
    found = {}
    for name in names:
        if name not in COLUMNS and name not in attacks:
            near = difflib.get_close_matches(name, [*COLUMNS, *attacks], n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise LookupError(
                f"no column '{name}'.{hint} Known: {', '.join(dict.fromkeys([*COLUMNS, *sorted(attacks)]))}"
            )
        found[name] = COLUMNS.get(name) or _attack(name)
    return found


def _attack(name: str) -> Column:
    def cell(row: Row) -> SeedValues:
        return row.accuracy.attacks.get(name, SeedValues())

    return Column(latex_text(name), "r", lambda rank, row: _with_n(row, cell(row)), cell)


def latex(sections: list[Section], names: Sequence[str] = DEFAULT) -> str:
    """One table per section, for `\\input` in a document that loads booktabs; accuracies in percent.

    Args:
        sections: The tables.
        names: Of columns, as in `chosen_columns`.

    Raises:
        LookupError: There is no such column.
    """
    columns = chosen_columns(names, [row for section in sections for row in section.rows])
    parts = ["% Written by `bench leaderboard`; needs \\usepackage{booktabs}, UTF-8, and the papers of `--bib`."]
    labels: dict[str, int] = {}
    for section in sections:
        words = re.sub(r"[^a-z0-9]+", "-", f"{section.dataset} {section.threat} {section.kind}".lower()).strip("-")
        labels[words] = labels.get(words, 0) + 1
        parts += ["", *_table(section, columns, words + (f"-{labels[words]}" if labels[words] > 1 else ""))]
    return "\n".join([*parts, ""])


def _table(section: Section, columns: dict[str, Column], label: str) -> list[str]:
    best = {name: _best(section, column) for name, column in columns.items()}
    lines = []
    for rank, row in section.ranked:
        cells = [_bold(column.cell(rank, row), row, column, best[name]) for name, column in columns.items()]
        # a [ at the start of a row would be an argument of the \\ before it
        lines.append(("{}" if cells[0].startswith("[") else "") + " & ".join(cells) + r" \\")
    return [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(section, columns)}}}",
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{{''.join(column.align for column in columns.values())}}}",
        r"\toprule",
        " & ".join(column.head for column in columns.values()) + r" \\",
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def _caption(section: Section, columns: dict[str, Column]) -> str:
    cited = citations.papers("attacks", "autoattack")
    suite = rf" AutoAttack: \cite{{{cited[0].key}}}." if cited else ""
    about = f"{section.dataset}, {section.threat}, {KINDS[section.kind].lower()}: accuracy in percent."
    robust = "Robust: worst case per image over clean and every attack, ± half the 95 % Wilson interval, on n images."
    timed = not columns.keys().isdisjoint(("seconds", "ratio")) and any(row.cost.shared for row in section.rows)
    end = "Bold: the best among rows that are ranked."
    end += " ‡ trained while the machine did other jobs: not comparable with other times." if timed else ""
    return latex_text(f"{about} {robust}") + suite + " " + latex_text(f"{overview.caption(section, times=False)} {end}")


def _best(section: Section, column: Column) -> str:
    """The largest number of a column as shown, among rows that have a rank."""
    cells = [column.best(row) for _, row in section.ranked if column.best and row.verdict not in UNRANKED]
    return percent(max((cell.mean for cell in cells if cell.values), default=-1.0), 1)


def _bold(text: str, row: Row, column: Column, best: str) -> str:
    """The cell with its number bold if it is the best."""
    counts = column.best is not None and row.verdict not in UNRANKED and column.best(row).values
    return rf"\textbf{{{best}}}{text[len(best) :]}" if counts and text.startswith(best) else text


def _method(row: Row) -> str:
    """The display name, the settings, and the papers."""
    settings = row.method.removeprefix(row.defense)
    known = row.method.startswith(row.defense)
    name = citations.display_name(row.defense) + settings if known else row.method
    keys = ",".join(paper.key for paper in citations.papers("defenses", row.defense)) if known else ""
    return latex_text(name) + (rf"~\cite{{{keys}}}" if keys else "")


def _share(cell: SeedValues) -> str:
    return percent(cell.mean, 1) if cell.values else latex_text(cell.state())


def _with_n(row: Row, cell: SeedValues) -> str:
    """Percent, and n where it is not that of the worst case; or the state."""
    return _share(cell) + (f" ($n={cell.n}$)" if cell.values and cell.n != row.accuracy.worst.n else "")


def _robust(row: Row) -> str:
    low, high = row.accuracy.worst.interval()
    return _share(row.accuracy.worst) + (rf" $\pm$ {50 * (high - low):.1f}" if row.accuracy.worst.values else "")


def _time(row: Row, value: float, digits: int) -> str:
    return latex_text(decimals(value, digits) + (" ‡" if row.cost.shared and value == value else ""))


def _interval(row: Row) -> str:
    low, high = row.accuracy.worst.interval()
    return f"{percent(low)}--{percent(high)}" if row.accuracy.worst.values else "--"
