"""All figures of the page, in its order."""

from __future__ import annotations

from dataclasses import dataclass

from bench.records.store import Store
from bench.report.board import Board
from bench.report.canvas import Plot, unique
from bench.report.classes import class_maps
from bench.report.heatmap import heat_maps
from bench.report.images import Fetch, image_grids
from bench.report.lines import certified_curves, eps_curves, security_curves
from bench.report.scatter import clean_against_robust, cost_against_robust
from bench.report.surface import surfaces
from bench.report.training import training_curves
from bench.report.weights import flatness_curves
from bench.results.evaluations import Evaluation
from bench.results.rows import Row


@dataclass(frozen=True)
class Shown:
    """A plot and its SVG."""

    plot: Plot
    svg: str


@dataclass(frozen=True)
class Group:
    """One section of the page."""

    id: str
    title: str
    lead: str
    plots: list[Plot]

    @property
    def figures(self) -> list[Shown]:
        """Drawn anew each time they are asked for, to keep one in memory at a time."""
        return [Shown(plot, plot.svg()) for plot in self.plots]


def groups(
    store: Store, found: list[Board], rows: list[Row], evaluations: list[Evaluation], fetch: Fetch
) -> list[Group]:
    """Sections with at least one figure, or with a sentence that says why there is none."""
    grids, note = image_grids(store, found, fetch)
    made = [
        Group("heat", "Defense by attack", "", heat_maps(found)),
        Group("eps", "Robust accuracy against eps", "", eps_curves(rows)),
        Group("curve", "Security curves", "", security_curves(rows)),
        Group("trade", "Clean accuracy against robust accuracy", "", clean_against_robust(found)),
        Group("cost", "Training cost against robust accuracy", "", cost_against_robust(found)),
        Group("training", "Training curves", "", training_curves(store, rows)),
        Group("flatness", "Loss around the weights", "", flatness_curves(store, evaluations)),
        Group("surface", "Loss surface around the images", "", surfaces(store, evaluations)),
        Group("certified", "Certified accuracy against radius", "", certified_curves(store, rows)),
        Group("classes", "Robust accuracy by class", "", class_maps(store, found)),
        Group("images", "Adversarial images", note, grids),
    ]
    return [Group(g.id, g.title, g.lead, unique(g.plots)) for g in made if g.plots or g.lead]
