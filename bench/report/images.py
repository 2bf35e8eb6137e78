"""Adversarial images beside the clean ones: which are shown, and how. `bench.commands.report_images` fetches them.

Images need the data set, and predicted classes the weights; neither has to be on this machine. The page says what is
missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.records.store import IMAGES, Store
from bench.report.board import Board
from bench.report.canvas import GRID, Plot, page_style
from bench.report.captions import best, measured_on, row_label, short
from bench.report.svg import INK
from bench.results.evaluations import EvaluationResult

MAX_MODELS, PER_MODEL, GAIN = 6, 3, 10
MAX_PIXELS = 200_000  # pixel values of all images of a page: some 400 kB of it
NO_FILES = (
    "No images are shown: no evaluation has its adversarial.safetensors beside its record. That file stays where the "
    "evaluation ran, as it is too large for a repository."
)


@dataclass(frozen=True)
class Wanted:
    """Images to be fetched: of an evaluation that stored them in the results folder. `name`: of its row."""

    name: str
    entry: EvaluationResult


@dataclass(frozen=True)
class Picture:
    """One test image (h w, or h w c, in [0,1]), clean and attacked.

    `predictions`: class and confidence that the deployed model gives to each of the two, None without its weights;
    `fooled`: by the record.
    """

    index: int
    label: str
    clean: np.ndarray[Any, Any]
    attacked: np.ndarray[Any, Any]
    fooled: bool
    predictions: tuple[tuple[str, float], tuple[str, float]] | None

    def prediction(self, which: int) -> tuple[str, str]:
        """Class and confidence of the clean (0) or the attacked image (1), as text."""
        if self.predictions is None:
            return "–", "–"
        name, confidence = self.predictions[which]
        return name, f"{confidence:.2f}" if math.isfinite(confidence) else "–"


@dataclass(frozen=True)
class Fetched:
    """The pictures found, by key of the evaluation, and sentences about what is missing."""

    strips: dict[str, list[Picture]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Fetch = Callable[[list[Wanted]], Fetched]
Strip = tuple[Wanted, list[Picture]]


def no_images(wanted: list[Wanted]) -> Fetched:
    """For a page that shows no images."""
    return Fetched(notes=["Images were not requested."] if wanted else [])


def image_grids(store: Store, boards: list[Board], fetch: Fetch) -> tuple[list[Plot], str]:
    """A figure for each table whose images lie here, and sentences about the others."""
    wanted = [(board, _wanted(store, board)) for board in boards]
    asked = [strip for _, strips in wanted for strip in strips]
    fetched = fetch(asked) if asked else Fetched(notes=[NO_FILES])
    plots, notes, left = [], list(fetched.notes), MAX_PIXELS
    for board, strips in wanted:
        shown: list[Strip] = []
        for strip in strips:
            pictures = fetched.strips.get(strip.entry.key, [])
            size = sum(3 * picture.clean.size for picture in pictures)
            if size > left:
                notes.append("Some models are left out, to keep the page small.")
            elif pictures:
                shown.append((strip, pictures))
                left -= size
        if shown:
            plots.append(_figure(board, shown))
    return plots, " ".join(dict.fromkeys(notes))


def _wanted(store: Store, board: Board) -> list[Wanted]:
    """For each of the best models of a table (and `standard`) the strongest attack that stored its images."""
    strongest: dict[int, EvaluationResult] = {}
    for row in board.rows:
        entries = [
            entry for by_seed in row.provenance.entries.values() for entry in by_seed.values() if _stored(store, entry)
        ]
        if entries and row.verdict != "INVALID":
            strongest[id(row)] = min(entries, key=lambda entry: (entry.accuracy, entry.attack_label))
    shown = best([row for row in board.rows if id(row) in strongest], MAX_MODELS)
    return [Wanted(row_label(row), strongest[id(row)]) for row in shown]


def _stored(store: Store, entry: EvaluationResult) -> bool:
    """Has it images within the budget of the row? Those of a minimal-norm attack may lie outside, and those of a curve
    are of its largest budget."""
    if not entry.norm or entry.state != "done" or not math.isnan(entry.median_distance):
        return False
    record = store.record(entry.key)
    is_curve = store.evaluation(entry.key).attack.settings.get("budgets")
    return (
        not is_curve and record is not None and IMAGES in record.files and (store.folder(entry.key) / IMAGES).is_file()
    )


def _figure(board: Board, strips: list[Strip]) -> Plot:
    lines = [(wanted, picture) for wanted, pictures in strips for picture in pictures]
    unknown = any(picture.predictions is None for _, picture in lines)
    return board.plot(
        "images",
        f"Grid of {len(lines)} test images under attack for {len(strips)} models; the table has the predictions.",
        f"Clean, perturbation times {GAIN} around mid-gray, adversarial. For each model the strongest attack with "
        "stored images; first the images that it fooled, in the order of the test set. Below an image: the class that "
        "the deployed model predicts and its confidence, the softmax probability of that class (for a stochastic model "
        "the mean over draws)."
        + (" A dash: the weights are not on this machine, or cannot be used." if unknown else "")
        + f" {measured_on([wanted.entry for wanted, _ in strips])}",
        ["defense", "attack", "test image", "true class", "clean: predicted", "confidence",
         "adversarial: predicted", "confidence ", "fooled"],
        [
            [
                wanted.name, wanted.entry.attack_label, p.index, p.label, *p.prediction(0), *p.prediction(1),
                "yes" if p.fooled else "no",
            ]
            for wanted, p in lines
        ],
        _drawing(strips),
        [{0: [wanted.entry.key]} for wanted, _ in lines],
    )  # fmt: skip


def _drawing(strips: list[Strip]) -> Figure:
    """A line for each model: its name, then clean, perturbation and adversarial image of each picture."""
    side, gap, text, left, top = 0.72, 0.05, 0.2, 2.1, 0.2
    width = left + PER_MODEL * (3 * (side + gap) + 0.15)
    height = top + len(strips) * (side + text)
    with page_style():
        figure = Figure(figsize=(width, height))
    for line, (wanted, pictures) in enumerate(strips):
        y = height - top - line * (side + text) - side
        label = f"{short(wanted.name, 34)}\n{short(wanted.entry.attack_label, 34)}"
        figure.text(0.0, (y + side / 2) / height, label, fontsize=7.5, va="center", color=INK)
        for column, picture in enumerate(pictures):
            change = np.clip(0.5 + GAIN * (picture.attacked - picture.clean), 0, 1)
            before, after = ("{} ({})".format(*picture.prediction(which)) for which in (0, 1))
            shown = ("clean", picture.clean, before), (f"x{GAIN}", change, ""), ("adversarial", picture.attacked, after)
            for k, (title, image, prediction) in enumerate(shown):
                x = left + column * (3 * (side + gap) + 0.15) + k * (side + gap)
                axes = figure.add_axes((x / width, y / height, side / width, side / height))
                axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="none")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(visible=True, color=GRID, linewidth=0.4)
                axes.set_xlabel(short(prediction, 16), fontsize=6.5, labelpad=1.5, color=INK)
                if line == 0:
                    axes.set_title(title, fontsize=6.5, pad=2, color=INK)
    return figure
