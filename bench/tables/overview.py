"""The short table of a section: at most eight columns, and a caption of what its rows have in common."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from bench.planning.job import IMPORTED
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.tables.citations import paper_page
from bench.tables.columns import recipe_text
from bench.tables.markdown import Markdown, link
from bench.tables.ranking import FLAG, verdict_text
from bench.tables.sections import Section
from bench.tables.text import percent
from bench.terminal import counted

COST = "Training cost (F, × standard)"
SINGLE, RADIUS = "Single draw", "Certified radius"
# not of a checkpoint of someone else's, where it is unknown
WEIGHTS = {"last epoch": "weights of the last epoch", "validation": "weights of the epoch best on validation images"}


def header(section: Section) -> list[str]:
    """The names of the columns; a stochastic model has one column more."""
    own = {"randomised": [SINGLE], "smoothed": [RADIUS]}.get(section.kind, [])
    return ["Rank", "Method", "Clean", "Robust ±", *own, "n × seeds", "Verdict", COST]


def lines(section: Section) -> Iterator[list[str]]:
    """The cells of each row, best first."""
    for rank, (_, row) in zip(_ranks(section), section.ranked, strict=True):
        worst, accuracy = row.accuracy.worst, row.accuracy
        low, high = worst.interval()
        own = {"randomised": [_share(accuracy.single)], "smoothed": [_radius(row)]}.get(section.kind, [])
        yield [
            rank,
            link(row.name, paper_page(row.defense)),
            _share(accuracy.clean),
            _unbroken(f"{_share(worst)} ± {50 * (high - low):.1f}") if worst.values else worst.state(),
            *own,
            _counts(row),
            verdict_text(row),
            training_cost(row),
        ]


def caption(section: Section, *, times: bool = True) -> str:
    """One line: what holds for all rows, or for how many of them. `times`: also of the times."""
    rows, marked = section.rows, any("†" in rank for rank, _ in section.ranked)
    provisional = [row for rank, row in section.ranked if rank[:1].isdigit() and row.provisional]
    facts: list[tuple[str, Callable[[Row], str]]] = [
        ("Architecture {}", lambda row: row.model),
        ("recipe {}", recipe_text),
        ("trained at eps {}", lambda row: row.train_eps.replace("–", "")),
        ("{}", lambda row: WEIGHTS.get(row.provenance.selected, "")),
        ("clean on {}", lambda row: counted(n, "image") if (n := row.accuracy.clean.n) else ""),
    ]
    told = [common(text, [show(row) for row in rows]) for text, show in facts]
    told.append(common(f"{'† ' * marked}order provisional: {{}}", [", ".join(row.provisional) for row in provisional]))
    if section.kind == "smoothed":
        told.append("certified radius: the average, in L2")
    if times and any(row.cost.shared and not math.isnan(row.cost.ratio) for row in rows):
        told.append("no × where the machine did other jobs meanwhile")
    return "; ".join(filter(None, told)) + "."


def common(text: str, values: Iterable[str]) -> str:
    """`text` with the most frequent of the values that are not empty, and of how many rows it holds if not of all."""
    known = Counter(value for value in values if value)
    if not known:
        return ""
    (value, count), total = known.most_common(1)[0], sum(known.values())
    return text.format(value) + (f" ({count} of {total} rows)" if count < total else "")


def _ranks(section: Section) -> Iterator[str]:
    """A rank that several rows share as `1–4` at the first of them, and `=` at the others; `–` without a rank."""
    plain = [rank.removesuffix(FLAG).strip() for rank, _ in section.ranked]
    ties, above = Counter(plain), ""
    for rank in plain:
        number = rank.removesuffix("†")
        last = f"–{int(number) + ties[rank] - 1}" if number.isdigit() and ties[rank] > 1 else ""
        yield "–" if not number.isdigit() else "=" if rank == above else f"{number}{last}{rank[len(number) :]}"
        above = rank


def _share(cell: SeedValues) -> str:
    return percent(cell.mean, 1) if cell.values else cell.state()


def _unbroken(numbers: str) -> Markdown:
    """Numbers that a narrow column must not break into two lines."""
    return Markdown(numbers.replace(" ", "\N{NO-BREAK SPACE}"))


def _radius(row: Row) -> str:
    return f"{row.accuracy.acr.mean:.3f}" if row.accuracy.acr.values else row.accuracy.acr.state()


def _counts(row: Row) -> str:
    """Images and seeds of the worst case; of how many seeds, where some lack it."""
    worst, planned = row.accuracy.worst, len(row.seeds)
    if not worst.values:
        return f"– × {planned}"
    return f"{worst.n} × {len(worst.values)}" + (f" of {planned}" if len(worst.values) < planned else "")


def training_cost(row: Row) -> str:
    """Forward passes of the net per training image and epoch, and the time over that of `standard`; the latter only of
    trainings that had the machine to themselves, since what ran beside them moves it more than the method does."""
    work = row.cost.train_work / row.epochs if row.epochs else math.nan
    passes = "" if math.isnan(work) or row.recipe == IMPORTED else f"{work:.1f} F"
    ratio = "" if math.isnan(row.cost.ratio) or row.cost.shared else f"{row.cost.ratio:.2f}×"
    return ", ".join(filter(None, (passes, ratio))) or "–"
