"""Training curves: loss by epoch, a panel for each configuration, each seed a line; validation accuracy where taken."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bench.planning.job import TrainJob
from bench.records import training_log as curves
from bench.records.store import Store
from bench.report.canvas import COLORS, DASHES, Plot, panels, slug
from bench.report.svg import INK
from bench.report.text import joined, short
from bench.results.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PANELS, ACROSS = 20, 4
MOST_POINTS, MARKED = 60, 12  # points of a line (its CSV has all); so few are marked one by one


@dataclass(frozen=True)
class Course:
    """One training: its job, state, device and the numbers of each epoch. `terms`: what its loss is the sum of."""

    job: TrainJob
    state: str
    device: str
    log: list[curves.Line]
    terms: tuple[str, ...]

    @cached_property
    def loss(self) -> list[float]:
        """By epoch."""
        return [curves.total(line, self.terms) for line in self.log]

    @cached_property
    def validation(self) -> list[float]:
        """Validation accuracy in percent by epoch; NaN where it was not taken."""
        return [100 * line.get(curves.VALIDATION, math.nan) for line in self.log]


def training_curves(store: Store, rows: list[Row]) -> list[Plot]:
    """One figure for each data set with a training whose log lies in the results folder."""
    groups: dict[str, dict[str, list[Course]]] = {}
    for course in _courses(store):
        config = json.dumps(course.job.without_seed(), sort_keys=True)
        groups.setdefault(course.job.data.name, {}).setdefault(config, []).append(course)
    place = {row.train_key: at for at, row in reversed(list(enumerate(sorted(rows, key=_best_first))))}
    found = []
    for dataset, by_config in sorted(groups.items()):
        order = sorted(by_config.values(), key=lambda by: min(place.get(c.job.key, len(place)) for c in by))
        found.append(_figure(dataset, order))
    return found


def _best_first(row: Row) -> tuple[bool, float]:
    return row.defense != "standard", -row.worst.mean if row.worst.values else 1.0


def _courses(store: Store) -> list[Course]:
    found: list[tuple[TrainJob, dict[str, Any], list[curves.Line]]] = []
    for key, job in store.jobs().items():
        if isinstance(job, TrainJob) and (log := curves.read(store, key)):
            found.append((job, store.record(key) or {}, log))
    terms: dict[str, tuple[str, ...]] = {}  # of a defense, for a training that ended before it could tell them
    for job, record, _ in found:
        own = (record.get("metrics") or {}).get("final_terms")
        terms |= {job.defense.name: tuple(own)} if own else {}
    return [
        Course(
            job,
            record.get("state", "running or killed"),
            (record.get("provenance") or {}).get("device") or "unknown",
            log,
            tuple((record.get("metrics") or {}).get("final_terms") or terms.get(job.defense.name, ())),
        )
        for job, record, log in found
    ]


def _figure(dataset: str, order: list[list[Course]]) -> Plot:
    shown = order[:MOST_PANELS]
    figure, places = panels(len(shown), ACROSS, 2.3, 1.65)
    for axes, by_seed in zip(places, shown, strict=True):
        _panel(axes, by_seed)
    courses = [course for by_seed in order for course in sorted(by_seed, key=lambda c: c.job.seed)]
    few = (
        f" Drawn are {len(shown)} of {len(order)} configurations, the best; the table has all."
        if order[MOST_PANELS:]
        else ""
    )
    judged = any(math.isfinite(v) for c in courses for v in c.validation)
    sizes = joined(c.job.data.train for c in courses)
    return Plot(
        slug("training", dataset),
        dataset,
        f"Training loss by epoch of {len(shown)} configurations, a panel each; the table has first and last values.",
        "Loss (mean over the steps of an epoch, the sum of a method's terms) by epoch, on a scale of its own in each "
        "panel, as methods minimize different sums: compare shapes, not heights. Each line is a seed. "
        + ("Dashed: validation accuracy in percent, axis on the right. " if judged else "")
        + f"n {sizes} training images; eps {joined(_eps(c) for c in courses)}; "
        f"seeds {joined(c.job.seed for c in courses)}; device {joined(c.device for c in courses)}.{few}",
        ["defense", "seed", "state", "epochs", "loss, first", "loss, last", "its terms, last", "validation (%), last"],
        [_line(course) for course in courses],
        figure,
        dataset,
        behind=[{0: [course.job.key]} for course in courses],
        data=[_point(course, k) for course in courses for k in range(len(course.log))],
    )


def _panel(axes: Axes, by_seed: list[Course]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(short(by_seed[0].job.label(), 34), fontsize=7.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelsize=7, length=2)
    right = None
    for k, course in enumerate(sorted(by_seed, key=lambda c: c.job.seed)):
        style: dict[str, Any] = {"color": COLORS[k % len(COLORS)], "linewidth": 1.2}
        style |= {"marker": "o", "markersize": 2.2} if len(course.log) <= MARKED else {}
        x = [line["epoch"] for line in course.log]
        keep = _some(list(range(len(x))))
        axes.plot([x[i] for i in keep], [course.loss[i] for i in keep], DASHES[0], **style)
        judged = _some([i for i, value in enumerate(course.validation) if math.isfinite(value)])
        if judged:
            if right is None:
                right = axes.twinx()
                right.set_ylim(0, 100)
                right.tick_params(labelsize=7, length=2)
            right.plot([x[i] for i in judged], [course.validation[i] for i in judged], DASHES[1], **style)


def _some(places: list[int]) -> list[int]:
    """Evenly chosen ones, the first and the last among them."""
    if len(places) <= MOST_POINTS:
        return places
    return [places[round(k * (len(places) - 1) / (MOST_POINTS - 1))] for k in range(MOST_POINTS)]


def _eps(course: Course) -> str:
    threat = course.job.threat
    return f"{threat.norm} {threat.eps}" if threat else "none"


def _line(course: Course) -> list[object]:
    last, loss = course.log[-1], [value for value in course.loss if math.isfinite(value)]
    terms = " + ".join(f"{name} {last[name]:.4g}" for name in course.terms if name in last)
    judged = [value for value in course.validation if math.isfinite(value)]
    return [
        course.job.label(), course.job.seed, course.state, len(course.log),
        f"{loss[0]:.4g}" if loss else "–", f"{loss[-1]:.4g}" if loss else "–", terms or "–",
        f"{judged[-1]:.2f}" if judged else "–",
    ]  # fmt: skip


def _point(course: Course, k: int) -> dict[str, object]:
    about = {"defense": course.job.label(), "seed": course.job.seed, "key": course.job.key}
    return {**about, "epoch": int(course.log[k]["epoch"]), "loss": course.loss[k], **_own(course.log[k])}


def _own(line: curves.Line) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("epoch", curves.TOTAL)}
