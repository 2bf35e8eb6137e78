"""The same test images under attack for all models of a table: which are shown, and how.

Images need the data set, and predicted classes the weights; neither has to be on this machine. The page says what is
missing. `bench.commands.report_images` fetches them.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.records.store import IMAGES, Store
from bench.report.board import Board
from bench.report.canvas import COLORS, Plot, page_style
from bench.report.captions import best, mark_of, measured_on, row_label, short
from bench.report.svg import INK
from bench.results.evaluations import EvaluationResult
from bench.results.rows import Row
from bench.terminal import counted

MAX_MODELS, MAX_IMAGES = 8, 6
MAX_PIXELS = 300_000  # pixel values of all images of a page: some 400 kB of it
NO_FILES = (
    "No images are shown: no evaluation has its adversarial.safetensors beside its record. That file stays where the "
    "evaluation ran, as it is too large for a repository."
)


@dataclass(frozen=True)
class Wanted:
    """Images to be fetched: those of an evaluation with these indices in the test set."""

    entry: EvaluationResult
    indices: tuple[int, ...]


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

    @functools.cached_property
    def png(self) -> tuple[str, str]:
        """Both images as addresses that hold them."""
        return _png(self.clean), _png(self.attacked)


@dataclass(frozen=True)
class Fetched:
    """The pictures found, by key of the evaluation, and sentences about what is missing."""

    strips: dict[str, list[Picture]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Fetch = Callable[[list[Wanted]], Fetched]
Attempt = tuple[EvaluationResult, Picture]


@dataclass(frozen=True)
class Strip:
    """One model, as tables name and mark it: for each image its attacks, the strongest over all images first."""

    name: str
    mark: str
    images: list[tuple[Attempt, ...]]

    @property
    def shown(self) -> list[Attempt]:
        """For each image the strongest attack that fools the model, or else the strongest one."""
        return [next((a for a in attempts if a[1].fooled), attempts[0]) for attempts in self.images]


def no_images(wanted: list[Wanted]) -> Fetched:
    """For a page that shows no images."""
    return Fetched(notes=["Images were not requested."] if wanted else [])


def image_grids(store: Store, boards: list[Board], fetch: Fetch) -> tuple[list[Plot], str]:
    """A figure for each table whose images lie here, and sentences about the others."""
    wanted = [(board, _wanted(store, board)) for board in boards]
    asked = [one for _, models in wanted for _, found in models for one in found]
    fetched = fetch(asked) if asked else Fetched(notes=[NO_FILES])
    plots, notes, left = [], list(fetched.notes), MAX_PIXELS
    for board, models in wanted:
        strips = [strip for row, ones in models if (strip := _strip(row, ones, fetched)).images]
        # each attack on an image, and the one that is shown at first
        size = sum(p.attacked.size for strip in strips for _, p in [*strip.images[0], strip.images[0][0]])
        count = min([left // max(size, 1), *(len(strip.images) for strip in strips)])
        if strips and not count:
            notes.append("Some images are left out, to keep the page small.")
        elif strips:
            left -= count * size
            plots.append(_figure(board, [replace(strip, images=strip.images[:count]) for strip in strips]))
    return plots, " ".join(dict.fromkeys(notes))


def _strip(row: Row, wanted: list[Wanted], fetched: Fetched) -> Strip:
    by_attack = [[(one.entry, p) for p in fetched.strips.get(one.entry.key, [])] for one in wanted]
    return Strip(row_label(row), mark_of(row), list(zip(*filter(None, by_attack), strict=True)))


def _wanted(store: Store, board: Board) -> list[tuple[Row, list[Wanted]]]:
    """For the best models of a table (and `standard`) every attack that stored its images, the strongest first.

    The images are those that every model gets right without an attack, if there are any, evenly from those on which
    most models are fooled to those on which fewest are.
    """
    stored = {id(row): found for row in board.rows if row.verdict != "INVALID" and (found := _stored(store, row))}
    rows = best([row for row in board.rows if id(row) in stored], MAX_MODELS)
    right: list[dict[int, bool]] = []  # by index, for each model
    clean: list[set[int]] = []
    for row in rows:
        outcomes = [store.samples(entry.key, ("index", "correct", "clean")) for entry in stored[id(row)]]
        by_attack = [dict(zip(s["index"].tolist(), s["correct"].astype(bool), strict=True)) for s in outcomes]
        shared = set.intersection(*(set(found) for found in by_attack))
        right.append({index: all(found[index] for found in by_attack) for index in shared})
        known = [set(s["index"][s["clean"].astype(bool)].tolist()) for s in outcomes if "clean" in s]
        clean.append(set.intersection(*known) if known else shared)
    shared = set.intersection(*map(set, right)) if right else set()
    order = sorted(set.intersection(shared, *clean) or shared, key=lambda k: (sum(found[k] for found in right), k))
    count = min(MAX_IMAGES, len(order))
    chosen = tuple(order[round(k * (len(order) - 1) / max(count - 1, 1))] for k in range(count))
    return [(row, [Wanted(entry, chosen) for entry in stored[id(row)]]) for row in rows] if chosen else []


def _stored(store: Store, row: Row) -> list[EvaluationResult]:
    """The evaluations of one seed that stored images within the budget of the row, the strongest first: those of a
    minimal-norm attack may lie outside, and those of a curve are of its largest budget."""
    found: dict[int, list[EvaluationResult]] = {}
    for entry in row.evaluations:
        record = store.record(entry.key) if entry.norm and entry.state == "done" else None
        if record is None or not math.isnan(entry.median_distance) or IMAGES not in record.files:
            continue
        is_curve = store.evaluation(entry.key).attack.settings.get("budgets")
        if not is_curve and (store.folder(entry.key) / IMAGES).is_file():
            found.setdefault(entry.seed, []).append(entry)
    chosen = max(found.values(), key=len, default=[])
    return sorted(chosen, key=lambda entry: (entry.accuracy, entry.attack_label))


def _figure(board: Board, strips: list[Strip]) -> Plot:
    lines = [(strip, *attempt) for strip in strips for image in strip.images for attempt in image]
    unknown = any(picture.predictions is None for *_, picture in lines)
    return board.plot(
        "images",
        f"{counted(len(strips[0].images), 'test image')} under attack for {counted(len(strips), 'model')}; the "
        "table has the predictions.",
        "The same test images for all models, each as the strongest attack left it that fools the model, or else as "
        "the strongest of all did. A solid frame: right under every attack with stored images; a dashed frame: fooled. "
        "A click on an image shows all attacks on it, each beside its difference from the clean image, times 10. Class "
        "and confidence are those of the deployed model, the softmax probability of that class (for a stochastic model "
        "the mean over draws)."
        + (" A dash: the weights are not on this machine, or cannot be used." if unknown else "")
        + f" {measured_on([entry for _, entry, _ in lines])}",
        ["defense", "attack", "test image", "true class", "clean: predicted", "confidence",
         "adversarial: predicted", "confidence ", "fooled"],
        [
            [strip.name, e.attack_label, p.index, p.label, *p.prediction(0), *p.prediction(1),
             "yes" if p.fooled else "no"]
            for strip, e, p in lines
        ],
        _drawing(strips),
        [{0: [entry.key]} for _, entry, _ in lines],
        marks=[strip.mark for strip, *_ in lines],
        strips=strips,
    )  # fmt: skip


def _drawing(strips: list[Strip]) -> Figure:
    """A line for each model: its name, then the images in frames."""
    count = len(strips[0].images)
    with page_style():
        figure = Figure(figsize=(2.4 + 0.9 * count, 1.1 * len(strips)), layout="constrained")
        grid = figure.subplots(len(strips), count + 1, squeeze=False, width_ratios=[2.4] + [0.9] * count)
    for (label, *row), strip in zip(grid, strips, strict=True):
        label.set_axis_off()
        label.text(0, 0.5, short(strip.name, 34), fontsize=7.5, va="center", color=INK)
        for axes, (entry, picture) in zip(row, strip.shown, strict=True):
            axes.imshow(picture.attacked, cmap="gray", vmin=0, vmax=1, interpolation="none")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=COLORS[picture.fooled], linewidth=2)
            axes.set_xlabel(short(f"{entry.attack_label}: {picture.prediction(1)[0]}", 24), fontsize=6, color=INK)
    return figure


def _png(image: np.ndarray[Any, Any]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((255 * image).round().astype(np.uint8)).save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
