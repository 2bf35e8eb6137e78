"""spec -> jobs. Pure: equal content gives equal keys, so specs share work and resuming means "no record yet"."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.core.epsilon import Epsilon, parse_eps
from bench.data import datasets
from bench.planning import catalog, evaluations
from bench.planning.job import Job, TrainJob
from bench.planning.job_fields import DataChoice, JobThreat, PluginChoice
from bench.planning.spec import AttackSpec, DefenseSpec, ModelSpec, Spec, recipe

# raised when the engine's results may change; a changed comment must not throw away a GPU-week
TRAIN_REVISION = 1


def plan(spec: Spec, root: Path) -> list[Job]:
    """All jobs of a spec, each after what it needs. Raises LookupError or ValueError in one line."""
    facts = datasets.facts(spec.data.name, root, spec.data.size)
    check_counts(spec, facts)
    _check_certificates(spec)
    for entry in spec.attacks:
        evaluations.check_norm(spec, entry.name)
    jobs: dict[str, Job] = {}
    # seed by seed: the whole matrix is done for the first seed before any of it is repeated
    for place, seed in enumerate(spec.seeds):
        for model in spec.models or [ModelSpec(name=facts.default_model)]:
            jobs.update((job.key, job) for job in _group(spec, facts, model, seed, place))
    return list(jobs.values())


def _group(spec: Spec, facts: datasets.Facts, model: ModelSpec, seed: int, place: int) -> Iterator[Job]:
    """All jobs of one architecture and seed: the rows that are evaluated on each other's adversarial images."""
    attacks = [entry for entry in spec.attacks if entry.seeds is None or place < entry.seeds]
    trains = list({job.key: job for job in _trainings(spec, facts, model, seed)}.values())
    made: list[Job] = []
    for train in trains:
        own = [job for entry in attacks for job in evaluations.evaluations(spec, facts, entry, train)]
        made += own
        yield train
        yield from own
    transfers = [entry for entry in attacks if evaluations.needs_images(entry.name)]
    if transfers:
        extra = list(_transfer_sources(spec, facts, model, seed, trains))
        yield from extra
        for entry in transfers:
            found = evaluations.transfers(spec, facts, entry, trains, [*made, *extra])
            if not found:
                raise ValueError(
                    f"attack {entry.name} evaluates each row on images made against other rows, but the only row is "
                    f"{trains[0].defense.name}; add a defense, or leave {entry.name} out"
                )
            made += found
            yield from found
    for train in trains:
        yield from evaluations.audits(spec, facts, train, made)


def _trainings(spec: Spec, facts: datasets.Facts, model: ModelSpec, seed: int) -> Iterator[TrainJob]:
    for entry in spec.defenses:
        budgets: list[Epsilon | None] = list(entry.train_eps or []) or [spec.threat.train_eps]
        for chosen, train_eps in itertools.product(evaluations.combinations(entry), budgets):
            yield _train_job(spec, facts, model, entry, chosen, train_eps, seed)


def _transfer_sources(
    spec: Spec, facts: datasets.Facts, model: ModelSpec, seed: int, trains: list[TrainJob]
) -> Iterator[Job]:
    """What `transfer` needs beside the matrix: the undefended baseline, and attacks that the spec does not list."""
    lacking = [AttackSpec(name=name) for name in evaluations.sources_of(spec)]
    for train in trains:
        for entry in lacking:
            yield from evaluations.evaluations(spec, facts, entry, train)
    if not any(train.defense.name == evaluations.BASELINE for train in trains):
        baseline = _train_job(spec, facts, model, DefenseSpec(name=evaluations.BASELINE), {}, None, seed)
        yield baseline
        for name in evaluations.all_sources(spec):
            for entry in [e for e in spec.attacks if e.name == name] or [AttackSpec(name=name)]:
                yield from evaluations.evaluations(spec, facts, entry, baseline)


def check_counts(spec: Spec, facts: datasets.Facts) -> None:
    """Raise ValueError, in one line, where the spec asks for more images than there are."""
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
    """For each attack that does not apply to every kind of model, the defenses it does not apply to."""
    names = dict.fromkeys(attack.name for attack in spec.attacks)
    defenses = dict.fromkeys(d.name for d in spec.defenses)
    others = {name: [d for d in defenses if not evaluations.exists(name, _deploys(d))] for name in names}
    return {name: found for name, found in others.items() if found}


