"""Turns a spec into jobs, as a pure function: equal content gives equal keys, so specs share work and a resumed run
skips every job that has a record.

Each defense of the spec is trained, each training is attacked, and each trained model is audited; all of this for every
architecture and every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.core.epsilon import Epsilon, parse_eps
from bench.data import datasets
from bench.planning import catalog
from bench.planning.checks import check_spec
from bench.planning.evaluations import BASELINE, PlannedAttack, audits, transfer_sources
from bench.planning.job import Job, TrainJob
from bench.planning.job_fields import DataChoice, JobThreat, PluginChoice
from bench.planning.recipes import check_recipe, recipe
from bench.planning.spec import AttackSpec, DefenseSpec, ModelSpec, Spec

# raised when the results of the training code may change; a changed comment must not invalidate a week of training
TRAIN_REVISION = 1


def plan(spec: Spec, root: Path) -> list[Job]:
    """All jobs of a spec, each after the jobs it needs. `root`: the data folder.

    Raises LookupError or ValueError in one line.
    """
    facts = datasets.facts(spec.data.name, root, spec.data.size)
    check_spec(spec, facts)
    jobs: dict[str, Job] = {}
    # seed by seed: the whole matrix is done for the first seed before any of it is repeated
    for repetition, seed in enumerate(spec.seeds):
        entries = [entry for entry in spec.attacks if entry.seeds is None or repetition < entry.seeds]
        for model in spec.models or [ModelSpec(name=facts.default_model)]:
            group = _Group(spec, facts, model, seed)
            jobs.update((job.key, job) for job in group.jobs(entries))
    return list(jobs.values())


@dataclass(frozen=True)
class _Group:
    """The jobs of one architecture and one seed. Its rows can be evaluated on each other's adversarial images."""

    spec: Spec
    facts: datasets.Facts
    model: ModelSpec
    seed: int

    def jobs(self, entries: Sequence[AttackSpec]) -> list[Job]:
        """Trainings with their evaluations under the attacks `entries`, transfer attacks, audits."""
        attacks = self._attacks(entries)
        trains = list({job.key: job for job in self._trainings()}.values())
        matrix = [job for train in trains for job in (train, *_evaluations(attacks, train))]
        transfers: list[Job] = []
        sources: list[Job] = []
        if any(attack.plugin.needs_images for attack in attacks):
            sources = self._sources_outside_the_matrix(trains)
            transfers = [job for attack in attacks for job in attack.transfers(trains, [*matrix, *sources])]
        checks = [job for train in trains for job in audits(self.spec, self.facts, train, [*matrix, *transfers])]
        return [*matrix, *sources, *transfers, *checks]

    def _attacks(self, entries: Sequence[AttackSpec]) -> list[PlannedAttack]:
        return [PlannedAttack(self.spec, self.facts, entry) for entry in entries]

    def _trainings(self) -> list[TrainJob]:
        default: list[Epsilon | None] = [self.spec.threat.train_eps]
        return [
            self._train_job(entry, settings, train_eps)
            for entry in self.spec.defenses
            for settings in entry.combinations()
            for train_eps in entry.train_eps or default
        ]

    def _sources_outside_the_matrix(self, trains: Sequence[TrainJob]) -> list[Job]:
        """What transfer attacks need in addition: attacks that the spec does not list, and the undefended baseline."""
        names, listed = transfer_sources(self.spec), {entry.name for entry in self.spec.attacks}
        extra = [AttackSpec(name=name) for name in names if name not in listed]
        jobs = [job for train in trains for job in _evaluations(self._attacks(extra), train)]
        if not any(train.defense.name == BASELINE for train in trains):
            baseline = self._train_job(DefenseSpec(name=BASELINE), {}, None)
            entries = [entry for entry in (*self.spec.attacks, *extra) if entry.name in names]
            jobs += [baseline, *_evaluations(self._attacks(entries), baseline)]
        return jobs

    def _train_job(self, entry: DefenseSpec, chosen: dict[str, Any], train_eps: Epsilon | None) -> TrainJob:
        spec, facts = self.spec, self.facts
        defense, architecture = catalog.get("defenses", entry.name), catalog.get("models", self.model.name)
        training = recipe(spec, facts, self.model.name, defense.constant("recipe", {}))
        settings = defense.resolve(chosen, "defenses ")
        inner = [settings["base"]["name"]] if isinstance(settings.get("base"), dict) else []
        check_recipe(spec, training, [entry.name, *inner])
        threat = None
        if defense.uses_threat:
            norm = spec.threat.norm
            if norm not in defense.norms:
                raise ValueError(f"defense {entry.name} has no {norm} version; its norms: {', '.join(defense.norms)}")
            eps = parse_eps(train_eps if train_eps is not None else spec.threat.eps[-1], norm)
            threat = JobThreat(norm, str(eps))
        return TrainJob(
            engine=TRAIN_REVISION,
            data=images(facts, spec.data.train, spec.data.validation),
            model=PluginChoice(self.model.name, architecture.resolve(self.model.set, "models "), architecture.revision),
            defense=PluginChoice(entry.name, settings, defense.revision),
            threat=threat,
            recipe=spec.recipe,
            training=training if threat else {**training, "eps_warmup": 0.0},
            seed=self.seed,
        )


def _evaluations(attacks: Sequence[PlannedAttack], train: TrainJob) -> list[Job]:
    return [job for attack in attacks for job in attack.evaluations(train)]


def images(facts: datasets.Facts, train: int | None, validation: int) -> DataChoice:
    """The images of a job: those of a folder are identified by their content, those of a known data set by its name."""
    return DataChoice(facts.name, train or facts.train, validation, facts.size, facts.content or None)
