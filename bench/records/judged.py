"""Which weights a job judges, by the SHA-256 of their file."""

from __future__ import annotations

from bench.planning.job import Job
from bench.records.store import Store, weights_file


def weights_of(store: Store, job: Job) -> str | None:
    """SHA-256 of the weights that an evaluation, a shard or an audit judges, by the present record of their training;
    None where that has not ended well."""
    record = store.record(job.needs[0])
    return None if record is None else record["files"].get(weights_file(job.what["weights"]))
