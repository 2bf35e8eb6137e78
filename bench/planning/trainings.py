"""The trainings that the defenses of a spec ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.core.epsilon import parse_eps
from bench.data import datasets
from bench.planning import catalog
from bench.planning.job import TrainJob
from bench.planning.job_fields import DataChoice, JobThreat, PluginChoice
from bench.planning.recipes import check_recipe, recipe
from bench.planning.spec import EACH, DefenseSpec, ModelSpec, Spec, TrainEps

# raised when the results of the training code may change; a changed comment must not invalidate a week of training
TRAIN_REVISION = 1


@dataclass(frozen=True)
class PlannedDefense:
    """One defense of a spec on its data set, and the trainings that it asks for."""

    spec: Spec
    facts: datasets.Facts
    entry: DefenseSpec

    @property
    def plugin(self) -> catalog.Plugin:
        """What the defense's file declares."""
        return catalog.get("defenses", self.entry.name)

    def trainings(self, model: ModelSpec, seed: int) -> list[TrainJob]:
        """One job for each combination of settings and each `train_eps`. Raises LookupError or ValueError."""
        threat = self.spec.threat
        shared = threat.eps if threat.train_eps == EACH and self.plugin.uses_threat else [threat.train_eps]
        budgets: Sequence[TrainEps | None] = self.entry.train_eps or shared
        chosen = self.entry.combinations()
        return [self._job(model, settings, train_eps, seed) for settings in chosen for train_eps in budgets]

    def _job(self, model: ModelSpec, chosen: dict[str, Any], train_eps: TrainEps | None, seed: int) -> TrainJob:
        spec, architecture = self.spec, catalog.get("models", model.name)
        training = recipe(spec, self.facts, model.name, self.plugin.constant("recipe", {}))
        settings = self.plugin.resolve(chosen, "defenses ")
        base = [settings["base"]["name"]] if isinstance(settings.get("base"), dict) else []
        check_recipe(spec, training, [self.entry.name, *base])
        threat = self._threat(train_eps)
        return TrainJob(
            engine=TRAIN_REVISION,
            data=images(self.facts, spec.data.train, spec.data.validation),
            model=PluginChoice(model.name, architecture.resolve(model.set, "models "), architecture.revision),
            defense=PluginChoice(self.entry.name, settings, self.plugin.revision),
            threat=threat,
            recipe=spec.recipe,
            training=training if threat else {**training, "eps_warmup": 0.0},
            seed=seed,
        )

    def _threat(self, train_eps: TrainEps | None) -> JobThreat | None:
        """The threat to train against: at `train_eps`, or else at the largest eps of the attacks."""
        norm, norms = self.spec.threat.norm, self.plugin.norms
        if not self.plugin.uses_threat:
            return None
        if norm not in norms:
            raise ValueError(f"defense {self.entry.name} has no {norm} version; its norms: {', '.join(norms)}")
        eps = train_eps if train_eps is not None else self.spec.threat.eps[-1]
        return JobThreat(norm, str(parse_eps(eps, norm)))


def images(facts: datasets.Facts, train: int | None, validation: int) -> DataChoice:
    """The images of a job: those of a folder are identified by their content, those of a known data set by its name."""
    return DataChoice(facts.name, train or facts.train, validation, facts.size, facts.content or None)
