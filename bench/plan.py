"""spec -> jobs. Pure: equal content gives equal keys, so specs share work and resuming means "no record yet"."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import catalog, datasets
from bench.core.numbers import Number, parse_eps
from bench.spec import AttackSpec, DefenseSpec, ModelSpec, Spec, recipe

SCHEMA = 1
# raised when the engine's results may change; a changed comment must not throw away a GPU-week
TRAIN_REVISION, EVALUATE_REVISION = 1, 1


@dataclass(frozen=True)
class Job:
    """One unit of work. `what` has every default resolved and is all that the result depends on beside `needs`."""

    kind: str
    what: dict[str, Any]
    needs: tuple[str, ...] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps([SCHEMA, self.kind, self.what, self.needs], sort_keys=True, separators=(",", ":"))
        object.__setattr__(self, "key", hashlib.sha256(text.encode()).hexdigest()[:12])

    def to_json(self) -> dict[str, Any]:
        """What job.json holds."""
        return {"schema": SCHEMA, "key": self.key, "kind": self.kind, "what": self.what, "needs": list(self.needs)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """Rebuild a job. Raises ValueError where content and key disagree or the schema is newer than this code."""
        if values.get("schema") != SCHEMA:
            raise ValueError(f"job has schema {values.get('schema')}, this version reads {SCHEMA}")
        job = cls(values["kind"], values["what"], tuple(values["needs"]))
        if job.key != values["key"]:
            raise ValueError(f"job {values['key']} was changed: its content hashes to {job.key}")
        return job


def plan(spec: Spec, root: Path) -> list[Job]:
    """All jobs of a spec, each training before its evaluations. Raises LookupError or ValueError in one line."""
    facts = datasets.facts(spec.data.name, root, spec.data.size)
    _check_counts(spec, facts)
    _check_certificates(spec)
    jobs: dict[str, Job] = {}
    models = spec.models or [ModelSpec(name=facts.default_model)]
    # seed by seed: the whole matrix stands once before any of it is repeated
    for (place, seed), model, entry in itertools.product(enumerate(spec.seeds), models, spec.defenses):
        budgets: list[Number | None] = list(entry.train_eps or []) or [spec.threat.train_eps]
        for chosen, train_eps in itertools.product(_combinations(entry), budgets):
            train = _train_job(spec, facts, model, entry, chosen, train_eps, seed)
            jobs[train.key] = train
            for attack in spec.attacks:
                if attack.seeds is None or place < attack.seeds:
                    for job in _evaluate_jobs(spec, facts, attack, train):
                        jobs[job.key] = job
    return list(jobs.values())


def _check_counts(spec: Spec, facts: datasets.Facts) -> None:
    if spec.data.test is not None and spec.data.test > facts.test:
        raise ValueError(f"data.test is {spec.data.test}, but the test set of {facts.name} has {facts.test} images")
    held = "test set" if spec.data.split == "test" else "validation split"
    there = facts.test if spec.data.split == "test" else spec.data.validation
    if spec.data.split == "validation" and len(spec.seeds) > 1:
        raise ValueError(f"data.split is validation, whose images depend on the seed; expected one, got {spec.seeds}")
    if there == 0:
        raise ValueError("data.split is validation, but data.validation is 0; expected a number of images to hold out")
    for attack in spec.attacks:
        if attack.n is not None and attack.n > there:
            raise ValueError(
                f"attacks {attack.name} n is {attack.n}, but the {held} of {facts.name} has {there} images"
            )
    train = spec.data.train or facts.train
    if train > facts.train:
        raise ValueError(f"data.train is {train}, but {facts.name} has {facts.train} training images")
    if spec.data.validation >= train:
        raise ValueError(f"data.validation is {spec.data.validation}; expected less than the {train} training images")


def without_cell(spec: Spec) -> dict[str, list[str]]:
    """For each attack that asks for a smoothed model the defenses that deploy none: these cells do not exist."""
    others = [name for name in dict.fromkeys(d.name for d in spec.defenses) if not _smoothed(name)]
    names = dict.fromkeys(attack.name for attack in spec.attacks)
    return {name: others for name in names if others and _needs_smoothed(name)}


def _check_certificates(spec: Spec) -> None:
    for attack, others in without_cell(spec).items():
        if len(others) == len({defense.name for defense in spec.defenses}):
            raise ValueError(
                f"attack {attack} needs a smoothed defense, found only {', '.join(others)}; "
                f"add one such as smoothing, or leave {attack} out"
            )


def _smoothed(defense: str) -> bool:
    return bool(catalog.get("defenses", defense).constant("deploys", "deterministic") == "smoothed")


def _needs_smoothed(attack: str) -> bool:
    return bool(catalog.get("attacks", attack).constant("needs_smoothed", False))


def _combinations(entry: DefenseSpec | AttackSpec) -> list[dict[str, Any]]:
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


def _train_job(
    spec: Spec,
    facts: datasets.Facts,
    model: ModelSpec,
    entry: DefenseSpec,
    chosen: dict[str, Any],
    train_eps: Number | None,
    seed: int,
) -> Job:
    defense, architecture = catalog.get("defenses", entry.name), catalog.get("models", model.name)
    uses_threat = defense.constant("uses_threat", True)
    training = recipe(spec, facts, model.name, defense.constant("recipe", {}))
    settings = defense.resolve(chosen, "defenses ")
    _check_training(spec, training, [entry.name, *_base(settings)])
    threat = None
    if uses_threat:
        norms = defense.constant("norms", ("Linf", "L2", "L1"))
        if spec.threat.norm not in norms:
            raise ValueError(f"defense {entry.name} has no {spec.threat.norm} version; its norms: {', '.join(norms)}")
        eps = parse_eps(train_eps if train_eps is not None else spec.threat.eps[-1], spec.threat.norm)
        threat = {"norm": spec.threat.norm, "eps": str(eps)}
    return Job(
        "train",
        {
            "engine": TRAIN_REVISION,
            "data": {
                "name": facts.name,
                "train": spec.data.train or facts.train,
                "validation": spec.data.validation,
                "size": facts.size,
            },
            "model": {
                "name": model.name,
                "set": architecture.resolve(model.set, "models "),
                "revision": architecture.constant("revision", 1),
            },
            "defense": {
                "name": entry.name,
                "set": settings,
                "revision": defense.constant("revision", 1),
            },
            "threat": threat,
            "recipe": spec.recipe,
            "train": training if uses_threat else {**training, "eps_warmup": 0.0},
            "seed": seed,
        },
    )


def _base(settings: dict[str, Any]) -> list[str]:
    """The defense that another one is built around, if there is one."""
    return [settings["base"]["name"]] if isinstance(settings.get("base"), dict) else []


def _check_training(spec: Spec, training: dict[str, Any], defenses: list[str]) -> None:
    """Refuse a recipe that a defense would quietly not follow, and a choice by validation without images for it."""
    asked = {"label_smoothing": "label_smoothing" in training, training.get("precision", "fp32"): True}
    for name in defenses:
        for wanted in (w for w, on in asked.items() if on and w != "fp32"):
            if wanted not in catalog.get("defenses", name).constant("honours", ()):
                setting = "precision" if wanted in ("bf16", "fp16") else wanted
                raise ValueError(
                    f"defense {name} does not take part in train.{setting}={training[setting]}; leave that setting "
                    "out, or run this defense without it"
                )
    if training.get("keep") == "best" and not spec.data.validation:
        raise ValueError(
            "train.keep is best, but data.validation is 0; expected images to choose by, such as --validation 1000"
        )


def _evaluate_jobs(spec: Spec, facts: datasets.Facts, entry: AttackSpec, train: Job) -> list[Job]:
    """One job a budget and kind of weights; none where the planner already knows that the cell does not exist."""
    attack = catalog.get("attacks", entry.name)
    norms = attack.constant("norms", ("Linf", "L2", "L1"))
    uses_threat = attack.constant("uses_threat", True)
    if uses_threat and spec.threat.norm not in norms:
        raise ValueError(f"attack {entry.name} has no {spec.threat.norm} version; its norms: {', '.join(norms)}")
    if _needs_smoothed(entry.name) and not _smoothed(train.what["defense"]["name"]):
        return []
    budgets: list[dict[str, str] | None] = [None]
    if uses_threat:
        budgets = [{"norm": spec.threat.norm, "eps": str(eps)} for eps in spec.threat.eps]
    held_out = spec.data.split == "validation"
    there = spec.data.validation if held_out else facts.test
    return [
        Job(
            "evaluate",
            {
                "engine": EVALUATE_REVISION,
                "attack": {
                    "name": entry.name,
                    "set": attack.resolve(chosen, "attacks "),
                    "revision": attack.constant("revision", 1),
                },
                "threat": threat,
                "n": entry.n or min(spec.data.test or there, there),
                "seed": train.what["seed"],
                "weights": weights,
                **({"split": "validation"} if held_out else {}),
            },
            (train.key,),
        )
        for weights in (("last", "best") if train.what["train"].get("keep") == "best" else ("last",))
        for chosen in _combinations(entry)
        for threat in budgets
    ]
