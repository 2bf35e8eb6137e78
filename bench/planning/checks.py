"""What is wrong with a spec as a whole, found before anything is trained; and entries that it repeats."""

from __future__ import annotations

import json
from typing import Any

from bench.data import datasets
from bench.planning import catalog
from bench.planning.spec import Spec
from bench.terminal import counted


def check_spec(spec: Spec, facts: datasets.Facts) -> None:
    """Raise LookupError or ValueError, in one line, for a spec whose jobs cannot all be planned."""
    check_counts(spec, facts)
    for attack, (wanted, others) in inapplicable(spec).items():
        if len(others) == len({defense.name for defense in spec.defenses}):
            raise ValueError(
                f"attack {attack} needs a {wanted} defense, found only {', '.join(others)}; "
                f"add one such as smoothing, or leave {attack} out"
            )
    norms = {entry.name: catalog.get("attacks", entry.name).norms for entry in spec.attacks}
    for name, own in norms.items():
        if spec.threat.norm not in own:
            fit = [other for other, supported in norms.items() if spec.threat.norm in supported]
            advice = f"; leave it out: {', '.join(fit)} can stay" if fit else ""
            raise ValueError(f"attack {name} has no {spec.threat.norm} version; its norms: {', '.join(own)}{advice}")


def check_counts(spec: Spec, facts: datasets.Facts) -> None:
    """Raise ValueError, in one line, where the spec asks for more images or classes than there are."""
    for attack in spec.attacks:
        for settings in attack.combinations():
            _check_classes(attack.name, settings, facts)
        side = catalog.get("attacks", attack.name).constant("needed_side", {}).get(spec.threat.norm, 1)
        if facts.size < side:
            raise ValueError(
                f"attack {attack.name} in {spec.threat.norm} needs images of at least {side}x{side} pixels, "
                f"{facts.name} has {facts.size}x{facts.size}; leave it out or resize (data.size)"
            )
    data = spec.data
    if data.test is not None and data.test > facts.test:
        raise ValueError(
            f"data.test is {data.test}, but the test set of {facts.name} has {counted(facts.test, 'image')}"
        )
    if data.split == "validation" and len(spec.seeds) > 1:
        raise ValueError(f"data.split is validation, whose images depend on the seed; expected one, got {spec.seeds}")
    if data.split == "validation" and data.validation == 0:
        raise ValueError("data.split is validation, but data.validation is 0; expected a number of images to hold out")
    split, available = ("test set", facts.test) if data.split == "test" else ("validation split", data.validation)
    for attack in spec.attacks:
        if attack.n is not None and attack.n > available:
            raise ValueError(
                f"attacks {attack.name} n is {attack.n}, but the {split} of {facts.name} has "
                f"{counted(available, 'image')}"
            )
    train = data.train or facts.train
    if train > facts.train:
        raise ValueError(f"data.train is {train}, but {facts.name} has {counted(facts.train, 'training image')}")
    if data.validation >= train:
        raise ValueError(
            f"data.validation is {data.validation}; expected less than the {counted(train, 'training image')}"
        )


def _check_classes(name: str, settings: dict[str, Any], facts: datasets.Facts) -> None:
    needed = catalog.get("attacks", name).constant("needed_classes", {})
    for setting, value in settings.items():
        if isinstance(value, dict) and "name" in value:  # an attack inside an attack
            _check_classes(value["name"], value.get("set", {}), facts)
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for part in (each for each in inside if isinstance(each, str)):
            if needed.get(part, 0) > facts.classes:
                raise ValueError(
                    f"attack {name} with {setting} {part} needs {needed[part]} classes, {facts.name} has "
                    f"{facts.classes}; leave it out"
                )


def inapplicable(spec: Spec) -> dict[str, tuple[str, list[str]]]:
    """For each attack that does not apply to every defense: the kind of model it needs, and the other defenses."""
    defenses = {entry.name: catalog.get("defenses", entry.name).predictor for entry in spec.defenses}
    found: dict[str, tuple[str, list[str]]] = {}
    for entry in spec.attacks:
        predictors = catalog.get("attacks", entry.name).predictors
        others = [name for name, predictor in defenses.items() if predictor not in predictors]
        if others:
            found[entry.name] = " or ".join(predictors), others
    return found


def duplicates(spec: Spec) -> list[str]:
    """One line that counts the entries a spec repeats; empty where there are none. Raises what plug-ins raise."""
    lists: dict[str, list[str]] = {"defenses": [], "attacks": [], "models": [], "seeds": [*map(str, spec.seeds)]}
    kinds: tuple[catalog.Kind, ...] = ("defenses", "attacks")
    for kind in kinds:
        for entry in getattr(spec, kind):
            own = entry.model_dump(mode="json", exclude={"set", "grid", "shards"})
            resolved = (catalog.get(kind, entry.name).resolve(each, f"{kind} ") for each in entry.combinations())
            lists[kind] += [json.dumps([own, settings], sort_keys=True) for settings in resolved]
    for model in spec.models or ():
        settings = catalog.get("models", model.name).resolve(model.set, "models ")
        lists["models"].append(json.dumps([model.name, settings], sort_keys=True))
    repeated = [
        f"{len(listed) - len(set(listed))} of {len(listed)} {name}"
        for name, listed in lists.items()
        if len(set(listed)) < len(listed)
    ]
    return [f"{' and '.join(repeated)} repeat another; each is done once"] if repeated else []
