"""Accuracy on corrupted images, measured by `corruption`: defense by type, and for each defense type by severity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.records.store import Store
from bench.report.canvas import Plot, axes_of, panels, single, slug
from bench.report.captions import by_setting, mark_of, measured_on, model_label, short
from bench.report.heatmap import MAX_ROWS, draw_cells
from bench.report.svg import INK
from bench.results.evaluations import EvaluationResult
from bench.tables.text import percent
from bench.terminal import counted

MAX_MODELS = 8  # with a panel; the table has all
ABOUT = "Accuracy in percent by the deployed prediction on corrupted test images, mean over seeds"
NOT_ROBUST = "It says nothing of images that an attacker chooses."


@dataclass(frozen=True)
class Corrupted:
    """One model: its evaluations, its accuracy without a corruption, and under each type (a row) and severity."""

    name: str
    entries: list[EvaluationResult]
    clean: float
    shares: np.ndarray[Any, Any]

    @property
    def mark(self) -> str:
        """That of the model."""
        return mark_of(self.entries[0])

    @property
    def keys(self) -> list[str]:
        """Of its evaluations."""
        return [entry.key for entry in self.entries]

    @property
    def by_type(self) -> list[float]:
        """Clean, mean, and the mean of each type."""
        return [self.clean, float(self.shares.mean()), *map(float, self.shares.mean(1))]


def corruption_maps(store: Store, evaluations: Iterable[EvaluationResult]) -> list[Plot]:
    """Two figures for each data set and setting of `corruption` that is done, on test images; the best model first."""
    found = []
    for (dataset, threat, setting), by_config in by_setting(evaluations, "corruption"):
        settings = store.evaluation(by_config[0][0].key).attack.settings
        types, severities = settings["types"], settings["severities"]
        several = len({entries[0].model for entries in by_config}) > 1
        read = (_corrupted(store, entries, types, len(severities), several) for entries in by_config)
        models = sorted((each for each in read if each), key=lambda model: (-model.shares.mean(), model.name))
        if models:
            place = (dataset, threat, setting)
            found += [_of_types(place, models, types), _of_severities(place, models, types, severities)]
    return found


def _corrupted(
    store: Store, entries: list[EvaluationResult], types: Sequence[str], severities: int, with_architecture: bool
) -> Corrupted | None:
    """None where the samples hold something else (an evaluation of that name from elsewhere)."""
    held = [store.samples(entry.key) for entry in entries]
    names = [f"correct_{name}" for name in types]
    if any(samples.get(name, np.empty(0)).shape[1:] != (severities,) for samples in held for name in names):
        return None
    shares = np.mean([[samples[name].mean(0) for name in names] for samples in held], 0)
    clean = float(np.mean([samples["clean"].mean() for samples in held]))
    return Corrupted(model_label(entries[0], with_architecture), entries, clean, shares)


def _of_types(place: tuple[str, str, str], models: list[Corrupted], types: Sequence[str]) -> Plot:
    """Defense by type."""
    dataset, threat, setting = place
    shown = models[:MAX_ROWS]
    columns = ["clean", "mean", *(name.replace("_", " ") for name in types)]
    shares = [model.by_type for model in shown]
    texts = [[percent(share, 1) for share in line] for line in shares]
    figure, axes = single(2.6 + 0.5 * len(columns), 1.9 + 0.27 * len(shown))
    draw_cells(axes, shares, texts)
    axes.set_yticks(range(len(shown)), [short(model.name, 46) for model in shown], fontsize=8)
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    few = f" Shown: the {MAX_ROWS} best of {len(models)} models." if len(models) > MAX_ROWS else ""
    return Plot(
        slug("corruption", *place),
        f"{dataset}, {setting}, by type",
        f"Heat map of accuracy in percent: {counted(len(shown), 'model')} by {counted(len(types), 'type')} of "
        "corruption; the table has its numbers.",
        f"{ABOUT} and severities (Hendrycks and Dietterich 2019). {NOT_ROBUST} {_conditions(models)}{few}",
        ["defense", *columns],
        [[model.name, *line] for model, line in zip(shown, texts, strict=True)],
        figure,
        dataset,
        threat,
        [{0: model.keys} for model in shown],
        shades=shares,
        marks=[model.mark for model in shown],
    )


def _of_severities(
    place: tuple[str, str, str], models: list[Corrupted], types: Sequence[str], severities: Sequence[int]
) -> Plot:
    """For each defense a map of type by severity."""
    dataset, threat, setting = place
    few = f" Shown: the {MAX_MODELS} best of {len(models)} models; the table has all." * (len(models) > MAX_MODELS)
    lines = [
        (model, [model.name, name, *(percent(share, 1) for share in (*shares, shares.mean()))])
        for model in models
        for name, shares in zip(types, model.shares, strict=True)
    ]
    return Plot(
        slug("corruption", *place, "severity"),
        f"{dataset}, {setting}, by severity",
        f"Heat maps of accuracy in percent by type of corruption and severity, one for each of "
        f"{counted(min(len(models), MAX_MODELS), 'model')}; the table has their numbers.",
        f"{ABOUT}. {NOT_ROBUST} {_conditions(models)}{few}",
        ["defense", "type", *(f"severity {severity}" for severity in severities), "mean"],
        [line for _, line in lines],
        _drawing(models[:MAX_MODELS], types, severities),
        dataset,
        threat,
        [{0: model.keys} for model, _ in lines],
        marks=[model.mark for model, _ in lines],
    )


def _drawing(models: list[Corrupted], types: Sequence[str], severities: Sequence[int]) -> Figure:
    """A panel for each model."""
    size = 2.0 + 0.36 * len(severities), 1.0 + 0.22 * len(types)
    figure, parts = panels([model.mark for model in models], 3, *size)
    for part, model in zip(parts, models, strict=True):
        of_clean, mean = (percent(share, 1) for share in model.by_type[:2])
        part.suptitle(
            f"{short(model.name, 38)}\nclean {of_clean}, mean {mean}", fontsize=8.5, color=INK, x=0.01, ha="left"
        )
        axes = axes_of(part)
        draw_cells(axes, model.shares.tolist(), [[percent(share, 0) for share in line] for line in model.shares])
        axes.set_yticks(range(len(types)), [name.replace("_", " ") for name in types], fontsize=8)
        axes.set_xticks(range(len(severities)), list(map(str, severities)), fontsize=8)
        axes.set_xlabel("severity", fontsize=8)
    return figure


def _conditions(models: list[Corrupted]) -> str:
    return measured_on([entry for model in models for entry in model.entries])
