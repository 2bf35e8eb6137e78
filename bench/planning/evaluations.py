"""The evaluations of a training, their shards, transfer between rows of a matrix, and the soundness audits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from bench.data import datasets
from bench.planning import catalog
from bench.planning.job import AuditJob, EvaluateJob, ImportJob, Job, ModelJob, ShardJob
from bench.planning.job_fields import JobThreat, PluginChoice
from bench.planning.spec import AttackSpec, DefenseSpec, Spec

# Raised when the engine's results may change. Stochastic models have a number of their own: since 2 the noise draws
# that score an image are separate from those that choose between attacks.
EVALUATE_REVISION, RANDOMISED_REVISION, AUDIT_REVISION = 1, 2, 1
BASELINE = "standard"  # the undefended baseline, whose adversarial images every other row is evaluated on
AUDITED = {"quick": 256, "full": 1000}  # images of an audit of a model


def combinations(entry: DefenseSpec | AttackSpec) -> list[dict[str, Any]]:
    """`grid` multiplies, `set` does not, so a list value is never ambiguous."""
    both = set(entry.set) & set(entry.grid)
    if both:
        raise ValueError(f"{entry.name}: '{min(both)}' is in set and in grid; expected one of them")
    empty = [name for name, values in entry.grid.items() if not values]
    if empty:
        raise ValueError(f"{entry.name}: grid '{empty[0]}' is empty; expected a list of values")
    return [
        {**entry.set, **dict(zip(entry.grid, values, strict=True))}
        for values in itertools.product(*entry.grid.values())
    ]


def evaluations(spec: Spec, facts: datasets.Facts, entry: AttackSpec, train: ModelJob) -> list[Job]:
    """One job for each eps and kind of weights, preceded by its shards if it has any.

    Empty where the attack does not apply to this kind of model, and for an attack that uses the images of other rows
    (see `transfers`).
    """
    attack = catalog.get("attacks", entry.name)
    if not exists(entry.name, deploys(train)) or attack.constant("needs_images", False):
        return []
    jobs: list[Job] = []
    for which, chosen, threat in itertools.product(_weights(train), combinations(entry), _budgets(spec, entry)):
        settings = attack.resolve(_with_budgets(spec, attack, chosen), "attacks ")
        whole = _job(spec, facts, entry, train, settings, threat, which)
        shards = _shards(entry, attack, settings, whole)
        jobs += [*shards, replace(whole, parts=tuple(shard.key for shard in shards))]
    return jobs


def transfers(
    spec: Spec, facts: datasets.Facts, entry: AttackSpec, trains: Sequence[ModelJob], jobs: Sequence[Job]
) -> list[EvaluateJob]:
    """For each of `trains` (one architecture, one seed) its evaluation on the images that `jobs` made against others.

    It uses the images of every evaluation of the attack named by the setting `source`, at the same eps, of every other
    row.
    """
    attack = catalog.get("attacks", entry.name)
    made: list[EvaluateJob] = []
    for which, chosen, threat in itertools.product(("last", "best"), combinations(entry), _budgets(spec, entry)):
        settings = attack.resolve(chosen, "attacks ")
        for train in (train for train in trains if which in _weights(train)):
            sources = [
                job
                for job in jobs
                if isinstance(job, EvaluateJob)
                and job.model_key != train.key
                and job.attack.name == settings["source"]
                and job.threat == threat
                and job.weights == "last"
            ]
            if sources:
                alone = _job(spec, facts, entry, train, settings, threat, which)
                n = min(alone.n, *(job.n for job in sources))
                keys = sorted(job.key for job in sources)
                made.append(replace(alone, n=n, needs=(train.key, *keys)))
    return made


def all_sources(spec: Spec) -> list[str]:
    """Attacks whose images the spec's transfer attacks use. Raises ValueError for an attack that makes none."""
    found = dict.fromkeys(
        catalog.get("attacks", entry.name).resolve(chosen, "attacks ")["source"]
        for entry in spec.attacks
        if needs_images(entry.name)
        for chosen in combinations(entry)
    )
    for name in found:
        source = catalog.get("attacks", name)
        if not source.constant("uses_threat", True) or source.constant("metric", "") or needs_images(name):
            raise ValueError(
                f"transfer.source is {name}, which makes no adversarial images; expected an attack such as pgd"
            )
    return list(found)


def sources_of(spec: Spec) -> list[str]:
    """The attacks of `all_sources` that the spec does not list."""
    return [name for name in all_sources(spec) if name not in {entry.name for entry in spec.attacks}]


def audits(spec: Spec, facts: datasets.Facts, train: ModelJob, jobs: Sequence[Job]) -> list[AuditJob]:
    """The soundness checks of a training: one audit of the model, one of the images that `jobs` made against it."""
    threats = tuple(JobThreat(spec.threat.norm, str(eps)) for eps in spec.threat.eps if float(eps) > 0)
    own = [job for job in jobs if isinstance(job, EvaluateJob) and job.model_key == train.key and job.threat]
    if spec.checks == "off" or spec.data.split == "validation" or not threats or not own:
        return []
    made = []
    for which in _weights(train):
        of_model = AuditJob(
            engine=AUDIT_REVISION,
            part="model",
            level=spec.checks,
            threats=threats,
            weights=which,
            n=min(AUDITED[spec.checks], spec.data.test or facts.test),
            seed=train.seed,
            needs=(train.key,),
        )
        evaluated = [job for job in own if job.weights == which]
        most = max(job.n for job in evaluated)  # whole blocks are checked, as they were attacked
        keys = sorted(job.key for job in evaluated)
        made += [of_model, replace(of_model, part="images", n=most, needs=(train.key, *keys))]
    return made


