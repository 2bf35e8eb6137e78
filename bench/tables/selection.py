"""Rows by the name of a method, of a defense, or by training key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from bench.records.store import Store
from bench.results.evaluations import evaluations
from bench.results.rows import Row
from bench.soundness.verdicts import judged_rows
from bench.tables.pareto import fronts
from bench.terminal import counted

NO_ROW = "no evaluation has a result here yet; `bench status` shows what is left to run"


@dataclass(frozen=True)
class RowFilter:
    """Restricts rows beyond the scope of their store (bench.results.scope); None does not restrict."""

    norm: str | None = None
    seed: int | None = None

    def takes(self, row: Row) -> bool:
        """Does the row match?"""
        return self.norm is None or (row.norm or "").lower() == self.norm.lower()


@dataclass(frozen=True)
class Pair:
    """Two rows under one budget, the seed of each (None: all), and their Pareto fronts (`bench.tables.pareto`)."""

    rows: tuple[Row, Row]
    seeds: tuple[int | None, int | None]
    pareto: tuple[dict[str, bool], dict[str, bool]] = ({}, {})

    @property
    def sides(self) -> list[tuple[Row, int | None]]:
        """Each row with its seed."""
        return list(zip(self.rows, self.seeds, strict=True))


def pairs(store: Store, name_a: str, name_b: str, where: RowFilter) -> list[Pair]:
    """Both rows at every budget that they share, in one data set.

    A name is a method as the leaderboard shows it, the name of a defense, or a training key (then that seed alone).
    Raises LookupError for an unknown or ambiguous name, or if the two share no budget.
    """
    store = store.snapshot()
    known = evaluations(store)
    everything = judged_rows(store, known=known)
    found = [row for row in everything if where.takes(row)]
    if not everything:
        raise LookupError(NO_ROW)
    if not found:
        raise LookupError(f"no row has norm {where.norm}; there are: {_places(everything)}")
    trained = {e.train_key: (e.config, e.seed) for e in known.of_split("test")}
    side_a, side_b = (_side(name, found, trained) for name in (name_a, name_b))
    shared = [(a, b) for a in side_a for b in side_b if _place(a) == _place(b)]
    if not shared:
        raise LookupError(f"'{name_a}' and '{name_b}' share no budget: {_places(side_a)} against {_places(side_b)}")
    met = {a.dataset for a, _ in shared}
    if len(met) > 1:
        raise LookupError(f"'{name_a}' and '{name_b}' meet in {_listed(met)}; choose one with --dataset")
    both = (name_a, [a for a, _ in shared]), (name_b, [b for _, b in shared])
    several = [(name, side) for name, side in both if len({row.config for row in side}) > 1]
    if several:  # both at once, so that the next try succeeds
        each = "; ".join(f"'{name}' is ambiguous: {_describe_side(side)}" for name, side in several)
        raise LookupError(f"{each}. Give the training key of one{' of each' * (len(several) > 1)}")
    for name, side in both:
        if where.seed is not None and where.seed not in side[0].seeds:
            raise LookupError(f"'{name}' has no seed {where.seed}; trained: {', '.join(map(str, side[0].seeds))}")
    own = [where.seed if where.seed is not None else trained.get(name, ("", None))[1] for name in (name_a, name_b)]
    on = fronts(everything)
    return [Pair((a, b), (own[0], own[1]), (on.get(id(a), {}), on.get(id(b), {}))) for a, b in shared]


def _side(name: str, found: list[Row], trained: dict[str, tuple[str, int]]) -> list[Row]:
    """The rows with this training key, else with this method, else of this defense."""
    if name in trained:
        side = [row for row in found if row.config == trained[name][0]]
    else:
        side = [row for row in found if row.method == name] or [row for row in found if row.defense == name]
    if side:
        return side
    if name in trained:
        raise LookupError(f"training {name} has no evaluation with this data set, norm and eps")
    known = {row.method for row in found} | {row.defense for row in found}
    close = difflib.get_close_matches(name, sorted(known), 3, 0.5)
    others = f"Did you mean {', '.join(close)}?" if close else f"Known: {_listed(row.defense for row in found)}"
    raise LookupError(f"no row is named '{name}'. {others}")


def _place(row: Row) -> tuple[str, str | None, float]:
    return row.dataset, row.norm, row.budget


def _places(side: Iterable[Row]) -> str:
    return _listed(
        f"{row.dataset} {row.norm} eps {row.eps}" if row.norm else f"{row.dataset} unattacked" for row in side
    )


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(set(names))
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")


def _describe_side(side: Iterable[Row]) -> str:
    return _listed(
        f"{row.provenance.train_key} ({row.method}, {row.model}, train eps {row.train_eps}, "
        f"{counted(row.epochs, 'epoch')})"
        for row in side
    )
