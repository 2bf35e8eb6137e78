"""Which rows differ beyond chance: paired differences on shared images, and shared ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.core.stats import bootstrap_difference, mcnemar, paired_difference

if TYPE_CHECKING:
    import numpy as np

    from bench.results.rows import Row

LEVEL = 0.05
Outcomes = dict[int, "np.ndarray[Any, Any]"]  # seed -> outcome of each image: bool, or a share of noise draws


class Difference(NamedTuple):
    """Mean of `a` minus mean of `b` on the same n images, with its 95 % interval; shares in [0,1].

    `p`: of McNemar's test; `only_a`, `only_b`: how many images only one side classifies correctly; all None for several
    seeds per side or shares of draws. `seeds`: how many per side.
    """

    difference: float
    low: float
    high: float
    p: float | None
    only_a: int | None
    only_b: int | None
    n: int
    seeds: tuple[int, int]

    @property
    def significant(self) -> bool:
        """By McNemar's test at 5 %; where it does not apply, when the interval leaves out 0."""
        return self.p < LEVEL if self.p is not None else self.low > 0 or self.high < 0


def difference(a: Outcomes, b: Outcomes) -> Difference | None:
    """Paired difference over the images that both sides share, the first ones of the test set.

    Seeds that both sides have are compared; if they share none, all. One seed per side: Newcombe's interval and the
    exact McNemar test. Several seeds, or shares of draws: means of each image over the seeds, and a bootstrap over
    images. Neither includes the variation between training seeds.

    Returns:
        The difference, or None if the sides share no images.
    """
    import numpy as np

    shared = sorted(a.keys() & b.keys())
    first, second = ([by[seed] for seed in shared or sorted(by)] for by in (a, b))
    n = min((len(column) for column in (*first, *second)), default=0)
    if not first or not second or n == 0:
        return None
    seeds = len(first), len(second)
    if seeds == (1, 1) and first[0].dtype == second[0].dtype == np.bool_:
        x, y = first[0][:n], second[0][:n]
        only = int((x & ~y).sum()), int((y & ~x).sum())
        return Difference(*paired_difference(x.tolist(), y.tolist()), mcnemar(*only), *only, n, seeds)
    x, y = (np.mean([column[:n] for column in columns], axis=0) for columns in (first, second))
    return Difference(*bootstrap_difference(x, y), None, None, None, n, seeds)


def places(rows: Sequence[Row]) -> list[int]:
    """The rank of each of these rows, best first: 1, 1, 3.

    The best row leads the first group; each next row joins it unless the leader is significantly better on the images
    that both share, and otherwise leads the next group. Rows of one rank do not differ significantly from their leader;
    the last of a group may tie with the first of the next. No correction is made for multiple comparisons.
    """
    found: list[int] = []
    leader = 0
    for place, row in enumerate(rows):
        if place and better(rows[leader], row):
            leader = place
        found.append(leader + 1)
    return found


def better(leader: Row, row: Row) -> bool:
    """Is the leader's worst case significantly higher? Rows on different images are compared by their intervals."""
    found = difference(leader.accuracy.robust, row.accuracy.robust) if same_images(leader, row) else None
    if found is None:
        return leader.accuracy.worst.interval()[0] > row.accuracy.worst.interval()[1]
    unjudged = leader.accuracy.worst.unjudged
    return found.significant and found.difference > 0 and (not unjudged or found.low > unjudged)


def same_images(a: Row, b: Row) -> bool:
    """Did evaluations of equally many images see the same ones? (Hashes of subsets of other sizes differ.)"""
    seen: dict[int, str | None] = {}
    evaluations = [*a.in_worst_case, *b.in_worst_case]
    return all(seen.setdefault(e.n, e.test_hash) == e.test_hash for e in evaluations)
