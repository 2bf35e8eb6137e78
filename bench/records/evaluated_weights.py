"""Which weights a job judges, and which ones its record says it judged, by the SHA-256 of their file.

A training that was done again (its weights were lost, or never came along) may have other weights than evaluations
which stand since before. Records older than this field say nothing of it, and stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterable

from bench.planning.job import Job, ModelJob
from bench.records.record import Record, weights_file
from bench.records.store import Store

AGAIN = "`bench run` does again what judged others than the training has now"


def weights_of(store: Store, job: Job) -> str | None:
    """SHA-256 of the weights that an evaluation, a shard or an audit judges, by the present record of their training;
    None where that has not ended well."""
    record = store.record(job.model_key)
    if record is None or isinstance(job, ModelJob):
        return None
    return record.files.get(weights_file(job.weights))


def named(record: Record | None) -> str | None:
    """The weights that a record says were judged; None where it says nothing."""
    return None if record is None else record.weights_sha256


def says(store: Store, job: Job) -> str | None:
    """What the record of a job is to say: of an evaluation in shards what all of these say."""
    if not job.needs:
        return None
    found = {named(store.record(key)) for key in job.parts} or {weights_of(store, job)}
    return found.pop() if len(found) == 1 else None


def outdated(store: Store, job: Job) -> bool:
    """Does the record of a job name other weights than its training has now?"""
    judged = named(store.record(job.key))
    return judged is not None and weights_of(store, job) not in (None, judged)


def apart(store: Store, evaluations: Iterable[tuple[int, str]]) -> str | None:
    """What is wrong if evaluations (seed and key) of one seed name different weights; what names none is let be."""
    seen: dict[int, tuple[str, str]] = {}
    for seed, key in evaluations:
        if sha := named(store.record(key)):
            other, first = seen.setdefault(seed, (sha, key))
            if other != sha:
                return f"{first} judged weights {other[:12]}, {key} judged {sha[:12]}; {AGAIN}"
    return None
