"""How a row was evaluated: worst case, images, seeds, attack steps, selection of weights, adaptive attacks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from bench.planning import catalog
from bench.planning.job import ImportJob
from bench.results.facts import draws_of
from bench.results.provisional import images_to_rank
from bench.soundness.checks import Check, Finding, NotApplicable, NotMeasured
from bench.soundness.evidence import Attacked, Evidence
from bench.terminal import counted

CLOSED_FORM = "closed_form"  # it follows the gradient of the expectation itself
_ATTACKS = re.compile(r"[a-z0-9_]+(, [a-z0-9_]+)*")


def noise_averaged(check: Check, e: Evidence) -> Iterator[Finding]:
    """C1 of a stochastic model: some attack averages over draws, and many draws evaluate its images.

    AutoAttack runs its suite `rand` on a stochastic model, which averages 20 gradients.
    """
    if e.row.deploys == "deterministic":
        return
    if not e.attacks or not e.in_headline:
        raise NotApplicable("declared stochastic, and not in the worst case")
    averaged = [a for a in e.attacks if a.name == CLOSED_FORM or draws_of(a.name, a.settings) > 1]
    voted = [attack.label for attack in averaged if attack.voted]
    if not averaged:
        yield check.failed("no attack averages over the noise (autoattack, closed_form, eot with several draws)")
    elif voted:
        yield Finding(check.code, "I", note=f"stochastic: {', '.join(voted)}, evaluated on fresh draws")
    else:
        raise NotMeasured("attacks average over noise, but no fresh draws evaluate their images")


def worst_case_named(check: Check, e: Evidence) -> Iterator[Finding]:
    """C21: the attacks of which the headline is the minimum."""
    if e.seed not in e.row.provenance.keys:
        raise NotApplicable("no worst case")
    names = ", ".join(attack.label for attack in e.attacks)
    yield Finding(check.code, "ok", len(e.attacks), note=f"minimum per image over clean, {names}")


def enough_data(check: Check, e: Evidence) -> Iterator[Finding]:
    """C22: the headline is measured on enough images, or on the whole test set."""
    if not e.row.accuracy.worst.values:
        raise NotApplicable("no worst case")
    n = e.row.accuracy.worst.n
    enough = replace(check, limits={"I": images_to_rank(e.row.dataset)})
    yield enough.finding(n, failure=f"quick: {counted(n, 'image')}")


def several_seeds(check: Check, e: Evidence) -> Iterator[Finding]:
    """C23: enough trainings for a claim of difference."""
    count = len(e.row.accuracy.worst.values)
    yield check.finding(count, failure=counted(count, "seed"))


def budget_floor(check: Check, e: Evidence) -> Iterator[Finding]:
    """C24: AutoAttack standard or enough gradient steps on the images that are still robust."""
    worst = e.worst()
    if worst is None or not e.in_headline:
        raise NotApplicable("not attacked, or not in the worst case")
    suites = [a.label for a in e.attacks if {"apgd-t", "square"} <= set(a.suite)]
    if suites or not worst.correct.any():
        yield Finding(check.code, "ok", note=suites[0] if suites else "no image is robust")
        return
    most = max((_steps(a) for a in e.of_kind("gradients")), default=0.0)
    yield check.finding(most, failure=f"at most {counted(most, 'gradient step')} an image, and no AutoAttack standard")


def _steps(attack: Attacked) -> float:
    """Gradient steps on a robust image: by the attack's settings, or the mean number of backward passes."""
    by_settings = float(attack.settings.get("steps", 0)) * float(attack.settings.get("restarts", 1))
    stored = float(attack.entry.backwards)
    return max(by_settings, 0.0 if stored != stored else stored)  # NaN: no count stored


def no_peeking(check: Check, e: Evidence) -> Iterator[Finding]:
    """C27: an epoch is chosen on validation images with a stored hash, which are not those of the evaluation."""
    chosen = e.trained.validation_hash
    if isinstance(e.train, ImportJob):
        raise NotMeasured("how this checkpoint was chosen is not known")
    if e.weights == "last":
        yield Finding(check.code, "ok", note="last weights: nothing was chosen")
    elif not chosen or not e.train.data.validation:
        yield check.failed("weights were chosen, and no hash of validation images is stored")
    elif chosen in {entry.test_hash for entry in e.row.evaluations}:
        yield check.failed(f"weights were chosen on the images of the evaluation ({chosen})")
    else:
        yield Finding(check.code, "ok", note=f"chosen on validation images {chosen}")


def adaptive_attack(check: Check, e: Evidence) -> Iterator[Finding]:
    """C28: each defense names its adaptive attack, which was run, or the reason why a standard one is adaptive."""
    if not e.attacks or not e.in_headline:
        raise NotApplicable("not attacked, or not in the worst case")
    defense = e.train.defense
    base = defense.settings.get("base")
    notes: list[str] = []
    for name in [defense.name, *([base["name"]] if isinstance(base, dict) else [])]:
        plugin = catalog.find("defenses", name)
        if plugin is None:
            raise NotMeasured(f"the file of defense {name} is missing")
        named = str(plugin.constant("adaptive_attacks", ""))
        run = [a.label for a in e.attacks if a.name in named.split(", ")]
        if not named:
            yield check.failed(f"missing: defense {name} names no adaptive attack and no reason")
            return
        if not _ATTACKS.fullmatch(named):
            notes.append(f"argued: {named}")
        elif run:
            notes.append(f"yes: {', '.join(run)}")
        else:
            yield check.failed(f"missing: {' or '.join(named.split(', '))} was not run")
            return
    yield Finding(check.code, "ok", note="; ".join(dict.fromkeys(notes)))


def memory_excluded(check: Check, e: Evidence) -> Iterator[Finding]:
    """C30 without an audit that has it: bench's own trainings see no test image, an imported model may hold them."""
    if not isinstance(e.train, ImportJob):
        raise NotApplicable("bench trained the model, without test images")
    raise NotMeasured("no audit on images beyond the test set: the same `bench eval` again makes one")


PROTOCOL: dict[str, Callable[[Check, Evidence], Iterator[Finding]]] = {
    "C1": noise_averaged,
    "C21": worst_case_named,
    "C22": enough_data,
    "C23": several_seeds,
    "C24": budget_floor,
    "C27": no_peeking,
    "C28": adaptive_attack,
    "C30": memory_excluded,
}
