"""The loss on a plane through the images, spanned by the gradient and a random direction, measured by `surface`."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Polygon

from bench.records.store import Store
from bench.report.canvas import Plot, page_style, panels, slug
from bench.report.captions import by_setting, finite, joined, mark_of, measured_on, model_label, short
from bench.report.svg import INK
from bench.results.evaluations import EvaluationResult
from bench.terminal import counted

Array = np.ndarray[Any, Any]

MAX_MODELS = 8  # models of a figure; its table has all
MEASURES = ("clean_loss", "nonlinearity", "off_gradient")


@dataclass(frozen=True)
class Panel:
    """The loss by position on the plane; None where no image has a finite one."""

    title: str
    loss: Array | None


@dataclass(frozen=True)
class Measured:
    """One model: its evaluations by seed, the numbers of all their images, and the panels of the first seed."""

    name: str
    entries: list[EvaluationResult]
    values: dict[str, Array]
    panels: list[Panel]

    @property
    def mean_nonlinearity(self) -> float:
        """Mean nonlinearity; infinite where one is not finite."""
        found = self.values["nonlinearity"]
        return float(found.mean()) if np.isfinite(found).all() else math.inf


def surfaces(store: Store, evaluations: Iterable[EvaluationResult]) -> list[Plot]:
    """One figure for each data set, budget and setting of `surface` that is done, on test images."""
    found = []
    for place, by_config in by_setting(evaluations, "surface"):
        several = len({entries[0].model for entries in by_config}) > 1
        models = [each for entries in by_config if (each := _measured(store, entries, several)) is not None]
        if models:
            reach = store.evaluation(models[0].entries[0].key).attack.settings.get("reach", 1.0)
            found.append(_figure(place, sorted(models, key=lambda m: (m.mean_nonlinearity, m.name)), float(reach)))
    return found


def _measured(store: Store, entries: list[EvaluationResult], with_architecture: bool) -> Measured | None:
    """None where the samples hold no surface (an evaluation of that name from elsewhere)."""
    # of one seed the evaluation of most images
    longest = {entry.seed: entry for entry in sorted(entries, key=lambda entry: entry.n)}
    entries = [longest[seed] for seed in sorted(longest)]
    held: list[dict[str, Any]] = [store.samples(entry.key) for entry in entries]
    if any(not {*MEASURES, "loss"} <= samples.keys() or samples["loss"].ndim != 3 for samples in held):
        return None
    values = {column: np.concatenate([samples[column] for samples in held]) for column in MEASURES}
    return Measured(model_label(entries[0], with_architecture), entries, values, _panels(held[0]))


def _panels(samples: dict[str, Any]) -> list[Panel]:
    """The mean over images, the image of median nonlinearity (the lower one of two), and that of the largest."""
    bend, loss = samples["nonlinearity"], samples["loss"].astype(np.float64)
    whole = np.isfinite(loss).all((1, 2)) & np.isfinite(bend)
    if not whole.any():
        return [Panel(title, None) for title in ("mean", "median", "largest")]
    places = np.flatnonzero(whole)
    order = places[np.argsort(bend[places], kind="stable")]
    of = "" if whole.all() else f"{len(places)} of "
    median, last = (int(order[k]) for k in ((len(order) - 1) // 2, -1))
    return [
        Panel(f"mean of {of}{counted(len(whole), 'image')}", loss[places].mean(0)),
        Panel(f"median: image {samples['index'][median]}", loss[median]),
        Panel(f"largest: image {samples['index'][last]}", loss[last]),
    ]


def _figure(place: tuple[str, str, str], models: list[Measured], reach: float) -> Plot:
    dataset, threat, setting = place
    few = ""
    if len(models) > MAX_MODELS:
        few = f" Shown: the {MAX_MODELS} of {len(models)} models with the least nonlinearity; the table has all."
    return Plot(
        slug("surface", *place),
        f"{dataset}, {threat}, {setting}",
        f"Contour maps of the loss around test images, three for each of {min(len(models), MAX_MODELS)} models; the "
        "table has their numbers over all images.",
        "Cross-entropy of an image moved along the steepest direction of its loss (to the right) and along a random "
        "one (upwards), in units of eps and clipped to [0,1]. Dot: the image; triangle: one whole gradient step; line: "
        "edge of the ball. Each panel has its own color scale, from dark at its lowest to bright at its highest loss, "
        "given above it. Median and largest are by nonlinearity: the largest distance of the loss in the ball from its "
        "linear approximation (Qin et al. 2019 search the whole ball, so on one plane it is a lower bound). Off "
        "gradient: highest loss in the ball minus that of the whole gradient step. A smooth surface is no proof of "
        f"robustness. {measured_on([entry for model in models for entry in model.entries])} "
        f"Panels show seed {joined(model.entries[0].seed for model in models[:MAX_MODELS])}, numbers are over all "
        f"seeds.{few}",
        ["defense", "clean loss", "nonlinearity, mean", "nonlinearity, median", "nonlinearity, largest",
         "off gradient, mean", "off gradient above 0 (% of images)"],
        [[model.name, *_numbers(model.values)] for model in models],
        _drawing(models[:MAX_MODELS], reach, threat.startswith("Linf")),
        dataset,
        threat,
        [{0: [entry.key for entry in model.entries]} for model in models],
        marks=[mark_of(model.entries[0]) for model in models],
    )  # fmt: skip


def _numbers(values: dict[str, Array]) -> list[str]:
    """The cells of a model's line, over the images of all its seeds."""
    clean, bend, off = (values[name] for name in MEASURES)
    asked = ((clean, np.mean), (bend, np.mean), (bend, np.median), (bend, np.max), (off, np.mean))
    known = [finite(float(pick(of)) if np.isfinite(of).all() else math.nan) for of, pick in asked]
    return [*known, f"{100 * float((off > 0).mean()):.1f}"]


