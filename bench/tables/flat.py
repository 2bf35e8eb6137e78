"""Rows as lines of CSV: one per row; one per number and seed, with the keys of its evaluations; one per finding."""

from __future__ import annotations

from collections.abc import Iterator

from bench.results.evaluations import EvaluationResult
from bench.results.rows import Row
from bench.results.seed_values import SeedValues
from bench.tables.pareto import KINDS, fronts
from bench.tables.ranking import flags, unreliable
from bench.tables.sections import Section


def lines(sections: list[Section]) -> list[dict[str, object]]:
    """Rows for leaderboard.csv: shares in [0,1], or the state as text.

    `seed_values` are worst cases by seed; `others_mean`, `others_std` are without the collapsed seeds, of which
    `collapsed` is the number; `pareto_...`: is the row on that front, empty where there was nothing to compare.
    """
    on = fronts(row for section in sections for row in section.rows)
    return [_line(each.kind, rank, row, on.get(id(row), {})) for each in sections for rank, row in each.ranked]


def _line(section: str, rank: str, row: Row, on: dict[str, bool]) -> dict[str, object]:
    accuracy, cost, provenance, worst = row.accuracy, row.cost, row.provenance, row.accuracy.worst
    low, high = worst.interval()
    seeds = " ".join(f"{seed}:{value}" for seed, value in sorted(worst.values.items()))
    others = worst.without(accuracy.collapsed) if accuracy.collapsed else SeedValues()
    line = {
        "dataset": row.dataset, "norm": row.norm, "eps": row.eps, "section": section, "rank": rank,
        "method": row.method, "model": row.model, "clean": _value(accuracy.clean),
        "autoattack": _value(accuracy.autoattack), "worst_case": _value(worst),
        "single_draw": accuracy.single.mean, "low": low, "high": high,
        "std": worst.std, "n": worst.n, "seeds_done": len(worst.values),
        "seeds_planned": len(row.seeds), "seed_values": seeds, "collapsed": len(accuracy.collapsed),
        "collapsed_seeds": " ".join(map(str, accuracy.collapsed)), "others_mean": others.mean, "others_std": others.std,
        "verdict": row.verdict, "flags": flags(row), "aa_unreliable": unreliable(row),
        "train_eps": row.train_eps, "train_seconds": cost.train_seconds, "ratio_to_standard": cost.ratio,
        "machine_shared": cost.shared, "train_work_f": cost.train_work, "attack_seconds": cost.attack_seconds,
        "peak_memory_mb": cost.peak_memory_mb, "eot_draws": provenance.draws or None,
        **{f"pareto_{kind}": on.get(kind) for kind in KINDS},
        "selected_on": provenance.selected, "recipe": row.recipe, "epochs": row.epochs, "device": provenance.device,
        "commit": provenance.commit, "provisional": "; ".join(row.provisional), "config": row.config,
        "train_key": provenance.train_key,
    }  # fmt: skip
    attacks = {f"attack {name}": _value(cell) for name, cell in accuracy.attacks.items()}
    proved = {f"proved by {name}": _value(cell) for name, cell in accuracy.proved.items()}
    measured = {f"accuracy under {name}": _value(cell) for name, cell in accuracy.measured.items()}
    radii = {f"certified L2 {radius:g}": _value(cell) for radius, cell in accuracy.certified.items()}
    acr = {"average certified L2 radius": _value(accuracy.acr)} if accuracy.certified else {}
    return {**line, **attacks, **proved, **measured, **radii, **acr}


def cells(sections: list[Section]) -> list[dict[str, object]]:
    """Lines of cells.csv, one per number and seed: its value in [0,1] or its state and reason, and the keys of its
    evaluations."""
    return [line for section in sections for _, row in section.ranked for line in _cells(section.kind, row)]


def _cells(section: str, row: Row) -> Iterator[dict[str, object]]:
    about = {"dataset": row.dataset, "norm": row.norm, "eps": row.eps, "section": section, "method": row.method}
    about |= {"config": row.config}
    for column, cell in _columns(row):
        for seed in row.seeds:
            state, reason = cell.absent.get(seed, ("done" if seed in cell.values else "not run", ""))
            keys = (
                row.provenance.keys.get(seed, ())
                if column in ("worst case", "single draw")
                else _keys(row, column, seed)
            )
            yield {
                **about, "column": column, "seed": seed, "state": state, "reason": reason,
                "value": cell.values.get(seed), "n": cell.n if seed in cell.values else None,
                "collapsed": seed in row.accuracy.collapsed, "keys": " ".join(keys), "train_key": _trained(row, seed),
            }  # fmt: skip


def _columns(row: Row) -> Iterator[tuple[str, SeedValues]]:
    yield "clean", row.accuracy.clean
    yield from row.accuracy.attacks.items()
    yield "worst case", row.accuracy.worst
    for name, cell in row.accuracy.proved.items():
        yield f"proved by {name}", cell
    for name, cell in row.accuracy.measured.items():
        yield f"accuracy under {name}", cell
    if row.accuracy.single.values:
        yield "single draw", row.accuracy.single
    for radius, cell in row.accuracy.certified.items():
        yield f"certified L2 {radius:g}", cell
    if row.accuracy.certified:
        yield "average certified L2 radius", row.accuracy.acr


def _keys(row: Row, column: str, seed: int) -> list[str]:
    """The evaluation of an attack, of clean images, or of certificates."""
    kind = "clean" if column == "clean" else "certify" if "certified L2" in column else None
    found = [
        by
        for name, by in (*row.provenance.entries.items(), *row.provenance.measured.items())
        if column in (name, f"proved by {name}", f"accuracy under {name}") or (kind and _attack(by) == kind)
    ]
    return [by[seed].key for by in found if seed in by]


def _attack(by: dict[int, EvaluationResult]) -> str:
    return str(next(iter(by.values())).attack)


def _trained(row: Row, seed: int) -> str | None:
    return next((by[seed].train_key for by in row.provenance.entries.values() if seed in by), None)


def _value(cell: SeedValues) -> float | str:
    return cell.mean if cell.values else cell.state()


def checks(sections: list[Section]) -> list[dict[str, object]]:
    """Lines of checks.csv: every finding of every row, "not checked" ones too."""
    return [
        {
            "dataset": row.dataset, "norm": row.norm, "eps": row.eps, "section": section.kind, "method": row.method,
            "model": row.model, "config": row.config, "verdict": row.verdict, "code": finding.code,
            "level": finding.level, "value": finding.value, "threshold": finding.threshold,
            "attack": finding.attack, "note": finding.note,
        }
        for section in sections
        for row in section.rows
        for finding in row.findings
    ]  # fmt: skip
