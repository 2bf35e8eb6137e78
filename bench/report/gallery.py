"""All figures of the page, in its order."""

from __future__ import annotations

from typing import NamedTuple

from bench.records.store import Store
from bench.report.board import Board
from bench.report.canvas import Plot, unique
from bench.report.heatmap import class_maps, heat_maps
from bench.report.images import Fetch, image_grids
from bench.report.lines import certified_curves, eps_curves, security_curves
from bench.report.scatter import clean_against_robust, cost_against_robust
from bench.report.surface import surfaces
from bench.report.training import training_curves
from bench.report.weights import flatness_curves
from bench.results.evaluations import EvaluationResult
from bench.results.rows import Row


class Group(NamedTuple):
    """One section of the page; `lead`: a sentence above its figures."""

    id: str
    title: str
    plots: list[Plot]
    lead: str = ""


def groups(
    store: Store, boards: list[Board], rows: list[Row], evaluations: list[EvaluationResult], fetch: Fetch
) -> list[Group]:
    """Sections with at least one figure, or with a sentence that says why there is none."""
    grids, note = image_grids(store, boards, fetch)
    made = [
        Group("heat", "Defense by attack", heat_maps(boards)),
        Group("eps", "Robust accuracy against eps", eps_curves(rows)),
        Group("curve", "Security curves", security_curves(rows)),
        Group("trade", "Clean accuracy against robust accuracy", clean_against_robust(boards)),
        Group("cost", "Training cost against robust accuracy", cost_against_robust(boards)),
        Group("training", "Training curves", training_curves(store, rows)),
        Group("flatness", "Loss around the weights", flatness_curves(store, evaluations)),
        Group("surface", "Loss surface around the images", surfaces(store, evaluations)),
        Group("certified", "Certified accuracy against radius", certified_curves(store, rows)),
        Group("classes", "Robust accuracy by class", class_maps(store, boards)),
        Group("images", "Adversarial images", grids, note),
    ]
    return [group._replace(plots=unique(group.plots)) for group in made if group.plots or group.lead]
