"""The loss around the weights, along random directions and at the worst weights, measured by `flatness`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.core.stats import mean_std
from bench.records.store import Store
from bench.report.canvas import FEWEST, MAX_LINES, Entry, Plot, axes_of, curve, line_style, panels, slug
from bench.report.captions import by_setting, finite, mark_of, measured_on, model_label, short
from bench.results.evaluations import EvaluationResult
from bench.terminal import counted

PARTS = ("clean", "adversarial")
_AT = re.compile(r"clean_loss_(-?[\d.e+-]+)")


@dataclass(frozen=True)
class Around:
    """The loss of one model around its weights, over its seeds; NaN where a loss is not finite.

    `losses`: for clean and adversarial images, by distance, the mean, the lowest and the highest over seeds and
    directions. `rises`: the rise at the worst weights.
    """

    name: str
    entries: list[EvaluationResult]
    losses: dict[str, dict[float, tuple[float, float, float]]]
    rises: dict[str, float]


def flatness_curves(store: Store, evaluations: Iterable[EvaluationResult]) -> list[Plot]:
    """One figure for each data set, budget and setting of `flatness` that is done, on test images."""
    found = []
    for place, models in by_setting(evaluations, "flatness"):
        around = [each for entries in models if (each := _around(store, entries)) is not None]
        if around and max(len(each.losses["clean"]) for each in around) >= FEWEST:
            found.append(_figure(place, sorted(around, key=_flattest)))
    return found


def _around(store: Store, entries: list[EvaluationResult]) -> Around | None:
    """None where the samples hold no distance (an evaluation of that name from elsewhere)."""
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
    return Around(model_label(entries[0]), entries, losses, rises)


def _figure(place: tuple[str, str, str], models: list[Around]) -> Plot:
    dataset, threat, setting = place
    figure, both = panels(["", ""], 2, 4.3, 3.2)
    for part, axes in zip(PARTS, map(axes_of, both), strict=True):
        for k, model in enumerate(models[:MAX_LINES]):
            points = [(at, *values) for at, values in model.losses[part].items()]
            curve(axes, points, mark_of(model.entries[0]), **line_style(k), markersize=3.5)
        axes.set_xlabel("distance relative to the weights", fontsize=9)
        axes.set_ylabel(f"{part.capitalize()} loss", fontsize=9)
        axes.set_ylim(bottom=0)
    few = f" Shown: the {MAX_LINES} flattest of {len(models)}; the table has all." if len(models) > MAX_LINES else ""
    lines = [(model, at) for model in models for at in model.losses["clean"]]
    return Plot(
        slug("flatness", *place),
        f"{dataset}, {threat}, {setting}",
        f"Two line charts of clean and adversarial loss against the distance from the weights, "
        f"{counted(len(models), 'model')}.",
        "Mean cross-entropy after a step along random directions, normalized by filter (Li et al. 2018); adversarial "
        "images are computed at each point unless the setting says otherwise. Bands: range over directions and seeds. "
        "A flat loss is no proof of robustness: masked gradients look flat. "
        f"{measured_on([entry for model in models for entry in model.entries])}{few}",
        ["defense", "distance", "clean loss", "adversarial loss", "clean rise at worst weights",
         "adversarial rise at worst weights"],
        [
            [m.name, f"{at:g}", *(finite(m.losses[part][at][0]) for part in PARTS), *map(finite, m.rises.values())]
            for m, at in lines
        ],
        figure,
        dataset,
        threat,
        [{0: [entry.key for entry in model.entries]} for model, _ in lines],
        key=[
            Entry(short(model.name, 44), line_style(k), mark_of(model.entries[0]))
            for k, model in enumerate(models[:MAX_LINES])
        ],
        marks=[mark_of(model.entries[0]) for model, _ in lines],
    )  # fmt: skip


def _flattest(model: Around) -> tuple[float, str]:
    rise = model.rises["adversarial"]
    return rise if math.isfinite(rise) else math.inf, model.name
