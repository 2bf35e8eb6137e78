"""All figures of the page, in its order."""

from __future__ import annotations

from typing import NamedTuple

from bench.records.store import Store
from bench.report.board import Board
from bench.report.canvas import Plot, distinct, slug, unique
from bench.report.corruption import corruption_maps
from bench.report.distances import distance_curves
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
    """Figures of one kind; `lead`: a sentence above them."""

    id: str
    title: str
    plots: list[Plot]
    lead: str = ""


class Tab(NamedTuple):
    """What the page shows at once: the tables and figures of a data set under one threat."""

    id: str
    title: str
    boards: list[Board]
    groups: list[Group]


class DatasetTabs(NamedTuple):
    """The tabs of a data set, and the figures that are not of one threat."""

    id: str
    title: str
    tabs: list[Tab]
    groups: list[Group]


def tabs_of(boards: list[Board], found: list[Group]) -> list[DatasetTabs]:
    """Tables and figures by data set and threat; ids are distinct and made of what they name."""

    def within(*place: str) -> list[Group]:
        chosen = [group._replace(plots=[p for p in group.plots if (p.dataset, p.threat) == place]) for group in found]
        return [group for group in chosen if group.plots]

    places: dict[str, dict[str, list[Board]]] = {}
    for board in boards:
        places.setdefault(board.dataset, {}).setdefault(board.threat, []).append(board)
    for plot in (plot for group in found for plot in group.plots):  # what was measured but is in no table
        places.setdefault(plot.dataset, {}).setdefault(plot.threat or next(iter(places[plot.dataset]), "all eps"), [])
    ids = iter(distinct([slug(*place) for d, by in places.items() for place in ((d, "data"), *((d, t) for t in by))]))
    return [
        DatasetTabs(
            next(ids), d, [Tab(next(ids), t, each, within(d, t)) for t, each in by.items()], within(d, "")
        )
        for d, by in places.items()
    ]  # fmt: skip


def groups(
    store: Store, boards: list[Board], rows: list[Row], evaluations: list[EvaluationResult], fetch: Fetch
) -> list[Group]:
    """Kinds with at least one figure, or with a sentence that says why there is none."""
    grids, note = image_grids(store, boards, fetch)
    made = [
        Group("heat", "Defense by attack", heat_maps(boards)),
        Group("eps", "Robust against eps", eps_curves(rows)),
        Group("curve", "Security curves", security_curves(rows)),
        Group("trade", "Clean against robust", clean_against_robust(boards)),
        Group("cost", "Cost against robust", cost_against_robust(boards)),
        Group("training", "Training", training_curves(store, rows)),
        Group("flatness", "Loss around the weights", flatness_curves(store, evaluations)),
        Group("surface", "Loss around the images", surfaces(store, evaluations)),
        Group("corruption", "Under corruption", corruption_maps(store, evaluations)),
        Group("distances", "Distance to the boundary", distance_curves(store, evaluations)),
        Group("certified", "Certified against radius", certified_curves(store, rows)),
        Group("classes", "Robust by class", class_maps(store, boards)),
        Group("images", "Adversarial images", grids, note),
    ]
    return [group._replace(plots=unique(group.plots)) for group in made if group.plots or group.lead]
