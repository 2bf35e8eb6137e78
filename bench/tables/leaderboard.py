"""Writes the leaderboard as Markdown, CSV, LaTeX and JSON: equal records give equal bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.atomic import write_atomic
from bench.records.store import Store
from bench.results.certificates import RADII
from bench.results.evaluations import Evaluations, evaluations
from bench.results.labels import chosen_by_draws, collapses, different_n, failures, left_out
from bench.results.rows import Row
from bench.results.seed_values import MEDIAN
from bench.soundness.verdicts import judged_rows
from bench.tables import export, flat, measures, overview, timing
from bench.tables.citations import bibtex
from bench.tables.columns import columns, provisional_letters, shared_times
from bench.tables.latex import DEFAULT, latex
from bench.tables.markdown import anchor, escape, item, replace_block, table
from bench.tables.ranking import hide_invalid, reasons, titles
from bench.tables.sections import KINDS, Section, sections
from bench.tables.text import csv_text

INTRO = (
    "Accuracies in percent. **Robust**: the worst case per image over clean and every attack run at this eps, on the "
    "first n test images that all of them share, ± half its 95 % Wilson interval. Rows share a rank (1–4, then =) "
    "unless the best row of that rank is significantly better on the same images (exact McNemar test at 5 %; with "
    "several seeds, a bootstrap over images). **Verdict**: OK is no known symptom of false robustness, never a proof; "
    "FLAG names the checks that fail (`bench explain C10`) and is ranked; DID NOT LEARN and UNSOUND come last, "
    "without a rank; INVALID holds no number; NOT CHECKED lacks an audit. **F**: forward passes of the net per "
    "training image and epoch; **×**: training time over that of `standard` under the same recipe. A cell without a "
    "number says why; it never counts as robust. All columns and every finding are in results/tables/ as CSV."
)


def markdown(store: Store) -> str:
    """The generated part of leaderboard.md, without the markers: a function of the records alone."""
    store = store.snapshot()
    known = evaluations(store)
    return _block(store, judged_rows(store, known=known), known.at(store.scope))


def board(store: Store) -> list[Row]:
    """The rows of leaderboard.md with their verdicts."""
    return judged_rows(store.snapshot())


def latex_tables(store: Store, names: Sequence[str] = DEFAULT, radii: Iterable[float] = RADII) -> str:
    """The tables of a paper, with these columns. Raises LookupError where there is no such column."""
    return latex(sections(judged_rows(store.snapshot(), radii=radii)), names)


def write_leaderboard(
    store: Store,
    path: Path,
    csv_dir: Path | None = None,
    radii: Iterable[float] = RADII,
    names: Sequence[str] = DEFAULT,
) -> list[Path]:
    """Write the leaderboard.

    Args:
        store: The records.
        path: The Markdown file, of which the text between the markers is replaced.
        csv_dir: Folder of the other files: CSV of evaluations, rows, numbers, checks, times and of each evaluation that
            measures something other than robustness; LaTeX, its BibTeX, and JSON of the rows. None: not written.
        radii: L2 radii of the columns of certified accuracy.
        names: The columns of the LaTeX tables.

    Returns:
        The files written.

    Raises:
        LookupError: There is no such column.
        ValueError: The markers of the file are not one pair, or `csv_dir` is a link.
    """
    if csv_dir is not None and csv_dir.is_symlink():
        raise ValueError(f"{csv_dir} is a link; results hold real files only. Remove it")
    store = store.snapshot()
    known = evaluations(store)
    found, known = judged_rows(store, radii=radii, known=known), known.at(store.scope)
    tables = sections(found)
    tex = latex(tables, names)  # before anything is written, since a column may be unknown
    written = [_write(path, replace_block(path, _block(store, found, known)))]
    if csv_dir is not None:
        texts = {f"{name}.csv": csv_text(lines) for name, lines in _tables(store, known, found).items()}
        texts |= {"leaderboard.tex": tex, "methods.bib": bibtex(), "leaderboard.json": export.robustbench(tables)}
        written += [_write(csv_dir / name, text) for name, text in texts.items()]
    return written


def _tables(store: Store, known: Evaluations, rows: list[Row]) -> dict[str, list[dict[str, object]]]:
    """Lines of each CSV file by its name."""
    tables = sections(rows)
    return {
        "evaluations": hide_invalid(known, rows).lines(),
        "leaderboard": flat.lines(tables),
        "cells": flat.cells(tables),
        "checks": flat.checks(tables),
        "timing": timing.lines(timing.trainings(rows)),
        "timing_attacks": timing.lines(timing.attacks(rows)),
        **measures.by_attack(store, known),
    }


def _block(store: Store, rows: list[Row], known: Evaluations) -> str:
    tables = sections(rows)
    headings = [f"{section.dataset}, {section.threat}" for section in tables]
    parts = [INTRO, ""]
    for note in left_out(store, known.readable, rows):
        parts += [f"{escape(note[0].upper() + note[1:])}.", ""]
    parts += _contents(tables, headings)
    if not rows:
        parts += ["No evaluations yet.", ""]
    above = ""
    for section, heading in zip(tables, headings, strict=True):
        parts += [f"## {escape(heading)}", ""] if heading != above else []
        parts += [f"### {KINDS[section.kind]}", "", *_table(section)]
        above = heading
    if known.unreadable:
        keys = ", ".join(e.key for e in known.unreadable)
        parts += [f"Job folders that cannot be read and are in no table: {keys}.", ""]
    return "\n".join(parts)


def _contents(tables: list[Section], headings: list[str]) -> list[str]:
    """A line per data set and threat, with a link and the number of rows of each kind."""
    counts: dict[str, list[str]] = {}
    for section, heading in zip(tables, headings, strict=True):
        counts.setdefault(heading, []).append(f"{len(section.rows)} {KINDS[section.kind].lower()}")
    lines = [f"- [{escape(name)}](#{anchor(name)}): {', '.join(kinds)}" for name, kinds in counts.items()]
    return [*lines, ""] if len(lines) > 1 else []


def _table(section: Section) -> list[str]:
    """The short table, its caption, what stands out, and all else folded."""
    rows, letters = section.rows, provisional_letters(section.rows)
    parts = [escape(overview.caption(section)), "", table(overview.header(section), list(overview.lines(section)))]
    if told := [*titles(rows), *reasons(rows), *collapses(rows), *different_n(rows), *chosen_by_draws(rows)]:
        parts += [*map(item, told), ""]
    shown = columns(rows, letters)
    parts += ["<details><summary>All columns</summary>", ""]
    parts += [
        table(["Rank", *shown], [[rank, *(show(row) for show in shown.values())] for rank, row in section.ranked])
    ]
    if letters:
        parts += ["Provisional: " + "; ".join(f"{v} = {escape(k)}" for k, v in letters.items()) + ".", ""]
    for note in footnotes(rows):
        parts += [escape(note), ""]
    if absent := [item(line) for line in failures(rows)]:
        parts += [*absent, ""]
    return [*parts, "</details>", ""]


def footnotes(rows: list[Row]) -> list[str]:
    """What signs and words in these rows mean, except for the letters of provisional ones."""
    found = []
    if shared := shared_times(rows)[1]:
        found.append(f"{shared[0].upper()}{shared[1:]}.")
    if any(cell.distance for row in rows for cell in row.accuracy.attacks.values()):
        found.append(f"{MEDIAN[0].upper()}{MEDIAN[1:]}.")
    return found


def _write(path: Path, text: str) -> Path:
    """Write atomically, creating the folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: file.write(text.encode()))
    return path
