"""The cells of a matrix: evaluations of a training, their shards, transfer between rows, and the soundness audits."""

from __future__ import annotations

import itertools
from typing import Any

from bench.data import datasets
from bench.planning import catalog
from bench.planning.job import Job
from bench.planning.spec import AttackSpec, DefenseSpec, Spec

# Raised when the engine's results may change. Models that draw at test time have a number of their own: since 2 the
# draws that judge an image are apart from those that choose between attacks.
EVALUATE_REVISION, RANDOMISED_REVISION, AUDIT_REVISION = 1, 2, 1
TWIN = "standard"  # the undefended net whose adversarial images every other row is shown
AUDITED = {"quick": 256, "full": 1000}  # images an audit of a model looks at


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


def evaluations(spec: Spec, facts: datasets.Facts, entry: AttackSpec, train: Job) -> list[Job]:
    """One job a budget and kind of weights, before each its shards if it has any.

    None where the planner already knows that the cell does not exist, nor for an attack that works on the images of
    other rows (see `transfers`).
    """
    attack = catalog.get("attacks", entry.name)
    if not exists(entry.name, deploys(train)) or attack.constant("needs_images", False):
        return []
    jobs: list[Job] = []
    for which, chosen, threat in itertools.product(_weights(train), combinations(entry), _budgets(spec, entry)):
        settings = attack.resolve(_with_budgets(spec, attack, chosen), "attacks ")
        whole = _job(spec, facts, entry, train, settings, threat, which)
        shards = _shards(entry, attack, settings, whole)
        jobs += [*shards, Job(whole.kind, whole.what, whole.needs, tuple(shard.key for shard in shards))]
    return jobs


def transfers(spec: Spec, facts: datasets.Facts, entry: AttackSpec, trains: list[Job], jobs: list[Job]) -> list[Job]:
    """For each of `trains` (one model, one seed) the evaluation on what `jobs` made against the others.

    The images of every evaluation of the attack named by the setting `source`, at the same budget, of every other row.
    """
    attack = catalog.get("attacks", entry.name)
    made: list[Job] = []
    for which, chosen, threat in itertools.product(("last", "best"), combinations(entry), _budgets(spec, entry)):
        settings = attack.resolve(chosen, "attacks ")
        for train in (train for train in trains if which in _weights(train)):
            sources = [
                job
                for job in jobs
                if job.kind == "evaluate"
                and job.needs[0] != train.key
                and job.what["attack"]["name"] == settings["source"]
                and job.what["threat"] == threat
                and job.what["weights"] == "last"
            ]
            if sources:
                plain = _job(spec, facts, entry, train, settings, threat, which)
                n = min(plain.what["n"], *(job.what["n"] for job in sources))
                keys = sorted(job.key for job in sources)
                made.append(Job("evaluate", {**plain.what, "n": n}, (train.key, *keys)))
    return made


def all_sources(spec: Spec) -> list[str]:
    """Attacks whose images the spec's transfer attacks use. Raises ValueError for one that makes none."""
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
                f"transfer.source is {name}, which makes no adversarial images of its own; expected pgd, say"
            )
    return list(found)


def sources_of(spec: Spec) -> list[str]:
    """Those of them that the spec does not list itself."""
    return [name for name in all_sources(spec) if name not in {entry.name for entry in spec.attacks}]


def audits(spec: Spec, facts: datasets.Facts, train: Job, jobs: list[Job]) -> list[Job]:
    """The soundness checks of a training: one audit of the model, one of the images that `jobs` made against it."""
    budgets = [{"norm": spec.threat.norm, "eps": str(eps)} for eps in spec.threat.eps if float(eps) > 0]
    own = [job for job in jobs if job.kind == "evaluate" and job.needs[0] == train.key and job.what["threat"]]
    if spec.checks == "off" or spec.data.split == "validation" or not budgets or not own:
        return []
    made = []
    for which in _weights(train):
        what = {
            "engine": AUDIT_REVISION,
            "level": spec.checks,
            "threats": budgets,
            "weights": which,
            "seed": train.what["seed"],
        }
        n = min(AUDITED[spec.checks], spec.data.test or facts.test)
        made.append(Job("audit", {**what, "part": "model", "n": n}, (train.key,)))
        judged = [job for job in own if job.what["weights"] == which]
        most = max(job.what["n"] for job in judged)  # their blocks are judged whole, as they were made
        keys = sorted(job.key for job in judged)
        made.append(Job("audit", {**what, "part": "images", "n": most}, (train.key, *keys)))
    return made


