"""One number of a row with its value for each training seed."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from statistics import fmean

from bench.core.stats import audited_interval, mean_std
from bench.results.evaluations import EvaluationResult

MEDIAN = "median: distance in the norm of eps, over images right when clean, to what was found; inf if nothing was"
MIXED = ("mixed test sets", "mixed weights")  # states of what cannot be compared image by image


@dataclass(frozen=True)
class SeedValues:
    """A share in [0,1] for each training seed.

    `n`: how many images the shares are over. `absent`: (state, reason) of the seeds without a value. `distance`: of a
    minimal-norm attack, the median distance for each seed. `unjudged`: where a suite judged a sample of the images that
    survived a screen, a bound (97.5 %) on the share of all images that it would break and that count as robust.
    """

    values: dict[int, float] = field(default_factory=dict)
    n: int = 0
    absent: dict[int, tuple[str, str]] = field(default_factory=dict)
    distance: dict[int, float] = field(default_factory=dict)
    unjudged: float = 0.0

    @property
    def mean(self) -> float:
        """Mean over seeds; NaN where there is no value."""
        return fmean(self.values.values()) if self.values else math.nan

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds, 0 for one seed; NaN where there is no value."""
        return mean_std(list(self.values.values()))[1] if self.values else math.nan

    def without(self, seeds: Container[int]) -> SeedValues:
        """The values of the other seeds."""
        return replace(self, values={seed: v for seed, v in self.values.items() if seed not in seeds})

    def only(self, seeds: Container[int]) -> SeedValues:
        """The values of these seeds."""
        return replace(self, values={seed: v for seed, v in self.values.items() if seed in seeds})

    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the mean over n images; seeds share their images, so they do not increase n.
        It contains the error of `unjudged`."""
        if not self.values:
            return math.nan, math.nan
        return audited_interval(round(self.mean * self.n), self.n, self.unjudged)

    def median(self) -> str:
        """`median 0.43` (mean over seeds) for a minimal-norm attack; otherwise empty."""
        return f"median {fmean(self.distance.values()):.3g}" if self.distance else ""

    def state(self) -> str:
        """What the table shows where there is no number."""
        return ", ".join(sorted({state for state, _ in self.absent.values()})) or "not run"


def seed_accuracies(found: dict[int, EvaluationResult]) -> SeedValues:
    """The accuracy under one attack, or the share that an evaluation measures.

    Args:
        found: The evaluation that counts, by seed.

    Returns:
        The accuracy of each seed that is done; no values if evaluations of equally many images saw different ones.
    """
    done = {seed: e for seed, e in sorted(found.items()) if e.state == "done"}
    if problem := mixed_images((e.n, e.test_hash, e.key) for e in done.values()):
        return SeedValues(absent=dict.fromkeys(found, (MIXED[0], problem)))
    return SeedValues(
        values={seed: e.accuracy if e.measures is None else e.measured for seed, e in done.items()},
        n=min((e.n for e in done.values()), default=0),
        absent={seed: (e.state, e.reason or "") for seed, e in found.items() if seed not in done},
        unjudged=max((e.unjudged for e in done.values()), default=0.0),
        distance={seed: e.median_distance for seed, e in done.items() if not math.isnan(e.median_distance)},
    )


def mixed_images(evaluations: Iterable[tuple[int, str | None, str]]) -> str | None:
    """Why evaluations (number of images, hash of the images, key) cannot be compared; None where they can be.

    Only those of equally many images must agree: hashes of a test set and of its prefix always differ.
    """
    seen: dict[int, tuple[str | None, str]] = {}
    for n, test_hash, key in evaluations:
        other, first = seen.setdefault(n, (test_hash, key))
        if other != test_hash:
            return f"{first} saw test images {other}, {key} saw {test_hash}"
    return None
