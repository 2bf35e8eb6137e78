"""Turns a spec into jobs and runs nothing: equal content gives equal keys, so specs share work and a resumed run
skips every job that has a record.

Each defense of the spec is trained, each training is attacked, and each trained model is audited; all of this for every
architecture and every seed. `trainings` and `evaluations` make the jobs of one defense and of one attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.data import datasets
from bench.planning.checks import check_spec
from bench.planning.evaluations import BASELINE, PlannedAttack, audits, transfer_sources
from bench.planning.job import Job, TrainJob
from bench.planning.spec import AttackSpec, DefenseSpec, ModelSpec, Spec
from bench.planning.trainings import PlannedDefense


def plan(spec: Spec, root: Path) -> list[Job]:
    """All jobs of a spec, each after the jobs it needs. `root`: the data folder.

    Raises LookupError or ValueError in one line.
    """
    facts = datasets.facts(spec.data.name, root, spec.data.size)
    check_spec(spec, facts)
    defenses = [PlannedDefense(spec, facts, entry) for entry in spec.defenses]
    jobs: dict[str, Job] = {}
    # seed by seed: the whole matrix is done for the first seed before any of it is repeated
    for repetition, seed in enumerate(spec.seeds):
        entries = [entry for entry in spec.attacks if entry.seeds is None or repetition < entry.seeds]
        attacks = [PlannedAttack(spec, facts, entry) for entry in entries]
        for model in spec.models or [ModelSpec(name=facts.default_model)]:
            trains = {job.key: job for defense in defenses for job in defense.trainings(model, seed)}
            jobs.update((job.key, job) for job in _matrix(spec, facts, model, [*trains.values()], attacks))
    return list(jobs.values())


def _matrix(
    spec: Spec, facts: datasets.Facts, model: ModelSpec, trains: Sequence[TrainJob], attacks: Sequence[PlannedAttack]
) -> list[Job]:
    """The jobs of one architecture and one seed: trainings, evaluations, transfer attacks between rows, audits."""
    matrix = [job for train in trains for job in (train, *_evaluations(attacks, train))]
    sources: list[Job] = []
    if any(attack.plugin.needs_images for attack in attacks):
        sources = _sources_outside_the_matrix(spec, facts, model, trains)
    transfers = [job for attack in attacks for job in attack.transfers(trains, [*matrix, *sources])]
    checks = [job for train in trains for job in audits(spec, facts, train, [*matrix, *transfers])]
    return [*matrix, *sources, *transfers, *checks]


def _evaluations(attacks: Sequence[PlannedAttack], train: TrainJob) -> list[Job]:
    return [job for attack in attacks for job in attack.evaluations(train)]


def _sources_outside_the_matrix(
    spec: Spec, facts: datasets.Facts, model: ModelSpec, trains: Sequence[TrainJob]
) -> list[Job]:
    """What transfer attacks need in addition: attacks that the spec does not list, and the undefended baseline."""
    names, listed = transfer_sources(spec), {entry.name for entry in spec.attacks}
    extra = [PlannedAttack(spec, facts, AttackSpec(name=name)) for name in names if name not in listed]
    jobs = [job for train in trains for job in _evaluations(extra, train)]
    if not any(train.defense.name == BASELINE for train in trains):
        own = [PlannedAttack(spec, facts, entry) for entry in spec.attacks if entry.name in names]
        for baseline in PlannedDefense(spec, facts, DefenseSpec(name=BASELINE)).trainings(model, trains[0].seed):
            jobs += [baseline, *_evaluations([*own, *extra], baseline)]
    return jobs
