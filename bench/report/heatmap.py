"""Heat maps with the value in every cell: defense by attack, and defense by class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.records.store import Store
from bench.report.board import Board
from bench.report.canvas import MAX_LINES, Plot, single
from bench.report.captions import best, conditions, mark_of, row_label, short
from bench.report.provenance import of_attack, of_clean, of_worst
from bench.report.svg import INK
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.results.worst_case import minima
from bench.tables.columns import natural
from bench.tables.text import decimals, percent
from bench.terminal import counted

MAX_ROWS, MAX_CLASSES = 40, 40  # more cannot be read
WHITE_BELOW = 0.46  # the share below which white is read better on its color than black


def heat_maps(boards: list[Board]) -> list[Plot]:
    """Accuracy under each attack, one figure for each table whose rows were attacked."""
    return [_attack_map(board) for board in boards if any(row.accuracy.attacks for row in board.rows)]


def _attack_map(board: Board) -> Plot:
    rows = board.rows[:MAX_ROWS]
    names = sorted({name for row in rows for name in row.accuracy.attacks}, key=natural)
    columns = ["clean", *names, "worst case"]
    cells = [
        [row.accuracy.clean, *(row.accuracy.attacks.get(name) for name in names), row.accuracy.worst] for row in rows
    ]
    texts = [[_cell_text(cell) for cell in line] for line in cells]
    shares = [[cell.mean if cell is not None else math.nan for cell in line] for line in cells]
    sizes = [_sizes(column) for column in zip(*cells, strict=True)]
    figure = _heat_map((2.6 + 0.72 * len(columns), 1.9 + 0.27 * len(rows)), rows, shares, texts)
    ticks = [f"{short(name, 30)}{size}" for name, size in zip(columns, sizes, strict=True)]
    figure.axes[0].set_xticks(range(len(columns)), ticks, rotation=40, ha="right", fontsize=8)
    lines = [[row_label(row), *line] for row, line in zip(rows, texts, strict=True)]
    left_out = len(board.rows) - len(rows)
    more = f" Shown: the first {len(rows)} of {len(board.rows)} rows; the table above has all." if left_out else ""
    return board.plot(
        "heat",
        f"Heat map of accuracy in percent: {counted(len(rows), 'defense')} by {counted(len(columns), 'attack')}; the "
        "table has its numbers.",
        "Accuracy in percent under each attack, mean over the seeds that have it; the worst case is per image, over "
        "the images that all attacks share and the seeds that have all of them. "
        f"{conditions(rows, cells=[cell for line in cells for cell in line])}{more}",
        ["defense", *(f"{name}{size}" for name, size in zip(columns, sizes, strict=True))],
        lines,
        figure,
        [dict(enumerate([of_clean(r), *(of_attack(r, name) for name in names), of_worst(r)], 1)) for r in rows],
        data=[dict(zip(["defense", *columns], line, strict=True)) for line in lines],
        shades=shares,
        marks=[mark_of(row) for row in rows],
    )


def class_maps(store: Store, boards: list[Board]) -> list[Plot]:
    """Worst case by class, one figure for each table that has one, with its best models: a mean over classes hides one
    that loses its accuracy first."""
    made = [_class_map(store, board) for board in boards]
    return [plot for plot in made if plot is not None]


def _class_map(store: Store, board: Board) -> Plot | None:
    candidates = [row for row in best(board.rows, MAX_LINES) if row.accuracy.worst.values and row.verdict != "INVALID"]
    by_row = [(row, found) for row in candidates if (found := _by_class(store, row))]
    if not by_row or max(len(found) for _, found in by_row) > MAX_CLASSES:
        return None
    rows = [row for row, _ in by_row]
    classes = sorted({label for _, found in by_row for label in found})
    table = [[found.get(label, (math.nan, 0)) for label in classes] for _, found in by_row]
    shares = [[share for share, _ in line] for line in table]
    texts = [[decimals(100 * share, 0) for share in line] for line in shares]
    figure = _heat_map((2.6 + 0.6 * len(classes), 1.2 + 0.27 * len(rows)), rows, shares, texts)
    figure.axes[0].set_xticks(range(len(classes)), [str(label) for label in classes], fontsize=8)
    figure.axes[0].set_xlabel("class")
    sizes = [n for line in table for _, n in line if n]
    return board.plot(
        "class",
        f"Heat map of worst-case accuracy of {counted(len(rows), 'model')} by {counted(len(classes), 'class')}, "
        "numbers in the table.",
        f"Worst case in percent by class, mean over seeds, {min(sizes)} to {max(sizes)} images a class: small classes "
        f"vary by chance. {conditions(rows)}",
        ["defense", *(f"class {label} (n)" for label in classes)],
        [
            [row_label(row), *(f"{text} ({n})" for text, (_, n) in zip(line, found, strict=True))]
            for row, line, found in zip(rows, texts, table, strict=True)
        ],
        figure,
        [{0: of_worst(row)} for row in rows],
        shades=shares,
        marks=[mark_of(row) for row in rows],
    )


def _by_class(store: Store, row: Row) -> dict[int, tuple[float, int]]:
    """Robust accuracy (mean over seeds) and number of images by label; empty where labels were not stored."""
    shares: dict[int, list[float]] = {}
    sizes: dict[int, int] = {}
    for keys in row.provenance.keys.values():
        robust = minima(store, [keys], row.budget)[0].robust
        samples = store.samples(keys[0], ("index", "label"))
        if "label" not in samples:
            return {}
        labels = samples["label"][np.argsort(samples["index"], kind="stable")][: len(robust)]
        for label in np.unique(labels):
            inside = robust[labels == label]
            shares.setdefault(int(label), []).append(float(inside.mean()))
            sizes[int(label)] = len(inside)
    return {label: (float(np.mean(values)), sizes[label]) for label, values in sorted(shares.items())}


def _heat_map(size: tuple[float, float], rows: list[Row], shares: list[list[float]], texts: list[list[str]]) -> Figure:
    """A line for each row."""
    figure, axes = single(*size)
    draw_cells(axes, shares, texts)
    axes.set_yticks(range(len(rows)), [short(row_label(row), 46) for row in rows], fontsize=8)
    return figure


def draw_cells(axes: Axes, shares: Sequence[Sequence[float]], texts: Sequence[Sequence[str]]) -> None:
    """Cells colored by share, the first line on top, each with its text in black or white, whichever is read better."""
    down, across = (np.arange(size + 1) - 0.5 for size in np.shape(shares))
    axes.pcolormesh(across, down, np.ma.masked_invalid(shares), cmap="cividis", vmin=0, vmax=1)
    for (y, x), share in np.ndenumerate(shares):
        ink = INK if np.isnan(share) else "white" if share < WHITE_BELOW else "black"
        axes.text(x, y, short(texts[y][x], 14), ha="center", va="center", fontsize=8, color=ink)
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _sizes(cells: tuple[SeedValues | None, ...]) -> str:
    """` n=1000`: columns with other images cannot be compared."""
    sizes = sorted({cell.n for cell in cells if cell is not None and cell.values})
    return f" n={sizes[0]}" + (f" to {sizes[-1]}" if len(sizes) > 1 else "") if sizes else ""


def _cell_text(cell: SeedValues | None) -> str:
    return percent(cell.mean, 1) if cell is not None and cell.values else cell.state() if cell else "–"
