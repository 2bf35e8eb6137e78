"""Adversarial images beside the clean ones: which are shown, and how. `bench.commands.pictures` fetches them.

A page is text and figures of the records alone; images need the data set, and labels and confidences the weights, none
of which need lie here. What is missing is told in a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.records.store import IMAGES, Store
from bench.report.board import Board
from bench.report.canvas import GRID, STYLE, Plot, slug
from bench.report.captions import best, called
from bench.report.svg import INK
from bench.report.text import joined, short
from bench.results.evaluations import Evaluation

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

MOST_MODELS, EACH, GAIN = 6, 3, 10
ROOM = 200_000  # pixel values of all images of a page: some 400 kB of it
KINDS = ("clean", f"perturbation x{GAIN}", "adversarial")
NO_FILES = (
    "No images are shown: none of these evaluations has its adversarial.safetensors beside its record here. It lies "
    "where the evaluation ran, and is too large for a repository."
)


@dataclass(frozen=True)
class Wanted:
    """One strip to be fetched: an evaluation whose images lie in the results folder."""

    key: str
    name: str
    attack: str
    entry: Evaluation


@dataclass(frozen=True)
class Picture:
    """One test image (h w, or h w c, in [0,1]) clean and attacked, its class, and what the deployed model says of both:
    class and confidence, None where its weights do not lie here. `fooled`: by the record."""

    index: int
    label: str
    clean: np.ndarray[Any, Any]
    attacked: np.ndarray[Any, Any]
    fooled: bool
    says: tuple[tuple[str, float], tuple[str, float]] | None


@dataclass(frozen=True)
class Fetched:
    """What was found of the strips wanted, by key, and sentences about what was not."""

    strips: dict[str, list[Picture]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


Fetch = Callable[[list[Wanted]], Fetched]


def nothing(wanted: list[Wanted]) -> Fetched:
    """For a page that was asked to show no images."""
    return Fetched(notes=["No images were asked for."] if wanted else [])


def image_grids(store: Store, found: list[Board], fetch: Fetch) -> tuple[list[Plot], str]:
    """A figure for each table whose images lie here, and what there is to say of the others."""
    wanted = [(board, _wanted(store, board)) for board in found]
    asked = [strip for _, strips in wanted for strip in strips]
    fetched = fetch(asked) if asked else Fetched(notes=[NO_FILES])
    plots, notes, left = [], list(fetched.notes), ROOM
    for board, strips in wanted:
        there = []
        for strip in strips:
            pictures = fetched.strips.get(strip.key, [])
            left -= (size := sum(3 * picture.clean.size for picture in pictures))
            if left < 0:
                left += size
                notes.append("Some models are left out, to keep the page small.")
            elif pictures:
                there.append((strip, pictures))
        if there:
            plots.append(_figure(board, there))
    return plots, " ".join(dict.fromkeys(notes))


def _wanted(store: Store, board: Board) -> list[Wanted]:
    """Of the best models of a table (and `standard`) the attack that leaves fewest images right and kept its images."""
    strongest: dict[int, tuple[float, str, Evaluation]] = {}
    for row in board.rows:
        kept = [
            (entry.accuracy, name, entry)
            for name, by in row.entries.items()
            for entry in by.values()
            if row.verdict != "INVALID" and _shown(store, entry)
        ]
        strongest |= {id(row): min(kept, key=lambda t: t[:2])} if kept else {}
    shown = best([row for row in board.rows if id(row) in strongest], MOST_MODELS)
    found = [(row, *strongest[id(row)]) for row in shown]
    return [Wanted(entry.key, called(row), name, entry) for row, _, name, entry in found]


def _shown(store: Store, entry: Evaluation) -> bool:
    """Images within the budget of the row: a minimal-norm attack leaves it, a curve has those of its largest one."""
    if not entry.norm or entry.state != "done" or not math.isnan(entry.median_distance):
        return False
    record = store.record(entry.key) or {"files": {}}
    walks = store.evaluation(entry.key).attack.settings.get("budgets")
    return not walks and IMAGES in record["files"] and (store.folder(entry.key) / IMAGES).is_file()


def _figure(board: Board, strips: list[tuple[Wanted, list[Picture]]]) -> Plot:
    entries = [wanted.entry for wanted, _ in strips]
    unsure = any(picture.says is None for _, pictures in strips for picture in pictures)
    lines = [(wanted, picture) for wanted, pictures in strips for picture in pictures]
    return Plot(
        slug("images", board.dataset, board.threat, board.kind),
        f"{board.dataset}, {board.threat}, {board.kind.lower()}",
        f"Grid of {len(lines)} test images under attack for {len(strips)} models; the table says what each is seen as.",
        f"Clean, perturbation times {GAIN} around mid-gray, adversarial. Of each model the attack that leaves fewest "
        "images right among those that kept their images; in the order of the test set, images that it fooled first. "
        "Below an image: what the deployed model takes it for and its confidence, the softmax probability of that "
        "class (mean of draws where the model draws)."
        + (" A dash: the weights do not lie here, or say nothing." if unsure else "")
        + f" n {joined(entry.n for entry in entries)}; eps {joined(_eps(entry) for entry in entries)}; "
        f"seeds {joined(entry.seed for entry in entries)}; device {joined(entry.device for entry in entries)}.",
        ["defense", "attack", "test image", "true class", "clean: taken for", "confidence",
         "adversarial: taken for", "confidence ", "fooled"],
        [
            [wanted.name, wanted.attack, p.index, p.label, *_seen(p, 0), *_seen(p, 1), "yes" if p.fooled else "no"]
            for wanted, p in lines
        ],
        _drawing(strips),
        board.dataset,
        board.threat,
        [{0: [wanted.key]} for wanted, _ in lines],
    )  # fmt: skip


def _drawing(strips: list[tuple[Wanted, list[Picture]]]) -> Figure:
    """A line for each model: its name, then clean, perturbation and adversarial image of each picture."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    side, gap, text, left, top = 0.72, 0.05, 0.2, 2.1, 0.2
    width = left + EACH * (3 * (side + gap) + 0.15)
    height = top + len(strips) * (side + text)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
    for line, (wanted, pictures) in enumerate(strips):
        y = height - top - line * (side + text) - side
        told = f"{short(wanted.name, 34)}\n{short(wanted.attack, 34)}"
        figure.text(0.0, (y + side / 2) / height, told, fontsize=7.5, va="center", color=INK)
        for place, picture in enumerate(pictures):
            change = np.clip(0.5 + GAIN * (picture.attacked - picture.clean), 0, 1)
            images = (picture.clean, change, picture.attacked)
            says = (
                "{} ({})".format(*_seen(picture, 0)),
                "",
                "{} ({})".format(*_seen(picture, 1)),
            )
            for k, (image, under) in enumerate(zip(images, says, strict=True)):
                x = left + place * (3 * (side + gap) + 0.15) + k * (side + gap)
                axes = figure.add_axes((x / width, y / height, side / width, side / height))
                axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="none")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set(visible=True, color=GRID, linewidth=0.4)
                axes.set_xlabel(short(under, 16), fontsize=6.5, labelpad=1.5, color=INK)
                if line == 0:
                    axes.set_title(("clean", f"x{GAIN}", "adversarial")[k], fontsize=6.5, pad=2, color=INK)
    return figure


def _seen(picture: Picture, which: int) -> tuple[str, str]:
    if picture.says is None:
        return "–", "–"
    name, confidence = picture.says[which]
    return name, f"{confidence:.2f}" if math.isfinite(confidence) else "–"


def _eps(entry: Evaluation) -> str:
    return f"{entry.norm} {entry.eps}"
