"""Defense x attack, with the value in every cell."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bench.report.board import Board
from bench.report.canvas import Plot, drawn, slug
from bench.report.captions import called, conditions
from bench.report.provenance import of_attack, of_clean, of_worst
from bench.report.svg import INK
from bench.report.text import short
from bench.results.worst_case import Cell
from bench.tables.columns import natural

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TALLEST = 40


def heat_maps(found: list[Board]) -> list[Plot]:
    """One for each table whose rows were attacked."""
    return [_heat_map(board) for board in found if any(row.attacks for row in board.rows)]


def _heat_map(board: Board) -> Plot:
    rows = board.rows[:TALLEST]
    names = sorted({name for row in rows for name in row.attacks}, key=natural)
    columns = ["clean", *names, "worst case"]
    cells = [[row.clean, *(row.attacks.get(name) for name in names), row.worst] for row in rows]
    figure, axes = drawn(2.6 + 0.72 * len(columns), 1.9 + 0.27 * len(rows))
    fill(
        axes,
        [[_share(cell) for cell in line] for line in cells],
        [[_format(cell) for cell in line] for line in cells],
    )
    sizes = [_sizes(line) for line in zip(*cells, strict=True)]
    ticks = [f"{short(name, 30)}{size}" for name, size in zip(columns, sizes, strict=True)]
    axes.set_xticks(range(len(columns)), ticks, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [short(called(row), 46) for row in rows], fontsize=8)
    left_out = len(board.rows) - len(rows)
    more = f" The first {len(rows)} of {len(board.rows)} rows; the table above has all." if left_out else ""
    return Plot(
        slug("heat", board.dataset, board.threat, board.kind),
        f"{board.dataset}, {board.threat}, {board.kind.lower()}",
        f"Heat map of accuracy in percent: {len(rows)} defenses by {len(columns)} attacks; the table has its numbers.",
        "Accuracy in percent under each attack, mean over the seeds that have it; the worst case is per image, over "
        "the images that all attacks share and the seeds that have all of them. "
        f"{conditions(rows, cells=[cell for line in cells for cell in line])}{more}",
        ["defense", *columns],
        [[called(row), *(_format(cell) for cell in line)] for row, line in zip(rows, cells, strict=True)],
        figure,
        board.dataset,
        board.threat,
        [dict(enumerate([of_clean(r), *(of_attack(r, name) for name in names), of_worst(r)], 1)) for r in rows],
    )


def fill(axes: Axes, shares: list[list[float]], texts: list[list[str]]) -> None:
    """Colored cells by share, each with its text in black or white, whichever is read better."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colors = colormaps["cividis"]
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            known = not math.isnan(share)
            face = colors(share) if known else "none"
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=face, edgecolor="none", clip_on=False))
            ink = ("white" if share < 0.55 else "black") if known else INK
            axes.text(x, y, short(texts[y][x], 14), ha="center", va="center", fontsize=8 if known else 6.5, color=ink)
    axes.set_xlim(-0.5, len(shares[0]) - 0.5)
    axes.set_ylim(len(shares) - 0.5, -0.5)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _sizes(cells: tuple[Cell | None, ...]) -> str:
    """` n=1000`: columns over other images are not to be compared."""
    sizes = sorted({cell.n for cell in cells if cell is not None and cell.values})
    return f" n={sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "") if sizes else ""


def _share(cell: Cell | None) -> float:
    return cell.mean if cell is not None and cell.values else math.nan


def _format(cell: Cell | None) -> str:
    return f"{100 * cell.mean:.1f}" if cell is not None and cell.values else cell.state() if cell else "–"
