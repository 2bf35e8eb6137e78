"""The evaluations of a training, their shards, transfer between rows of a matrix, and the soundness audits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.core.epsilon import Epsilon
from bench.data import datasets
from bench.planning import catalog
from bench.planning.job import AuditJob, EvaluateJob, ImportJob, Job, ModelJob, ShardJob
from bench.planning.job_fields import JobThreat, PluginChoice
from bench.planning.spec import EACH, AttackSpec, Spec
from bench.terminal import counted

# Raised when the engine's results may change. Stochastic models have a number of their own: since 2 the noise draws
# that score an image are separate from those that choose between attacks. So have audits of imported models: since 2
# they include C30, which does not concern what bench trains.
EVALUATE_REVISION, RANDOMISED_REVISION = 1, 2
AUDIT_REVISION, IMPORT_AUDIT_REVISION = 1, 2
BASELINE = "standard"  # the undefended baseline, whose adversarial images every other row is evaluated on
DEFAULT_N = 1000  # images of every attack, or the whole test set if it is smaller: as many as a rank needs
AUDITED = {"quick": 256, "full": 1000}  # images of an audit of a model


@dataclass(frozen=True)
class PlannedAttack:
    """One attack of a spec on its data set, and the evaluations that it asks for."""

    spec: Spec
    facts: datasets.Facts
    entry: AttackSpec

    @property
    def plugin(self) -> catalog.Plugin:
        """What the attack's file declares."""
        return catalog.get("attacks", self.entry.name)

    def evaluations(self, train: ModelJob) -> list[Job]:
        """One job for each eps and kind of weights, preceded by its shards if it has any.

        Empty where the attack does not apply to this kind of model, and for an attack that uses the images of other
        rows (see `transfers`).
        """
        if predictor_of(train) not in self.plugin.predictors or self.plugin.needs_images:
            return []
        jobs: list[Job] = []
        for weights in _weights(train):
            for settings, threat in itertools.product(self._settings(), self._threats(train)):
                whole = self._job(train, settings, threat, weights)
                shards = self._shards(whole)
                jobs += [*shards, replace(whole, parts=tuple(shard.key for shard in shards))]
        return jobs

    def transfers(self, trains: Sequence[ModelJob], jobs: Sequence[Job]) -> list[Job]:
        """For each of `trains` (one architecture, one seed) its evaluation on images that were made against the others.

        These are the images of every evaluation in `jobs` of the attack named by the setting `source`, at the same eps,
        of every other row. Empty for an attack that makes its own images.
        """
        if not self.plugin.needs_images:
            return []
        made: list[Job] = []
        sources = [job for job in jobs if isinstance(job, EvaluateJob) and job.weights == "last"]
        for weights, settings, train in itertools.product(("last", "best"), self._settings(), trains):
            for threat in self._threats(train) if weights in _weights(train) else []:
                wanted = [job for job in sources if job.attack.name == settings["source"] and job.threat == threat]
                others = [job for job in wanted if job.model_key != train.key]
                if others:
                    alone = self._job(train, settings, threat, weights)
                    n = min(alone.n, *(job.n for job in others))
                    made.append(replace(alone, n=n, needs=(train.key, *sorted(job.key for job in others))))
        if not made:
            raise ValueError(
                f"attack {self.entry.name} evaluates each row on images made against other rows, but the only row is "
                f"{trains[0].defense.name}; add a defense, or leave {self.entry.name} out"
            )
        return made

    def _settings(self) -> list[dict[str, Any]]:
        """The settings of each combination; an attack that covers all eps of the spec in one job gets these eps."""
        found = []
        for chosen in self.entry.combinations():
            if self.plugin.constant("uses_budgets", False) and not chosen.get("budgets"):
                chosen = {**chosen, "budgets": [str(eps) for eps in self.spec.threat.eps]}
            found.append(self.plugin.resolve(chosen, "attacks "))
        return found

    def _threats(self, train: ModelJob) -> list[JobThreat | None]:
        if not self.plugin.uses_threat:
            return [None]
        every = threats(self.spec, train)
        return [*(every[-1:] if self.plugin.constant("uses_budgets", False) else every)]

    def _job(self, train: ModelJob, settings: dict[str, Any], threat: JobThreat | None, weights: str) -> EvaluateJob:
        data = self.spec.data
        available = self.facts.test if data.split == "test" else data.validation
        return EvaluateJob(
            engine=EVALUATE_REVISION if predictor_of(train) == "deterministic" else RANDOMISED_REVISION,
            attack=PluginChoice(self.entry.name, settings, self.plugin.revision),
            threat=threat,
            n=self.entry.n or min(data.test or DEFAULT_N, available),
            seed=train.seed,
            weights=weights,
            split=data.split,
            needs=(train.key,),
        )

    def _shards(self, whole: EvaluateJob) -> list[ShardJob]:
        """The evaluation in ranges of whole blocks, so that its result does not depend on the number of shards."""
        shards = self.entry.shards or 1
        if shards == 1:
            return []
        block = whole.attack.settings.get("block_size") or self.plugin.constant("block", 500)
        blocks = -(-whole.n // block)
        if shards > blocks:
            adjustable = any(field.name == "block_size" for field in self.plugin.fields)
            raise ValueError(
                f"attacks {self.entry.name} shards is {shards}, but its {counted(whole.n, 'image')} are in "
                f"{counted(blocks, 'block')} of at most {block}, and a shard holds at least one"
                + ("; a smaller block_size makes more of them" if adjustable else "")
            )
        edges = [min(whole.n, block * (blocks * k // shards)) for k in range(shards + 1)]
        return [shard_of(whole, first, last) for first, last in itertools.pairwise(edges)]


def threats(spec: Spec, train: ModelJob) -> list[JobThreat]:
    """What a model is attacked under: every eps of the spec, or with `train_eps: each` the one it was trained at."""
    every = [JobThreat(spec.threat.norm, str(eps)) for eps in spec.threat.eps]
    if spec.threat.train_eps != EACH:
        return every
    return [threat for threat in every if threat == train.threat] or every


def shard_of(whole: EvaluateJob, first: int, last: int) -> ShardJob:
    """The part of an evaluation that covers the images [first, last)."""
    names = [field.name for field in dataclasses.fields(whole) if field.init and field.name != "parts"]
    return ShardJob(images=(first, last), **{name: getattr(whole, name) for name in names})


def transfer_sources(spec: Spec) -> list[str]:
    """Attacks whose images the spec's transfer attacks use. Raises ValueError for an attack that makes none."""
    transfers = [entry for entry in spec.attacks if catalog.get("attacks", entry.name).needs_images]
    found = dict.fromkeys(
        catalog.get("attacks", entry.name).resolve(chosen, "attacks ")["source"]
        for entry in transfers
        for chosen in entry.combinations()
    )
    for name in found:
        source = catalog.get("attacks", name)
        if not source.uses_threat or source.needs_images or source.constant("metric", ""):
            raise ValueError(
                f"transfer.source is {name}, which makes no adversarial images; expected an attack such as pgd"
            )
    return list(found)


def audits(spec: Spec, facts: datasets.Facts, train: ModelJob, jobs: Sequence[Job]) -> list[AuditJob]:
    """The soundness checks of a training: one audit of the model, one of the images that `jobs` made against it."""
    budgets = tuple(threat for threat in threats(spec, train) if float(Epsilon(threat.eps)) > 0)
    own = [job for job in jobs if isinstance(job, EvaluateJob) and job.model_key == train.key and job.threat]
    if spec.checks == "off" or spec.data.split == "validation" or not budgets or not own:
        return []
    made = []
    for weights in _weights(train):
        of_model = AuditJob(
            engine=IMPORT_AUDIT_REVISION if isinstance(train, ImportJob) else AUDIT_REVISION,
            part="model",
            level=spec.checks,
            threats=budgets,
            weights=weights,
            n=min(AUDITED[spec.checks], spec.data.test or facts.test),
            seed=train.seed,
            needs=(train.key,),
        )
        evaluated = [job for job in own if job.weights == weights]
        most = max(job.n for job in evaluated)  # whole blocks are checked, as they were attacked
        keys = sorted(job.key for job in evaluated)
        made += [of_model, replace(of_model, engine=AUDIT_REVISION, part="images", n=most, needs=(train.key, *keys))]
    return made


def predictor_of(train: ModelJob) -> str:
    """The kind of model that a training gives: deterministic, randomised or smoothed."""
    if isinstance(train, ImportJob):
        return "randomised" if train.randomized else "deterministic"
    return catalog.get("defenses", train.defense.name).predictor


def _weights(train: ModelJob) -> tuple[str, ...]:
    return ("last", "best") if train.training.get("keep") == "best" else ("last",)
