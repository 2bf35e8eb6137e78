"""`bench sweep DEFENSE --optuna N`: searches settings of a defense on validation images; parses, runs and prints.

The records are the only memory. The sampler has a fixed seed and is told what the records say, in the order of the
trials, so that the same command asks for the same points again: those with a record cost nothing, and after a kill the
search goes on. A larger N goes on behind a smaller one.

Points are proposed by multi-objective TPE (Ozaki et al. 2020, GECCO): NSGA-II learns nothing within its first
population, which is longer than the tens of trainings that such a search can pay for.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

from bench.commands.arguments import warn
from bench.commands.matrix import Matrix, describe, specified
from bench.commands.output import console_of, show_table
from bench.commands.run import halted
from bench.data import datasets
from bench.executors.base import FAILED, Backend, Event, MissingDependency, todo
from bench.executors.clusters import Machine
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.planning import catalog, search_space
from bench.planning.evaluations import DEFAULT_N
from bench.planning.job import Job, TrainJob
from bench.planning.plan import plan
from bench.planning.search_space import Dimension
from bench.planning.spec import Spec
from bench.planning.typed import Options
from bench.progress import live
from bench.progress.cost_model import CostModel
from bench.progress.remaining import together
from bench.records.runtime_estimate import Estimator
from bench.records.store import Store
from bench.results.seed_values import SeedValues
from bench.terminal import counted, say

# Trials that are asked for before the first of them is told, and run at the same time. Not the number of slots: every
# machine has to ask for the same points.
TOGETHER = 4
HELD_OUT = 5  # one of so many training images is held out, DEFAULT_N at most


@dataclass(frozen=True)
class Search:
    """What was asked for. `spec`: without the searched settings, on validation images; `root`: the data folder."""

    spec: Spec
    root: Path
    space: list[Dimension]
    trials: int

    @property
    def defense(self) -> str:
        """Its name."""
        return self.spec.defenses[0].name

    def jobs(self, settings: dict[str, Any]) -> list[Job]:
        """The training at these settings and its evaluations. Raises LookupError or ValueError."""
        spec = self.spec.model_copy(deep=True)
        spec.defenses[0].set |= settings
        return plan(spec, self.root)


@dataclass(frozen=True)
class Trial:
    """A point with its jobs; once it has ended either its accuracies, or why it `failed`."""

    number: int
    settings: dict[str, Any]
    jobs: list[Job]
    clean: SeedValues = field(default_factory=SeedValues)
    worst: SeedValues = field(default_factory=SeedValues)
    failed: str = ""

    @property
    def key(self) -> str:
        """Of its training."""
        return next(job.key for job in self.jobs if isinstance(job, TrainJob))

    def __str__(self) -> str:
        """`sigma=0.31, target=logits`."""
        return ", ".join(f"{name}={search_space.typed(value)}" for name, value in self.settings.items())

    def told(self) -> str:
        """How it ended, in words."""
        if self.failed:
            return f"failed: {self.failed}"
        return f"clean {_percent(self.clean)} %, worst case {_percent(self.worst)} %"

    def to_json(self) -> dict[str, Any]:
        """Shares in [0,1], null where it failed."""
        ends = None if self.failed else self.worst.interval()
        return {
            "trial": self.number, "settings": self.settings, "state": "failed" if self.failed else "done",
            "clean": None if self.failed else self.clean.mean, "robust": None if self.failed else self.worst.mean,
            "low": ends and ends[0], "high": ends and ends[1], "reason": self.failed or None, "train_key": self.key,
        }  # fmt: skip


def search(
    options: Options, searched: list[str], trials: int, machine: Machine, results: Path, data_dir: Path | None,
    plugins: list[str], mode: str,
) -> int:  # fmt: skip
    """Run the trials that have no record, and print the front of clean against worst-case accuracy.

    Args:
        options: The matrix, with one defense. searched: What was typed for --search. trials: How many, with old ones.
        machine: Where they run.
        results: The results folder. data_dir: As typed. plugins: As typed. mode: See bench.progress.live.View.

    Returns:
        The exit code: 0, or 1 if no trial has a result.

    Raises:
        LookupError, ValueError: In one line, before anything is written. MissingDependency: Without optuna.
    """
    study = _study()
    asked, notes = _search(options, searched, trials, data_dir)
    proposed = asked.jobs({})
    backend = Local(asked.root, machine.slots(), machine.seconds())
    store, model = Store(results), CostModel(asked.root, backend.slots[0])
    warn(store.prepare())
    if mode in ("live", "plain"):
        _announce(
            asked, Matrix(asked.spec, proposed, asked.root, notes, str(options.spec or "")), backend, store, model
        )
    usual = _usual(asked)
    if usual is not None:
        study.enqueue_trial(usual)
    ended = list[Trial]()
    while len(ended) < trials:
        open_trials = [study.ask() for _ in range(min(TOGETHER, trials - len(ended)))]
        points = [{each.name: each.rounded(_suggested(trial, each)) for each in asked.space} for trial in open_trials]
        planned = [Trial(len(ended) + k, point, asked.jobs(point)) for k, point in enumerate(points, 1)]
        for open_trial, trial in zip(open_trials, _run(planned, backend, store, model, mode), strict=True):
            failed = {"state": _fail_state()} if trial.failed else {"values": (trial.clean.mean, trial.worst.mean)}
            study.tell(open_trial, **failed)
            ended.append(trial)
            if mode != "json":
                say(f"trial {trial.number:<4}{trial.told()}: {trial}")
        if trials > len(ended) == len(planned) and len(why := {trial.failed for trial in ended}) == 1 and "" not in why:
            print(f"error: the first {len(ended)} trials failed alike, so no more are made", file=sys.stderr)
            break
    front = _front(ended)
    command = _command(options, asked, front[0], results, data_dir, plugins) if front else None
    if mode == "json":
        _print_json(asked, ended, front, command)
    else:
        _show(asked, ended, front, command, mode)
    return 0 if front else 1


def _study() -> Any:
    """A study of two accuracies that are maximized, in memory. Raises MissingDependency without optuna."""
    try:
        import optuna
    except ImportError as error:
        raise MissingDependency(
            f"--optuna needs the package optuna, which does not import ({error}); "
            'install it with: pip install "defense-bench[sweep]"'
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions call the constant liar an experiment
        sampler = optuna.samplers.TPESampler(seed=0, constant_liar=True)  # keeps a batch from one single place
    return optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)


def _fail_state() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL


def _suggested(trial: Any, dimension: Dimension) -> Any:
    """What the sampler proposes for a setting."""
    if dimension.choices:
        return trial.suggest_categorical(dimension.name, dimension.choices)
    suggest = trial.suggest_int if dimension.whole else trial.suggest_float
    return suggest(dimension.name, dimension.low, dimension.high, log=dimension.log)


def _search(options: Options, searched: list[str], trials: int, data_dir: Path | None) -> tuple[Search, list[str]]:
    """The search, and what was chosen for the user. Raises LookupError or ValueError in one line."""
    defense = options.defense[0]
    space = search_space.dimensions(catalog.get("defenses", defense), searched)
    spec, root, notes = specified(options, data_dir)
    facts, data = datasets.facts(spec.data.name, root, spec.data.size), spec.data
    notes = [note for note in notes if not note.startswith("n ")]  # that counts test images
    if not data.validation:
        total = data.train or facts.train
        data.validation = min(data.test or DEFAULT_N, max(total // HELD_OUT, 1))
        notes.append(f"validation {data.validation} of {total} training images, held out (--validation to change)")
    data.split, spec.checks = "validation", "off"
    fixed = [each.name for each in space if each.name in spec.defenses[0].set]
    if fixed:
        raise ValueError(f"{fixed[0]} is in --set and in --search; give it in one of them")
    attacks = {entry.name for entry in spec.attacks}
    if "clean" not in attacks or attacks == {"clean"}:
        raise ValueError(
            f"--optuna compares clean with worst-case accuracy, but the attacks are {', '.join(sorted(attacks))}; "
            "expected clean and at least one other, such as --attack clean,pgd"
        )
    found = Search(spec, root, space, trials)
    trained = [job for job in found.jobs({}) if isinstance(job, TrainJob) and job.defense.name == defense]
    if len(trained) > 1 or len(spec.threat.eps) > 1 or spec.train.keep == "best":
        found_eps = ", ".join(map(str, spec.threat.eps))
        raise ValueError(
            f"a trial of --optuna would be {counted(len(trained), 'training')} under eps {found_eps}, keep "
            f"{spec.train.keep}; expected one training, so one model and one --train-eps, one --eps, and keep last"
        )
    return found, notes


def _usual(asked: Search) -> dict[str, Any] | None:
    """The settings without a search, which come first if they lie in its bounds: others are compared with them."""
    entry, plugin = asked.spec.defenses[0], catalog.get("defenses", asked.defense)
    defaults = {field.name: field.default for field in plugin.fields} | plugin.resolve(entry.set)
    found = {each.name: defaults[each.name] for each in asked.space}
    return found if all(each.holds(found[each.name]) for each in asked.space) else None


def _announce(asked: Search, matrix: Matrix, backend: Backend, store: Store, model: CostModel) -> None:
    space = "; ".join(map(str, asked.space))
    search = f"search    {asked.defense}: {space}; {counted(asked.trials, 'trial')}, {TOGETHER} at a time"
    for line in describe(matrix):
        say(search if line.startswith("defenses ") else line)
    say(f"devices   {backend.devices()}")
    estimator = Estimator(store, backend.kind, model)
    estimator.know(matrix.jobs)
    time = together(store, matrix.jobs, estimator, 1)
    if time.seconds:
        say(f"time      {time.describe()} for each trial on one slot of {backend.lanes}, {time.source()}")


def _run(planned: list[Trial], backend: Backend, store: Store, model: CostModel, mode: str) -> list[Trial]:
    """The same trials, ended: what has no record is run, unless it is known to be impossible."""
    jobs, shown = _jobs(planned), "quiet" if mode == "json" else mode
    impossible = dict[int, str]()
    if not todo(jobs, store):
        return [_judged(trial, store) for trial in planned]
    view = live.View(console_of(mode), store, jobs, shown, backend.lanes, backend.kind)
    events: Iterator[Event] = iter(())
    try:
        with live.waiting(view.console, shown, "checking models, defenses and attacks") as note:
            if problems := backend.problems(jobs, store, note):  # of which trials is asked only then
                found = {trial.number: Backend.problems(backend, trial.jobs, store, note) for trial in planned}
                if not any(found.values()):  # the data cannot be had, which no other point changes
                    raise ValueError(problems[0])
                # without the name of the defense, in which the settings stand again
                impossible = {k: re.sub(r"^defense \w+( \(.*?\))?: ", "", each[0]) for k, each in found.items() if each}
        possible = _jobs([trial for trial in planned if trial.number not in impossible])
        view = live.View(console_of(mode), store, possible, shown, backend.lanes, backend.kind)
        view.estimator.cost_model = model if shown != "quiet" else None
        events = drive(backend, possible, store)
        view.follow(events)
    except (KeyboardInterrupt, SystemExit) as stop:
        halted(stop, view, events)
    return [
        replace(trial, failed=impossible[trial.number]) if trial.number in impossible else _judged(trial, store)
        for trial in planned
    ]


def _jobs(planned: Sequence[Trial]) -> list[Job]:
    """Each once: equal points share theirs."""
    return list({job.key: job for trial in planned for job in trial.jobs}.values())


def _judged(trial: Trial, store: Store) -> Trial:
    """A trial with its accuracies, from the records; failed where there are none, or nothing that could be ranked."""
    from bench.soundness.verdicts import judged_rows
    from bench.tables.ranking import UNRANKED, reasons, verdict_text

    records = ((job, store.record(job.key)) for job in trial.jobs)
    broken = [
        f"{job.kind} {record.state}: {record.problem}" for job, record in records if record and record.state in FAILED
    ]
    rows = judged_rows(store, [job.key for job in trial.jobs], split="validation")
    row = next((row for row in rows if row.provenance.train_key == trial.key and row.norm), None)
    if row is None or not row.accuracy.worst.values:
        return replace(trial, failed=broken[0] if broken else row.accuracy.worst.state() if row else "no evaluation")
    if row.verdict in UNRANKED:
        why = [*row.accuracy.unlearned.values(), *reasons([row])]
        return replace(trial, failed=f"{verdict_text(row)}{': ' * bool(why)}{'; '.join(why[:1])}")
    return replace(trial, clean=row.accuracy.clean, worst=row.accuracy.worst)


def _front(ended: list[Trial]) -> list[Trial]:
    """The trials that no other exceeds in one accuracy without falling behind in the other, best worst case first; of
    equal points the first."""
    from bench.tables.pareto import pareto

    good = list({trial.key: trial for trial in reversed(ended) if not trial.failed}.values())
    front = [good[k] for k in pareto([(trial.clean.mean, trial.worst.mean) for trial in good])]
    return sorted(front, key=lambda trial: (-trial.worst.mean, -trial.clean.mean, trial.number))


def _percent(cell: SeedValues) -> str:
    """Mean in percent with half its 95 % interval."""
    low, high = cell.interval()
    return f"{100 * cell.mean:.1f} ±{50 * (high - low):.1f}"


def _show(asked: Search, ended: list[Trial], front: list[Trial], command: str | None, mode: str) -> None:
    """The front as a table, how many trials are not on it, and the command for its first row."""
    from bench.tables.summary import Summary

    failed = [f"{trial.number}" for trial in ended if trial.failed]
    count = f"{counted(len(front), 'trial')} on the front of clean against worst case"
    count += f", {len(ended) - len(failed) - len(front)} behind it"
    count += f", {len(failed)} failed ({', '.join(failed)})" if failed else ""
    if not front:
        say(f"{asked.defense}: {count}")
        return
    n = "/".join(str(n) for n in sorted({front[0].clean.n, front[0].worst.n}))
    chosen = f"percent ± half a 95 % interval on {n} validation images, by which these settings were chosen"
    header = ["trial", "clean", "worst case", *(each.name for each in asked.space)]
    lines = [
        [f"{trial.number}", _percent(trial.clean), _percent(trial.worst), *map(search_space.typed, values)]
        for trial in front
        for values in [trial.settings.values()]
    ]
    notes = [f"{asked.defense}: {count}", f"{chosen}: nothing here is a test result"]
    show_table(Summary(header, lines, notes, frozenset()), console_of(mode))
    print(f"the first row on test images (its training is there):\n  {command}")


def _print_json(asked: Search, ended: list[Trial], front: list[Trial], command: str | None) -> None:
    threat, data = asked.spec.threat, asked.spec.data
    about = {"defense": asked.defense, "dataset": data.name, "norm": threat.norm, "eps": str(threat.eps[0])}
    found = {"trials": [trial.to_json() for trial in ended], "front": [trial.number for trial in front]}
    print(json.dumps({**about, "split": data.split, "validation": data.validation, **found, "next": command}))


def _command(
    options: Options, asked: Search, best: Trial, results: Path, data_dir: Path | None, plugins: list[str]
) -> str:
    """`bench run` for a point on test images, on as many training images as here: so its training has a record."""
    words = ["bench", "run", *([str(options.spec)] if options.spec else []), "--defense", asked.defense]
    for each in fields(Options):
        given = getattr(options, each.name)
        if each.name not in ("spec", "defense", "baseline", "validation", "n") and given not in (None, []):
            option = f"--{each.name.replace('_', '-')}"
            words += chain.from_iterable((option, str(one)) for one in (given if isinstance(given, list) else [given]))
    for name, value in best.settings.items():
        words += ["--set", f"{asked.defense}.{name}={search_space.typed(value)}"]
    words += ["--validation", str(asked.spec.data.validation)]
    words += chain.from_iterable(("--plugin", each) for each in plugins)
    words += ["--results-dir", str(results)] if results != Path("results") else []
    if data_dir is not None and str(data_dir) != os.environ.get("BENCH_DATA"):
        words += ["--data-dir", str(data_dir)]
    return shlex.join(words)
