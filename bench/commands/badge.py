"""`bench badge`: one row of the tables as an SVG badge, for the front page of a repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from xml.sax.saxutils import escape

import typer

from bench.atomic import write_text
from bench.commands.arguments import Results, opened, output_file
from bench.commands.options import ScopeOptions, takes_groups

COLORS = {"OK": "#2e7d32", "FLAG": "#b26a00", "NOT CHECKED": "#6a5a7a"}  # others are red; white text stays readable
LETTER = 6.6  # width of a letter of 11 px, generous so that no font overflows
LABEL = "robust accuracy"


@takes_groups
def badge(
    scope: ScopeOptions,
    output: Annotated[Path, typer.Option(help="The SVG file to write.")] = Path("robustness.svg"),
    results_dir: Results = Path("results"),
) -> None:
    """Write a row as an SVG badge. Worst case, interval, budget and number of images, colored by the verdict.

    Example: bench badge --defense pgd_at --eps 8/255
    """
    from bench.planning.evaluations import BASELINE
    from bench.soundness.verdicts import judged_rows

    rows = [row for row in judged_rows(scope.of(opened(results_dir)), split="test") if row.norm]
    typed = {part.strip() for word in scope.defense for part in word.split(",")}
    asked = [row for row in rows if row.defense != BASELINE or BASELINE in typed] or rows
    if len(asked) != 1:
        names = "; ".join(f"{row.method} on {row.dataset} at {row.norm} eps {row.eps}" for row in asked[:5])
        found = f"{len(asked)} rows ({names}{', and more' if len(asked) > 5 else ''})" if asked else "no row"
        raise LookupError(f"a badge is about one row, found {found}; choose by SPEC, --dataset, --defense, --eps")
    row = asked[0]
    worst = row.accuracy.worst
    value = f"no number, {row.norm} {row.eps}"
    if worst.values and row.verdict != "INVALID":
        low, high = worst.interval()
        half = 50 * (high - low)
        value = f"{100 * worst.mean:.1f} % ± {half:.1f}, {row.norm} {row.eps}, n={worst.n}"
    words = value if row.verdict == "OK" else f"{value}, {row.verdict}"
    write_text(output_file(output), _svg(LABEL, words, COLORS.get(row.verdict, "#b3261e")))
    print(f"{output}: {words}")


def _svg(label: str, value: str, color: str) -> str:
    left, right = (round(LETTER * len(text)) + 12 for text in (label, value))
    text = 'fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{escape(label)}: {escape(value)}"><title>{escape(label)}: {escape(value)}</title>'
        f'<rect width="{left}" height="20" fill="#444"/><rect x="{left}" width="{right}" height="20" fill="{color}"/>'
        f'<g {text}><text x="{left / 2:g}" y="14">{escape(label)}</text>'
        f'<text x="{left + right / 2:g}" y="14">{escape(value)}</text></g></svg>\n'
    )