def check_norm(spec: Spec, name: str) -> None:
    """Raise ValueError for an attack that cannot measure in the spec's norm."""
    found = norms(name)
    if spec.threat.norm not in found:
        fit = dict.fromkeys(other.name for other in spec.attacks if spec.threat.norm in norms(other.name))
        advice = f"; leave it out: {', '.join(fit)} can stay" if fit else ""
        raise ValueError(f"attack {name} has no {spec.threat.norm} version; its norms: {', '.join(found)}{advice}")


def norms(name: str) -> tuple[str, ...]:
    """The norms of an attack; all of them for one that has no threat."""
    attack, every = catalog.get("attacks", name), ("Linf", "L2", "L1")
    found: tuple[str, ...] = attack.constant("norms", every) if attack.constant("uses_threat", True) else every
    return found


def deploys(train: Job) -> str:
    """deterministic, randomised or smoothed: what kind of model a training gives."""
    if train.kind == "import":
        return "randomised" if train.what["randomised"] else "deterministic"
    return str(catalog.get("defenses", train.what["defense"]["name"]).constant("predictor", "deterministic"))


def exists(attack: str, kind: str) -> bool:
    """Can this evaluation judge a model of this kind (deterministic, randomised, smoothed) at all?"""
    return kind in wants(attack)


def wants(attack: str) -> tuple[str, ...]:
    """The kinds of models that an evaluation can judge."""
    plugin = catalog.get("attacks", attack)
    if plugin.constant("needs_smoothed", False):
        return ("smoothed",)
    if plugin.constant("needs_draws", False):
        return ("randomised", "smoothed")
    return ("deterministic", "randomised", "smoothed")


def needs_images(attack: str) -> bool:
    """Does this evaluation work on adversarial images that others made?"""
    return bool(catalog.get("attacks", attack).constant("needs_images", False))


def _weights(train: Job) -> tuple[str, ...]:
    return ("last", "best") if train.what["train"].get("keep") == "best" else ("last",)


def _budgets(spec: Spec, entry: AttackSpec) -> list[dict[str, str] | None]:
    attack = catalog.get("attacks", entry.name)
    if not attack.constant("uses_threat", True):
        return [None]
    chosen = spec.threat.eps[-1:] if attack.constant("uses_budgets", False) else spec.threat.eps
    return [{"norm": spec.threat.norm, "eps": str(eps)} for eps in chosen]


def _with_budgets(spec: Spec, attack: catalog.Plugin, chosen: dict[str, Any]) -> dict[str, Any]:
    """All budgets of the spec go into one job of an attack that walks through them."""
    if not attack.constant("uses_budgets", False) or chosen.get("budgets"):
        return chosen
    return {**chosen, "budgets": [str(eps) for eps in spec.threat.eps]}


def _job(
    spec: Spec,
    facts: datasets.Facts,
    entry: AttackSpec,
    train: Job,
    settings: dict[str, Any],
    threat: dict[str, str] | None,
    which: str,
) -> Job:
    held_out = spec.data.split == "validation"
    there = spec.data.validation if held_out else facts.test
    revision = catalog.get("attacks", entry.name).constant("revision", 1)
    what = {
        "engine": EVALUATE_REVISION if deploys(train) == "deterministic" else RANDOMISED_REVISION,
        "attack": {"name": entry.name, "set": settings, "revision": revision},
        "threat": threat,
        "n": entry.n or min(spec.data.test or there, there),
        "seed": train.what["seed"],
        "weights": which,
        **({"split": "validation"} if held_out else {}),
    }
    return Job("evaluate", what, (train.key,))


def _shards(entry: AttackSpec, attack: catalog.Plugin, settings: dict[str, Any], whole: Job) -> list[Job]:
    """The evaluation in `entry.shards` ranges of whole blocks, so that no verdict depends on the cut."""
    if (entry.shards or 1) == 1:
        return []
    n, block = whole.what["n"], settings.get("block_size") or attack.constant("block", 500)
    blocks, shards = -(-n // block), entry.shards or 1
    if shards > blocks:
        hint = "; a smaller block_size makes more of them" if any(f.name == "block_size" for f in attack.fields) else ""
        raise ValueError(
            f"attacks {entry.name} shards is {shards}, but its {n} images are {blocks} blocks of at most {block}, and "
            f"a shard holds at least one{hint}"
        )
    edges = [min(n, block * (blocks * k // shards)) for k in range(shards + 1)]
    return [
        Job("shard", {**whole.what, "images": [first, last]}, whole.needs) for first, last in itertools.pairwise(edges)
    ]
