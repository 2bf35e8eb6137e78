"""The worst case of a row: which images are correct without an attack and under every attack that was run.

All evaluations are cut to the longest prefix of the test set that each of them covers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.records.evaluated_weights import conflicting_weights
from bench.records.store import Store
from bench.results.evaluations import EvaluationResult
from bench.results.per_image import PerImage, on_shared_prefix
from bench.results.seed_values import MIXED, SeedValues

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

ByAttack = dict[str, dict[int, EvaluationResult]]  # attack label -> seed -> the evaluation that counts


class Minimum(NamedTuple):
    """Worst case of each image: whether it is `robust` (bool) and, for a stochastic model, the `share` of noise draws
    with the correct class; else None."""

    robust: Array
    share: Array | None


@dataclass(frozen=True)
class WorstCase:
    """Worst case of a row, over the seeds that have every attack done.

    `accuracy`: by the deployed rule; `single`: by single noise draws, without values for a deterministic model. By
    seed: `keys`, the evaluations in it; `robust` and `share` as in `Minimum`.
    """

    accuracy: SeedValues
    single: SeedValues = field(default_factory=SeedValues)
    keys: dict[int, tuple[str, ...]] = field(default_factory=dict)
    robust: dict[int, Array] = field(default_factory=dict)
    share: dict[int, Array] = field(default_factory=dict)


def worst_case(store: Store, picked: ByAttack, seeds: tuple[int, ...], eps: float) -> WorstCase:
    """Share of images that are correct clean and under all attacks.

    Args:
        picked: The evaluation that counts for each attack and seed. An attack that no seed supports is left out; a
            certificate or proof is never part of the minimum but must be of the same weights.
        seeds: The seeds of the row.
        eps: The budget of the row.

    Returns:
        The worst case of each seed that has every attack done; `accuracy.absent` gives the reason for the others.
    """

    def none(state: str, reason: str = "") -> WorstCase:
        return WorstCase(SeedValues(absent=dict.fromkeys(seeds, (state, reason))))

    attacks = {n: by for n, by in picked.items() if any(e.norm or e.attack == "clean" for e in by.values())}
    attacks = {name: by for name, by in attacks.items() if not any(e.proves for e in by.values())}
    attacks = {name: by for name, by in attacks.items() if any(e.state != "unsupported" for e in by.values())}
    if not any(e.norm for by in attacks.values() for e in by.values()):
        return none("not attacked")
    done = ((seed, e.key) for by in picked.values() for seed, e in by.items() if e.state == "done")
    if problem := conflicting_weights(store, done):
        return none(MIXED[1], problem)
    keys, absent = _complete_seeds(attacks, seeds)
    if not keys:
        return WorstCase(SeedValues(absent=absent))
    try:
        found = dict(zip(keys, minima(store, list(keys.values()), eps), strict=True))
    except ValueError as other_images:
        return none(MIXED[0], str(other_images))
    robust = {seed: minimum.robust for seed, minimum in found.items()}
    share = {seed: minimum.share for seed, minimum in found.items() if minimum.share is not None}
    n = len(next(iter(robust.values())))
    if n == 0:
        return none("no shared images", "no prefix of the test set is shared")
    accuracy, single = (SeedValues({s: float(of.mean()) for s, of in by.items()}, n) for by in (robust, share))
    unjudged = max(by[seed].unjudged for by in attacks.values() for seed in keys)
    return WorstCase(replace(accuracy, absent=absent, unjudged=unjudged), single, keys, robust, share)


def _complete_seeds(
    attacks: ByAttack, seeds: tuple[int, ...]
) -> tuple[dict[int, tuple[str, ...]], dict[int, tuple[str, str]]]:
    """The evaluations of each seed that has all attacks done, and (state, reason) of the other seeds."""
    keys, absent = {}, {}
    for seed in seeds:
        states = {name: by[seed].state if seed in by else "not planned" for name, by in sorted(attacks.items())}
        lacking = [f"{name} {state}" for name, state in states.items() if state != "done"]
        if lacking:
            absent[seed] = ("incomplete", ", ".join(lacking))
        else:
            keys[seed] = tuple(sorted(by[seed].key for by in attacks.values()))
    return keys, absent


def minima(store: Store, groups: Sequence[Sequence[str]], eps: float) -> list[Minimum]:
    """The worst case of each image over several evaluations.

    Args:
        groups: Keys of evaluations; the minimum is over those of one group, which are of one seed.
        eps: The budget, for security curves.

    Returns:
        The worst case of each group, all on the longest prefix of the test set that all evaluations share.

    Raises:
        ValueError: They saw different test sets.
    """
    columns = iter(on_shared_prefix(store, [key for keys in groups for key in keys], eps))
    return [_minimum([next(columns) for _ in keys]) for keys in groups]


def _minimum(columns: list[PerImage]) -> Minimum:
    """The worst case of each image over these evaluations.

    For a deterministic model an image is robust if it is correct in all of them. For a stochastic model we keep, for
    each image, the evaluation with the fewest correct draws among the draws that choose, and read its outcome on the
    separate draws that evaluate. A per-image minimum would reward chance: a random classifier would score near 0 %.
    """
    import numpy as np

    choosing = [column.select for column in columns if column.select is not None]
    shares = [column.share for column in columns if column.share is not None]
    if len(choosing) < len(columns) or len(shares) < len(columns):
        return Minimum(np.logical_and.reduce([column.correct for column in columns]), None)
    chosen, image = np.argmin(np.stack(choosing), axis=0), np.arange(len(choosing[0]))
    return Minimum(np.stack([column.correct for column in columns])[chosen, image], np.stack(shares)[chosen, image])