def check_norm(spec: Spec, name: str) -> None:
    """Raise ValueError for an attack that does not support the spec's norm."""
    found = norms(name)
    if spec.threat.norm not in found:
        fit = dict.fromkeys(other.name for other in spec.attacks if spec.threat.norm in norms(other.name))
        advice = f"; leave it out: {', '.join(fit)} can stay" if fit else ""
        raise ValueError(f"attack {name} has no {spec.threat.norm} version; its norms: {', '.join(found)}{advice}")


def norms(name: str) -> tuple[str, ...]:
    """The norms that an attack supports; all of them for an attack without a threat."""
    attack, every = catalog.get("attacks", name), ("Linf", "L2", "L1")
    found: tuple[str, ...] = attack.constant("norms", every) if attack.constant("uses_threat", True) else every
    return found


def deploys(train: ModelJob) -> str:
    """The kind of model that a training gives: deterministic, randomized or smoothed."""
    if isinstance(train, ImportJob):
        return "randomised" if train.randomized else "deterministic"
    return str(catalog.get("defenses", train.defense.name).constant("predictor", "deterministic"))


def exists(attack: str, kind: str) -> bool:
    """Does this attack apply to models of this kind (deterministic, randomized, smoothed)?"""
    return kind in wants(attack)


def wants(attack: str) -> tuple[str, ...]:
    """The kinds of models that an attack applies to."""
    plugin = catalog.get("attacks", attack)
    if plugin.constant("needs_smoothed", False):
        return ("smoothed",)
    if plugin.constant("needs_draws", False):
        return ("randomised", "smoothed")
    return ("deterministic", "randomised", "smoothed")


def needs_images(attack: str) -> bool:
    """Does this attack use adversarial images that other evaluations made?"""
    return bool(catalog.get("attacks", attack).constant("needs_images", False))


def _weights(train: ModelJob) -> tuple[str, ...]:
    return ("last", "best") if train.training.get("keep") == "best" else ("last",)


def _budgets(spec: Spec, entry: AttackSpec) -> list[JobThreat | None]:
    attack = catalog.get("attacks", entry.name)
    if not attack.constant("uses_threat", True):
        return [None]
    chosen = spec.threat.eps[-1:] if attack.constant("uses_budgets", False) else spec.threat.eps
    return [JobThreat(spec.threat.norm, str(eps)) for eps in chosen]


def _with_budgets(spec: Spec, attack: catalog.Plugin, chosen: dict[str, Any]) -> dict[str, Any]:
    """Settings of an attack that goes through all eps of the spec in one job: these eps are added."""
    if not attack.constant("uses_budgets", False) or chosen.get("budgets"):
        return chosen
    return {**chosen, "budgets": [str(eps) for eps in spec.threat.eps]}


def _job(
    spec: Spec,
    facts: datasets.Facts,
    entry: AttackSpec,
    train: ModelJob,
    settings: dict[str, Any],
    threat: JobThreat | None,
    which: str,
) -> EvaluateJob:
    held_out = spec.data.split == "validation"
    there = spec.data.validation if held_out else facts.test
    revision = catalog.get("attacks", entry.name).constant("revision", 1)
    return EvaluateJob(
        engine=EVALUATE_REVISION if deploys(train) == "deterministic" else RANDOMISED_REVISION,
        attack=PluginChoice(entry.name, settings, revision),
        threat=threat,
        n=entry.n or min(spec.data.test or there, there),
        seed=train.seed,
        weights=which,
        split=spec.data.split,
        needs=(train.key,),
    )


def _shards(entry: AttackSpec, attack: catalog.Plugin, settings: dict[str, Any], whole: EvaluateJob) -> list[ShardJob]:
    """The evaluation in `entry.shards` ranges of whole blocks, so that no result depends on the cut."""
    if (entry.shards or 1) == 1:
        return []
    n, block = whole.n, settings.get("block_size") or attack.constant("block", 500)
    blocks, shards = -(-n // block), entry.shards or 1
    if shards > blocks:
        hint = "; a smaller block_size makes more of them" if any(f.name == "block_size" for f in attack.fields) else ""
        raise ValueError(
            f"attacks {entry.name} shards is {shards}, but its {n} images are {blocks} blocks of at most {block}, and "
            f"a shard holds at least one{hint}"
        )
    edges = [min(n, block * (blocks * k // shards)) for k in range(shards + 1)]
    return [shard_of(whole, first, last) for first, last in itertools.pairwise(edges)]


def shard_of(whole: EvaluateJob, first: int, last: int) -> ShardJob:
    """The part of an evaluation that covers the images [first, last)."""
    return ShardJob(
        engine=whole.engine,
        attack=whole.attack,
        threat=whole.threat,
        n=whole.n,
        seed=whole.seed,
        weights=whole.weights,
        split=whole.split,
        images=(first, last),
        needs=whole.needs,
    )
