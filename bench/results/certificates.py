"""Certified accuracy, from the L2 radius that a certificate gives each image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bench.records.store import Store
from bench.results.evaluations import EvaluationResult
from bench.results.seed_values import SeedValues, seed_accuracies

RADII = (0.0, 0.25, 0.5, 1.0)  # of the tables, in pixel units


def certificates(
    store: Store, found: list[dict[int, EvaluationResult]], radii: Iterable[float]
) -> tuple[dict[float, SeedValues], SeedValues]:
    """Certified accuracy of a row.

    Args:
        found: Its certifications by seed, of which the one with most seeds done counts.
        radii: L2 radii.

    Returns:
        By radius the share of images that are correct with a certificate of at least that radius, and the average
        certified radius, in which a wrong image counts as 0. Both are empty where nothing was certified.
    """
    if not found:
        return {}, SeedValues()
    counted = max(found, key=lambda by_seed: sum(e.state == "done" for e in by_seed.values()))
    accuracy = seed_accuracies(counted)
    shares: dict[float, dict[int, float]] = {radius: {} for radius in sorted(radii)}
    means = dict[int, float]()
    for seed in accuracy.values:
        samples = store.samples(counted[seed].key, ("correct", "radius"))
        if "radius" not in samples:
            none = SeedValues(absent=dict.fromkeys(counted, ("no certificate", "")))
            return dict.fromkeys(shares, none), none
        correct, reach = samples["correct"].astype(bool), samples["radius"]
        for radius, by_seed in shares.items():
            by_seed[seed] = float((correct & (reach >= radius)).mean())
        means[seed] = float((correct * reach).mean())
    return {radius: replace(accuracy, values=v) for radius, v in shares.items()}, replace(accuracy, values=means)
