"""Robust accuracy of each class: a mean over classes hides one that falls first."""

from __future__ import annotations

import math

from bench.records.store import Store
from bench.report.board import Board
from bench.report.canvas import MOST, Plot, drawn, slug
from bench.report.captions import best, called, conditions
from bench.report.heatmap import fill
from bench.report.provenance import of_worst
from bench.report.text import short
from bench.results.rows import Row
from bench.results.worst_case import outcomes

MOST_CLASSES = 40  # more make no drawing that can be read


def class_maps(store: Store, found: list[Board]) -> list[Plot]:
    """Worst case by class, one for each table that has one; the best models of it."""
    made = [_class_map(store, board) for board in found]
    return [plot for plot in made if plot is not None]


def _class_map(store: Store, board: Board) -> Plot | None:
    rows = [row for row in best(board.rows, MOST) if row.worst.values and row.verdict != "INVALID"]
    by_row = [(row, each) for row in rows if (each := _by_class(store, row))]
    if not by_row or max(len(each) for _, each in by_row) > MOST_CLASSES:
        return None
    classes = sorted({label for _, each in by_row for label in each})
    table = [[each.get(label, (math.nan, 0)) for label in classes] for _, each in by_row]
    figure, axes = drawn(2.6 + 0.6 * len(classes), 1.2 + 0.27 * len(by_row))
    fill(
        axes,
        [[share for share, _ in line] for line in table],
        [[_format(share) for share, _ in line] for line in table],
    )
    axes.set_xticks(range(len(classes)), [str(label) for label in classes], fontsize=8)
    axes.set_xlabel("class")
    axes.set_yticks(range(len(by_row)), [short(called(row), 46) for row, _ in by_row], fontsize=8)
    sizes = [n for line in table for _, n in line if n]
    return Plot(
        slug("class", board.dataset, board.threat, board.kind),
        f"{board.dataset}, {board.threat}, {board.kind.lower()}",
        f"Heat map of worst-case accuracy of {len(by_row)} models by {len(classes)} classes, numbers in the table.",
        f"Worst case in percent by class, mean over seeds, {min(sizes)} to {max(sizes)} images a class: small classes "
        f"vary by chance. {conditions([row for row, _ in by_row])}",
        ["defense", *(f"class {label} (n)" for label in classes)],
        [
            [called(row), *(f"{_format(s)} ({n})" for s, n in line)]
            for (row, _), line in zip(by_row, table, strict=True)
        ],
        figure,
        board.dataset,
        board.threat,
        [{0: of_worst(row)} for row, _ in by_row],
    )


def _by_class(store: Store, row: Row) -> dict[int, tuple[float, int]]:
    """Share right, mean over seeds, and number of images by label; nothing where labels were not stored."""
    import numpy as np

    shares: dict[int, list[float]] = {}
    sizes: dict[int, int] = {}
    for keys in row.keys.values():
        right = outcomes(store, keys, row.eps_value if row.norm else 0.0)
        samples = store.samples(keys[0], ("index", "label"))
        if "label" not in samples:
            return {}
        labels = samples["label"][np.argsort(samples["index"], kind="stable")][: len(right)]
        for label in np.unique(labels):
            inside = right[labels == label]
            shares.setdefault(int(label), []).append(float(inside.mean()))
            sizes[int(label)] = len(inside)
    return {label: (float(np.mean(values)), sizes[label]) for label, values in sorted(shares.items())}


def _format(share: float) -> str:
    return "–" if math.isnan(share) else f"{100 * share:.0f}"