def _drawing(models: list[Measured], reach: float, linf: bool) -> Figure:
    """A panel for each model: its name and numbers above three maps."""
    figure, parts = panels([mark_of(model.entries[0]) for model in models], 2, 5.2, 2.5)
    for part, model in zip(parts, models, strict=True):
        clean, bend, _, _, off, _ = _numbers(model.values)
        means = f"mean clean loss {clean}, nonlinearity {bend}, off gradient {off}"
        part.suptitle(f"{short(model.name)}\n{means}", fontsize=8.5, color=INK, x=0.01, ha="left")
        with page_style():
            maps = part.subplots(1, len(model.panels))
        for axes, panel in zip(maps, model.panels, strict=True):
            _panel(axes, panel, reach, linf)
            axes.tick_params(bottom=False, left=False, labelleft=axes is maps[0])
            axes.set_xlabel("gradient direction (eps)", fontsize=8)
        maps[0].set_ylabel("random\ndirection (eps)", fontsize=8)
    return figure


def _panel(axes: Axes, panel: Panel, reach: float, linf: bool) -> None:
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    for of in (axes.xaxis, axes.yaxis):
        of.set_ticks([-reach, 0, reach], [f"{-reach:g}", "0", f"{reach:g}"], fontsize=7.5)
    if panel.loss is None:
        axes.set_title(f"{panel.title}\nnot finite", fontsize=7.5, color=INK)
        return
    axes.set_title(f"{panel.title}\nloss {panel.loss.min():.3g} to {panel.loss.max():.3g}", fontsize=7.5, color=INK)
    # pixels are centered on the positions, the first axis runs to the right
    half = reach / (len(panel.loss) - 1)
    box = (-reach - half, reach + half, -reach - half, reach + half)
    axes.imshow(panel.loss.T, cmap="cividis", origin="lower", extent=box, interpolation="none")
    for color, width in (("black", 2.2), ("white", 1.0)):
        edge = Polygon([(1, 0), (0, 1), (-1, 0), (0, -1)]) if linf else Circle((0, 0), 1)
        edge.set(fill=False, edgecolor=color, linewidth=width)
        axes.add_patch(edge)
    for a, mark in ((0, "o"), (1, ">")):
        if a <= reach:
            axes.plot(a, 0, mark, color="white", markeredgecolor="black", markersize=4.5, clip_on=False)