def _check_certificates(spec: Spec) -> None:
    for attack, others in without_cell(spec).items():
        if len(others) == len({defense.name for defense in spec.defenses}):
            wanted = " or ".join(evaluations.wants(attack))
            raise ValueError(
                f"attack {attack} needs a {wanted} defense, found only {', '.join(others)}; "
                f"add one such as smoothing, or leave {attack} out"
            )


def _deploys(defense: str) -> str:
    return str(catalog.get("defenses", defense).constant("predictor", "deterministic"))


def _train_job(
    spec: Spec,
    facts: datasets.Facts,
    model: ModelSpec,
    entry: DefenseSpec,
    chosen: dict[str, Any],
    train_eps: Epsilon | None,
    seed: int,
) -> TrainJob:
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
        threat = JobThreat(spec.threat.norm, str(eps))
    return TrainJob(
        engine=TRAIN_REVISION,
        data=images(facts, spec.data.train, spec.data.validation),
        model=PluginChoice(
            model.name, architecture.resolve(model.set, "models "), architecture.constant("revision", 1)
        ),
        defense=PluginChoice(entry.name, settings, defense.constant("revision", 1)),
        threat=threat,
        recipe=spec.recipe,
        training=training if uses_threat else {**training, "eps_warmup": 0.0},
        seed=seed,
    )


def images(facts: datasets.Facts, train: int | None, validation: int) -> DataChoice:
    """The images of a job: those of a folder are identified by their content, those of a known data set by its name."""
    return DataChoice(facts.name, train or facts.train, validation, facts.size, facts.content or None)


def _base(settings: dict[str, Any]) -> list[str]:
    """The defense that another one is built around, if there is one."""
    return [settings["base"]["name"]] if isinstance(settings.get("base"), dict) else []


def _check_training(spec: Spec, training: dict[str, Any], defenses: list[str]) -> None:
    """Raise ValueError for a recipe setting that a defense ignores, and for `keep: best` without validation images."""
    asked = {"label_smoothing": "label_smoothing" in training, training.get("precision", "fp32"): True}
    for name in defenses:
        for wanted in (w for w, on in asked.items() if on and w != "fp32"):
            if wanted not in catalog.get("defenses", name).constant("supports_recipe", ()):
                setting = "precision" if wanted in ("bf16", "fp16") else wanted
                raise ValueError(
                    f"defense {name} does not take part in train.{setting}={training[setting]}; leave that setting "
                    "out, or run this defense without it"
                )
    if training.get("keep") == "best" and not spec.data.validation:
        raise ValueError(
            "train.keep is best, but data.validation is 0; expected images to choose by, such as --validation 1000"
        )


def duplicates(spec: Spec) -> list[str]:
    """One line that counts the entries a spec repeats; empty where there are none. Raises what plug-ins raise."""
    lists = {
        "defenses": [text for entry in spec.defenses for text in _entries("defenses", entry)],
        "attacks": [text for entry in spec.attacks for text in _entries("attacks", entry)],
        "models": [_text(m.name, catalog.get("models", m.name).resolve(m.set, "models ")) for m in spec.models or ()],
        "seeds": [str(seed) for seed in spec.seeds],
    }
    repeated = [_counted(name, listed) for name, listed in lists.items() if len(set(listed)) < len(listed)]
    return [f"{' and '.join(repeated)} repeat another; each is done once"] if repeated else []


def _counted(name: str, listed: Sequence[str]) -> str:
    return f"{len(listed) - len(set(listed))} of {len(listed)} {name}"


def _entries(kind: catalog.Kind, entry: DefenseSpec | AttackSpec) -> list[str]:
    """Each combination of an entry as text, with every default resolved: equal where the jobs are."""
    plugin, own = catalog.get(kind, entry.name), entry.model_dump(mode="json", exclude={"set", "grid", "shards"})
    return [_text(own, plugin.resolve(chosen, f"{kind} ")) for chosen in evaluations.combinations(entry)]


def _text(*parts: object) -> str:
    return json.dumps(parts, sort_keys=True, default=str)
