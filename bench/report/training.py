"""Training curves: loss by epoch, a panel for each configuration and a line for each seed; validation accuracy too."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench.planning.job import TrainJob
from bench.records import training_log
from bench.records.record import Record, train_metrics
from bench.records.store import Store
from bench.report.canvas import COLORS, DASHES, FEWEST, Plot, axes_of, panels, slug
from bench.report.captions import joined, mark_of, setup, short
from bench.report.svg import INK
from bench.results.facts import DatasetNames
from bench.results.rows import Row

MAX_PANELS, ACROSS = 20, 4
MAX_POINTS, MAX_MARKED = 60, 12  # points of a line (its CSV has all); of so few, each is marked


@dataclass(frozen=True)
class LoggedTraining:
    """One training and the numbers of each epoch. `terms`: names of the terms whose sum is its loss."""

    job: TrainJob
    state: str
    device: str
    log: list[training_log.Line]
    terms: tuple[str, ...]

    @cached_property
    def loss(self) -> list[float]:
        """Loss by epoch."""
        return [training_log.total(line, self.terms) for line in self.log]

    @cached_property
    def validation(self) -> list[float]:
        """Validation accuracy in percent by epoch; NaN where it was not measured."""
        return [100 * line.get(training_log.VALIDATION, math.nan) for line in self.log]

    @property
    def about(self) -> dict[str, object]:
        """Defense and seed."""
        return {"defense": self.job.label(), "seed": self.job.seed}


def training_curves(store: Store, rows: list[Row]) -> list[Plot]:
    """One figure for each data set with a training whose log lies in the results folder."""
    groups: dict[str, dict[str, list[LoggedTraining]]] = {}
    names = DatasetNames(store)
    for training in _logged(store):
        config = json.dumps(training.job.without_seed(), sort_keys=True)
        groups.setdefault(names.name(training.job.data), {}).setdefault(config, []).append(training)
    marks = {e.train_key: mark_of(row) for row in rows for e in row.evaluations}
    rank = {row.provenance.train_key: k for k, row in reversed(list(enumerate(sorted(rows, key=_best_first))))}
    found = []
    for dataset, by_config in sorted(groups.items()):
        long = [by for by in by_config.values() if max(len(training.log) for training in by) >= FEWEST]
        order = sorted(long, key=lambda by: min(rank.get(c.job.key, len(rank)) for c in by))
        found += [_figure(dataset, [sorted(by, key=lambda c: c.job.seed) for by in order], marks)] if order else []
    return found


def _best_first(row: Row) -> tuple[bool, float]:
    return row.defense != "standard", -row.accuracy.worst.mean if row.accuracy.worst.values else 1.0


def _logged(store: Store) -> list[LoggedTraining]:
    found: list[tuple[TrainJob, Record | None, list[training_log.Line]]] = []
    for key, job in store.jobs().items():
        if isinstance(job, TrainJob) and (log := training_log.read(store, key)):
            found.append((job, store.record(key), log))
    # a training that was stopped before it stored the names of its terms has those of its defense
    terms = {job.defense.name: own for job, record, _ in found if (own := _terms(record))}
    return [
        LoggedTraining(
            job,
            record.state if record else "running or killed",
            (record.provenance.device if record else None) or "unknown",
            log,
            _terms(record) or terms.get(job.defense.name, ()),
        )
        for job, record, log in found
    ]


def _terms(record: Record | None) -> tuple[str, ...]:
    return tuple(train_metrics(record).final_terms or ())


def _figure(dataset: str, order: list[list[LoggedTraining]], marks: dict[str, str]) -> Plot:
    shown = order[:MAX_PANELS]
    figure, found = panels([marks.get(by_seed[0].job.key, "") for by_seed in shown], ACROSS, 2.6, 1.8)
    for part, by_seed in zip(found, shown, strict=True):
        _panel(axes_of(part), by_seed)
    trainings = [training for by_seed in order for training in by_seed]
    few = f" Shown: the best {len(shown)} of {len(order)} configurations; the table has all."
    validated = any(math.isfinite(v) for training in trainings for v in training.validation)
    jobs = [training.job for training in trainings]
    budgets = (f"{job.threat.norm} {job.threat.eps}" if job.threat else "none" for job in jobs)
    caption = setup(
        [f"{joined(job.data.train for job in jobs)} training images"], budgets, (job.seed for job in jobs),
        (training.device for training in trainings),
    )  # fmt: skip
    return Plot(
        slug("training", dataset),
        dataset,
        f"Training loss by epoch of {len(shown)} configurations, a panel each; the table has first and last values.",
        "Loss (mean over the steps of an epoch, the sum of a method's terms) by epoch; each panel has its own scale, "
        "since methods minimize different sums: compare shapes, not heights. Each line is a seed. "
        + ("Dashed: validation accuracy in percent, right axis. " if validated else "")
        + f"{caption}{few if len(order) > MAX_PANELS else ''}",
        ["defense", "seed", "state", "epochs", "loss, first", "loss, last", "its terms, last", "validation (%), last"],
        [_numbers(training) for training in trainings],
        figure,
        dataset,
        behind=[{0: [job.key]} for job in jobs],
        data=[line for training in trainings for line in _epochs(training)],
        marks=[marks.get(job.key, "") for job in jobs],
    )


def _panel(axes: Axes, by_seed: list[LoggedTraining]) -> None:
    axes.set_title(short(by_seed[0].job.label(), 34), fontsize=7.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.tick_params(labelsize=7, length=2)
    right = None
    for k, training in enumerate(by_seed):
        style: dict[str, Any] = {"color": COLORS[k % len(COLORS)], "linewidth": 1.2}
        style |= {"marker": "o", "markersize": 2.2} if len(training.log) <= MAX_MARKED else {}
        x = [line["epoch"] for line in training.log]
        axes.plot(_thinned(x), _thinned(training.loss), DASHES[0], **style)
        measured = [(at, v) for at, v in zip(x, training.validation, strict=True) if math.isfinite(v)]
        if measured:
            if right is None:
                right = axes.twinx()
                right.set_ylim(0, 100)
                right.tick_params(labelsize=7, length=2)
            right.plot(*zip(*_thinned(measured), strict=True), DASHES[1], **style)


def _thinned(values: list[Any]) -> list[Any]:
    """At most `MAX_POINTS` of the values, evenly spaced, with the first and the last."""
    if len(values) <= MAX_POINTS:
        return values
    return [values[round(k * (len(values) - 1) / (MAX_POINTS - 1))] for k in range(MAX_POINTS)]


def _numbers(training: LoggedTraining) -> list[object]:
    last = training.log[-1]
    loss, validation = ([v for v in values if math.isfinite(v)] for values in (training.loss, training.validation))
    terms = " + ".join(f"{name} {last[name]:.4g}" for name in training.terms if name in last)
    return [
        *training.about.values(), training.state, len(training.log),
        f"{loss[0]:.4g}" if loss else "–", f"{loss[-1]:.4g}" if loss else "–", terms or "–",
        f"{validation[-1]:.2f}" if validation else "–",
    ]  # fmt: skip


def _epochs(training: LoggedTraining) -> list[dict[str, object]]:
    """Lines of the CSV."""
    about = {**training.about, "key": training.job.key}
    found: list[dict[str, object]] = []
    for line, loss in zip(training.log, training.loss, strict=True):
        own = {name: value for name, value in line.items() if name not in ("epoch", training_log.TOTAL)}
        found.append({**about, "epoch": int(line["epoch"]), "loss": loss, **own})
    return found
