"""The weights that a job evaluated, by the SHA-256 of their file, compared with those that its training has now.

A training that ran again (its weights were lost, or are not in the copy) may have other weights than the evaluations
that were done before. Records older than the field `weights_sha256` do not name any, and are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.planning.job import Job, ModelJob
from bench.records.record import weights_file
from bench.records.store import Store

REPEATED = "`bench run` repeats jobs that used other weights than their training has now"


def weights_of(store: Store, job: Job) -> str | None:
    """SHA-256 of the weights that an evaluation or an audit uses, from the record of their training; None without."""
    record = store.record(job.model_key)
    if record is None or isinstance(job, ModelJob):
        return None
    return record.files.get(weights_file(job.weights))


def weights_for_record(store: Store, job: Job) -> str | None:
    """The weights that the record of a job names: those of its shards, if they agree, else `weights_of`."""
    if job.parts:
        found = {_recorded(store, key) for key in job.parts}
        return found.pop() if len(found) == 1 else None
    return weights_of(store, job)


def outdated(store: Store, job: Job) -> bool:
    """Does the record of a job name other weights than its training has now?"""
    used = _recorded(store, job.key)
    return used is not None and weights_of(store, job) not in (None, used)


def conflicting_weights(store: Store, evaluations: Iterable[tuple[int, str]]) -> str | None:
    """The conflict, if evaluations (seed and key) of one seed name different weights; None if there is none."""
    seen: dict[int, tuple[str, str]] = {}
    for seed, key in evaluations:
        if used := _recorded(store, key):
            other, first = seen.setdefault(seed, (used, key))
            if other != used:
                return f"{first} used weights {other[:12]}, {key} used {used[:12]}; {REPEATED}"
    return None


def _recorded(store: Store, key: str) -> str | None:
    record = store.record(key)
    return None if record is None else record.weights_sha256
