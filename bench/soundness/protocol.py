"""How a row was evaluated: worst case, images, seeds, budget, what was chosen by which images, adaptive attacks."""

from __future__ import annotations

import re
from collections.abc import Callable

from bench.data import datasets
from bench.planning import catalog
from bench.planning.job import ImportJob
from bench.results.facts import draws_of
from bench.soundness.checks import Finding
from bench.soundness.evidence import Attacked, Evidence
from bench.soundness.symptoms import not_checked

ENOUGH, SEEDS = 1000, 3  # C22, C23
FLOOR = 250.0  # C24: gradient steps of PGD-50 with 5 restarts
CLOSED_FORM = "closed_form"  # it climbs the expectation itself
_ATTACKS = re.compile(r"[a-z0-9_]+(, [a-z0-9_]+)*")


def noise_averaged(e: Evidence) -> list[Finding]:
    """C1 of a model that declares noise: some attack averages over draws, and many draws judge its images.

    AutoAttack runs its suite `rand` against noise, which averages 20 gradients.
    """
    if e.row.deploys == "deterministic":
        return []
    if not e.attacks or not e.in_headline:
        return [Finding("C1", "n/a", note="noise is declared, and no headline rests on it")]
    averaged = [a for a in e.attacks if a.name == CLOSED_FORM or draws_of(a.name, a.settings) > 1]
    if not averaged:
        note = "noise at test time, and no attack averages over it (autoattack, closed_form, eot with several draws)"
        return [Finding("C1", "U", note=note)]
    voted = [attack.label for attack in averaged if attack.voted]
    if not voted:
        return [not_checked("C1", "attacks average over noise, but no fresh draws judge their images")]
    return [Finding("C1", "I", note=f"randomized: {', '.join(voted)}, judged by fresh draws")]


def worst_case_named(e: Evidence) -> list[Finding]:
    """C21: what the headline is the minimum of."""
    if e.seed not in e.row.keys:
        return [Finding("C21", "n/a", note="no worst case")]
    names = ", ".join(attack.label for attack in e.attacks)
    return [Finding("C21", "ok", len(e.attacks), note=f"minimum per image over clean, {names}")]


def enough_data(e: Evidence) -> list[Finding]:
    """C22: the headline rests on 1000 images, or on the whole test set."""
    facts = datasets.KNOWN.get(e.row.dataset)
    needed = min(ENOUGH, facts.test) if facts else ENOUGH
    n = e.row.worst.n
    if not e.row.worst.values:
        return [Finding("C22", "n/a", note="no worst case")]
    return [Finding("C22", "I" if n < needed else "ok", n, needed, f"quick: {n} images" if n < needed else "")]


def several_seeds(e: Evidence) -> list[Finding]:
    """C23: three trainings before a difference is claimed."""
    count = len(e.row.worst.values)
    note = f"{count} seed{'' if count == 1 else 's'}" if count < SEEDS else ""
    return [Finding("C23", "I" if note else "ok", count, SEEDS, note)]


def budget_floor(e: Evidence) -> list[Finding]:
    """C24: AutoAttack standard, or as many gradient steps as PGD-50 with 5 restarts, on what still stands."""
    suites = [a for a in e.attacks if {"apgd-t", "square"} <= set(a.suite)]
    worst = e.worst()
    if worst is None or not e.in_headline:
        return [Finding("C24", "n/a", note="not attacked, or not in the headline")]
    if suites or not worst.right.any():
        return [Finding("C24", "ok", note=suites[0].label if suites else "no image is left to attack")]
    most = max((_steps(a) for a in e.of_kind("gradients")), default=0.0)
    note = f"at most {most:g} gradient steps an image, and no AutoAttack standard" if most < FLOOR else ""
    return [Finding("C24", "F" if note else "ok", most, FLOOR, note)]


def _steps(attack: Attacked) -> float:
    """Gradient steps that an unbroken image gets: by the attack's settings, or the mean number of backward passes."""
    by_settings = float(attack.settings.get("steps", 0)) * float(attack.settings.get("restarts", 1))
    stored = float(attack.entry.backwards)
    return max(by_settings, 0.0 if stored != stored else stored)  # NaN: no count stored


def no_peeking(e: Evidence) -> list[Finding]:
    """C27: an epoch is chosen by validation images with a stored hash, which are not those it is judged on."""
    if isinstance(e.train, ImportJob):
        return [not_checked("C27", "how this checkpoint was chosen is not known")]
    if e.weights == "last":
        return [Finding("C27", "ok", note="last weights: nothing was chosen")]
    chosen = e.trained.get("validation_hash")
    if not chosen or not e.train.data.validation:
        return [Finding("C27", "U", note="weights were chosen, and no hash of validation images is stored")]
    if chosen in {entry.test_hash for by in e.row.entries.values() for entry in by.values()}:
        return [Finding("C27", "U", note=f"weights were chosen on the images they are judged on ({chosen})")]
    return [Finding("C27", "ok", note=f"chosen on validation images {chosen}")]


def adaptive_attack(e: Evidence) -> list[Finding]:
    """C28: each defense names the attack adapted to it, which was run, or says why a standard one is adaptive."""
    if not e.attacks or not e.in_headline:
        return [Finding("C28", "n/a", note="not attacked, or not in the headline")]
    defense = e.train.defense
    base = defense.settings.get("base")
    notes: list[str] = []
    for name in [defense.name, *([base["name"]] if isinstance(base, dict) else [])]:
        try:
            says = str(catalog.get("defenses", name).constant("adaptive_attacks", ""))
        except (LookupError, ValueError):  # the plug-in is gone
            return [not_checked("C28", f"no file of defense {name} to ask")]
        if not says:
            return [Finding("C28", "F", note=f"missing: defense {name} names no adaptive attack and no reason")]
        if not _ATTACKS.fullmatch(says):
            notes.append(f"argued: {says}")
            continue
        run = [a.label for a in e.attacks if a.name in says.split(", ")]
        if not run:
            return [Finding("C28", "F", note=f"missing: {' or '.join(says.split(', '))} was not run")]
        notes.append(f"yes: {', '.join(run)}")
    return [Finding("C28", "ok", note="; ".join(dict.fromkeys(notes)))]


PROTOCOL: tuple[Callable[[Evidence], list[Finding]], ...] = (
    *(noise_averaged, worst_case_named, enough_data, several_seeds, budget_floor, no_peeking, adaptive_attack),
)
