"""Where a number comes from: the keys of the evaluations behind it, and for each key its record, device and commit."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bench.planning.job import EvaluationJob, Job
from bench.records.record import Record
from bench.records.store import Store
from bench.results.evaluations import EvaluationResult
from bench.results.rows import Row


class Origin(NamedTuple):
    """A record and its job. `versions`: index into `Origins.versions`, None if unknown."""

    job: Job
    record: Record
    description: str
    versions: int | None


@dataclass(frozen=True)
class Origins:
    """Every record by key, and the different sets of package versions among them."""

    lines: list[Origin]
    versions: list[str]

    def positions(self, keys: Iterable[str]) -> str:
        """Lines of these keys in the table of records, `3 17`: an attribute of a cell of the page."""
        return " ".join(str(self._position[key]) for key in keys if key in self._position)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {line.job.key: k for k, line in enumerate(self.lines)}


def origins(store: Store) -> Origins:
    """Where every record comes from, by key."""
    versions: dict[str, int] = {}
    lines = []
    for job, record in store.records():
        text = ", ".join(f"{name} {v}" for name, v in sorted((record.provenance.versions or {}).items()))
        known = versions.setdefault(text, len(versions)) if text else None
        lines.append(Origin(job, record, _description(job), known))
    return Origins(lines, list(versions))


def _description(job: Job) -> str:
    """`trades (train_eps=0.2)`, or `pgd (loss=cw), Linf 0.1, n 1000`."""
    if not isinstance(job, EvaluationJob):
        return job.label()
    budget = [f"{job.threat.norm} {job.threat.eps}"] if job.threat else []
    return ", ".join([job.label(), *budget, f"n {job.n}"])


def of_attack(row: Row, name: str) -> list[str]:
    """Evaluations under one attack label, by seed."""
    return [entry.key for _, entry in sorted(row.provenance.entries.get(name, {}).items())]


def of_clean(row: Row, seeds: Container[int] | None = None) -> list[str]:
    """The clean evaluations of all seeds, or of these."""
    return [e.key for e in _entries(row) if e.attack == "clean" and (seeds is None or e.seed in seeds)]


def of_certificate(row: Row) -> list[str]:
    """The evaluations that certify."""
    return [e.key for e in _entries(row) if e.attack == "certify"]


def of_worst(row: Row) -> list[str]:
    """All evaluations in the worst case of all seeds."""
    return [key for _, keys in sorted(row.provenance.keys.items()) for key in keys]


def of_training(row: Row) -> list[str]:
    """The trainings of the row."""
    return list(dict.fromkeys(e.train_key for e in _entries(row)))


def _entries(row: Row) -> list[EvaluationResult]:
    return [e for _, by_seed in sorted(row.provenance.entries.items()) for _, e in sorted(by_seed.items())]
