"""The loss around the weights: along random directions, and at the worst weights, as `flatness` measured it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.core.stats import mean_std
from bench.records.store import Store
from bench.report.canvas import COLORS, DASHES, MARKERS, MOST, Plot, panels, slug
from bench.report.svg import INK
from bench.report.text import joined, short
from bench.results.evaluations import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PARTS = ("clean", "adversarial")
_AT = re.compile(r"clean_loss_(-?[\d.e+-]+)")


@dataclass(frozen=True)
class Around:
    """One model under one measurement, over its seeds: by part and distance the mean loss and its range over seeds and
    directions; by part the rise at the worst weights. NaN where a loss is not finite."""

    name: str
    entries: list[Evaluation]
    losses: dict[str, dict[float, tuple[float, float, float]]]
    rises: dict[str, float]

    def losses_at(self, distance: float) -> list[float]:
        """Mean clean and adversarial loss at a distance."""
        return [self.losses[part][distance][0] for part in PARTS]


def flatness_curves(store: Store, evaluations: Iterable[Evaluation]) -> list[Plot]:
    """One figure for each data set, budget and setting of `flatness` that is done, on test images."""
    groups: dict[tuple[str, ...], dict[str, list[Evaluation]]] = {}
    for entry in (e for e in evaluations if (e.attack, e.state, e.split) == ("flatness", "done", "test")):
        what = (entry.dataset, f"{entry.norm} eps = {entry.eps}", entry.attack_label)
        groups.setdefault(what, {}).setdefault(entry.config, []).append(entry)
    found = []
    for place, by_config in sorted(groups.items()):
        around = [a for a in (_around(store, entries) for entries in by_config.values()) if a is not None]
        if around:
            found.append(_figure(place, sorted(around, key=_flattest)))
    return found


def _around(store: Store, entries: list[Evaluation]) -> Around | None:
    """Nothing where the samples hold no distance (an evaluation of that name from elsewhere)."""
    import numpy as np

    held: list[dict[str, Any]] = [store.samples(entry.key) for entry in entries]
    steps = [{float(m[1]) for name in samples if (m := _AT.fullmatch(name))} for samples in held]
    shared = sorted(set.intersection(*steps))
    if not shared or any(f"{part}_rise" not in samples for samples in held for part in PARTS):
        return None
    losses: dict[str, dict[float, tuple[float, float, float]]] = {part: {} for part in PARTS}
    for part in PARTS:
        for at in sorted({0.0, *shared}):
            name = f"{part}_loss_{at:g}" if at else f"{part}_loss"
            means = np.concatenate([samples[name].reshape(len(samples[name]), -1).mean(0) for samples in held])
            losses[part][at] = float(means.mean()), float(means.min()), float(means.max())
    rises = {part: mean_std([float(samples[f"{part}_rise"].mean()) for samples in held])[0] for part in PARTS}
    first = entries[0]
    budget = f" trained at {first.train_eps}" if first.train_eps is not None else ""
    return Around(f"{first.defense_label}{budget}", entries, losses, rises)


def _figure(place: tuple[str, ...], models: list[Around]) -> Plot:
    dataset, threat, setting = place
    figure, (left, right) = panels(2, 2, 4.3, 3.6)
    for axes, part in ((left, "clean"), (right, "adversarial")):
        _panel(axes, part, models[:MOST])
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower left", ncols=3, frameon=False, labelcolor=INK, fontsize=8)
    entries = [entry for model in models for entry in model.entries]
    few = f" Drawn are the {MOST} flattest of {len(models)}; the table has all." if len(models) > MOST else ""
    devices = joined(entry.device for entry in entries)
    lines = [(model, at) for model in models for at in model.losses["clean"]]
    return Plot(
        slug("flatness", dataset, threat, setting),
        f"{dataset}, {threat}, {setting}",
        f"Two line charts of clean and adversarial loss against the distance from the weights, {len(models)} models.",
        "Mean cross-entropy after a step along random directions, each filter's part as long as the filter times the "
        "distance (Li et al. 2018); adversarial images are made at each point unless the setting says otherwise. "
        "Bands: lowest to highest direction and seed. Flat is no proof of robustness: masked gradients look flat. "
        f"n {joined(entry.n for entry in entries)}; eps {threat.replace('eps = ', '')}; "
        f"seeds {joined(entry.seed for entry in entries)}; device {devices}.{few}",
        ["defense", "distance", "clean loss", "adversarial loss", "clean rise at worst weights",
         "adversarial rise at worst weights"],
        [[m.name, f"{at:g}", *map(_loss, m.losses_at(at)), *map(_loss, m.rises.values())] for m, at in lines],
        figure,
        dataset,
        threat,
        [{0: [entry.key for entry in model.entries]} for model, _ in lines],
    )  # fmt: skip


def _flattest(model: Around) -> tuple[float, str]:
    rise = model.rises["adversarial"]
    return rise if math.isfinite(rise) else math.inf, model.name


def _panel(axes: Axes, part: str, models: list[Around]) -> None:
    for k, model in enumerate(models):
        points = [(at, *values) for at, values in model.losses[part].items()]
        x, y, low, high = zip(*points, strict=True)
        color, dash = COLORS[k % len(COLORS)], DASHES[k // len(COLORS) % len(DASHES)]
        axes.fill_between(x, low, high, color=color, alpha=0.09, linewidth=0)
        marker = MARKERS[k % len(MARKERS)]
        axes.plot(x, y, dash, color=color, marker=marker, markersize=3.5, label=short(model.name, 40))
    axes.set_xlabel("distance, in units of the weights", fontsize=9)
    axes.set_ylabel(f"{part.capitalize()} loss", fontsize=9)
    axes.set_ylim(bottom=0)


def _loss(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"
