"""Outcomes of evaluations image by image, read from stored samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.core.epsilon import Epsilon
from bench.records.record import evaluation_metrics
from bench.records.store import Store
from bench.results.evaluations import correct_at
from bench.results.seed_values import mixed_images

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_COLUMNS = ("index", "label", "correct", "broken_at", "select", "share", "select_at", "share_at")


class PerImage(NamedTuple):
    """Outcomes of one evaluation on a prefix of the test set, one value an image.

    `correct` (bool): by the deployed rule. For a stochastic model, shares in [0,1] of noise draws with the correct
    class: `select` on the draws that choose between attacks, `share` on separate draws that evaluate; else None.
    """

    correct: Array
    select: Array | None
    share: Array | None

    def first(self, n: int) -> PerImage:
        """The outcomes on the first n images."""
        return PerImage(*(None if column is None else column[:n] for column in self))  # type: ignore[arg-type]


def on_shared_prefix(store: Store, keys: Iterable[str], eps: float) -> list[PerImage]:
    """Outcomes of several evaluations on the same images.

    Args:
        keys: The evaluations.
        eps: The budget at which to read security curves.

    Returns:
        The outcomes of each, on the longest prefix of the test set that all of them share.

    Raises:
        ValueError: They did not see the same images, or labels differ at the same index.
    """
    import numpy as np

    found: list[PerImage] = []
    subsets: list[tuple[int, str | None, str]] = []
    labels: list[tuple[Array, str]] = []
    for key in keys:
        samples = in_order(store.samples(key, _COLUMNS))
        subsets.append((len(samples["index"]), evaluation_metrics(store.record(key)).test_hash, key))
        in_place = samples["index"] == np.arange(len(samples["index"]))
        n = len(in_place) if in_place.all() else int(in_place.argmin())
        select, share = (draw_shares(store, key, samples, name, eps) for name in ("select", "share"))
        found.append(PerImage(correct_at(samples, eps), select, share).first(n))
        if "label" in samples:
            labels.append((samples["label"][:n], key))
    n = min(len(outcome.correct) for outcome in found)
    if problem := mixed_images(subsets):
        raise ValueError(problem)
    for values, key in labels:
        if not np.array_equal(values[:n], labels[0][0][:n]):
            raise ValueError(f"{labels[0][1]} and {key} have other labels at the same index")
    return [outcome.first(n) for outcome in found]


def in_order(samples: dict[str, Any]) -> dict[str, Any]:
    """The same columns sorted by index in the test set; unchanged if they are sorted."""
    index = samples["index"]
    if bool((index[1:] > index[:-1]).all()):
        return samples
    order = index.argsort(kind="stable")
    return {name: values[order] for name, values in samples.items()}


def draw_shares(store: Store, key: str, samples: dict[str, Any], name: str, eps: float) -> Array | None:
    """Share of correct noise draws of each image; None for a deterministic model.

    Args:
        name: "select", the draws that choose between attacks, or "share", those that evaluate.
        eps: The budget, for a security curve.
    """
    if f"{name}_at" not in samples:
        return samples.get(name)
    job = store.evaluation(key)
    largest = [job.threat.eps] if job.threat else []
    budgets = sorted({float(Epsilon(each)) for each in (*job.attack.settings["budgets"], *largest)})
    column: Array = samples[f"{name}_at"][:, budgets.index(eps)]
    return column
