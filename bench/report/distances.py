"""The share of images that a minimal-norm attack leaves robust, against the size of the perturbation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.core.stats import wilson
from bench.records.store import Store
from bench.report.canvas import MAX_LINES, Entry, Plot, curve, line_style, single, slug
from bench.report.captions import by_setting, mark_of, measured_on, model_label, short
from bench.results.evaluations import EvaluationResult
from bench.tables.text import percent

STEPS = 60  # of a curve
UNITS = {"distance": "distance in {norm}", "pixels": "changed pixels"}
QUARTERS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Distances:
    """One model: the size of what was found for each image of all seeds, sorted; 0 where the clean image is wrong, inf
    where nothing was found. `n`: images of a seed."""

    name: str
    entries: list[EvaluationResult]
    sizes: np.ndarray[Any, Any]
    n: int

    def robust(self, at: float) -> float:
        """The share of images, in [0,1], that need more than `at`."""
        return float((self.sizes > at).mean())

    @property
    def quarters(self) -> list[float]:
        """The sizes at which a quarter, a half and three quarters of the images are broken or wrong when clean."""
        return [float(self.sizes[math.ceil(q * len(self.sizes)) - 1]) for q in QUARTERS]


def distance_curves(store: Store, evaluations: Iterable[EvaluationResult]) -> list[Plot]:
    """One figure for each data set, budget and minimal-norm attack that is done, on test images; for one that counts
    pixels another."""
    known = [entry for entry in evaluations if not math.isnan(entry.median_distance)]
    found = []
    for attack in sorted({entry.attack for entry in known}):
        for place, models in by_setting(known, attack):
            for column in UNITS:
                read = [each for entries in models if (each := _read(store, entries, column)) is not None]
                if read:
                    found.append(_figure(place, column, sorted(read, key=lambda m: (-m.quarters[1], m.name))))
    return found


def _read(store: Store, entries: list[EvaluationResult], column: str) -> Distances | None:
    """None where the attack has no such column."""
    held = [store.samples(entry.key) for entry in entries]
    if any(column not in samples for samples in held):
        return None
    sizes = [np.where(samples["clean"].astype(bool), samples[column], 0.0) for samples in held]
    return Distances(model_label(entries[0]), entries, np.sort(np.concatenate(sizes)), min(map(len, sizes)))


def _figure(place: tuple[str, str, str], column: str, models: list[Distances]) -> Plot:
    dataset, threat, setting = place
    entries = [entry for model in models for entry in model.entries]
    unit = UNITS[column].format(norm=entries[0].norm)
    found = np.concatenate([model.sizes[np.isfinite(model.sizes)] for model in models])
    axis = np.linspace(0.0, float(found.max(initial=0.0)), STEPS + 1)
    figure, axes = single()
    shown = models[:MAX_LINES]
    for k, model in enumerate(shown):
        shares = [(at, model.robust(at)) for at in map(float, axis)]
        points = [(at, *(100 * v for v in (share, *wilson(round(share * model.n), model.n)))) for at, share in shares]
        curve(axes, points, mark_of(model.entries[0]), **line_style(k) | {"marker": None})
    if column == "distance":
        axes.axvline(entries[0].eps_value, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel=unit, ylabel="Robust images (%)", ylim=(0, 100))
    axes.set_xlim(left=0)
    few = f" Shown: {len(shown)} of {len(models)} models, those with the largest median." * (len(models) > len(shown))
    line = " The dotted line is eps." * (column == "distance")
    return Plot(
        slug("distances", dataset, threat, setting, "" if column == "distance" else column),
        f"{dataset}, {setting}{'' if column == 'distance' else ', by pixels'}",
        f"Line chart of the share of robust images against {unit} for {len(shown)} models; the table has quartiles.",
        f"Share of images, over all seeds, that are right when clean and for which the attack found nothing as small."
        f"{line} An upper bound of robust accuracy at each distance: another attack may find less. Bands are 95 % "
        f"Wilson intervals. Quartiles count an image that is wrong when clean as 0. {measured_on(entries)}{few}",
        ["defense", "clean", "quarter broken at", "half broken at", "three quarters broken at", "never broken"],
        [
            [model.name, percent(model.robust(0.0), 1), *(f"{size:.3g}" for size in model.quarters),
             percent(float(np.isinf(model.sizes).mean()), 1)]
            for model in models
        ],
        figure,
        dataset,
        threat,
        [{0: [entry.key for entry in model.entries]} for model in models],
        key=[
            Entry(short(model.name, 44), line_style(k), mark_of(model.entries[0])) for k, model in enumerate(shown)
        ],
        marks=[mark_of(model.entries[0]) for model in models],
    )  # fmt: skip
