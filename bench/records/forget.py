"""What `bench forget` removes: jobs of a stopped, failed or unwanted run, never what another stored job needs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass

from bench.records.leases import claim, holder_of
from bench.records.packs import RECORD
from bench.records.store import Store


@dataclass(frozen=True)
class Removal:
    """Keys to remove, each before the jobs it needs; and keys that stay, by reason."""

    keys: list[str]
    finished: list[str]
    needed: list[str]
    packed: list[str]


def never_ran(store: Store) -> list[str]:
    """Jobs without a record and without a checkpoint."""
    return [key for key in store.jobs() if not store.has(key, RECORD) and not any(store.folder(key).glob("blocks/*"))]


def with_dependents(store: Store, keys: Iterable[str]) -> set[str]:
    """These jobs and all that need them."""
    found, jobs = set(keys), store.jobs()
    while more := {key for key, job in jobs.items() if key not in found and not found.isdisjoint(job.waits)}:
        found |= more
    return found


def removal(store: Store, wanted: Iterable[str], finished: bool) -> Removal:
    """Sort out what can be removed of these jobs. `finished`: finished ones too.

    Raises ValueError in one line while any job in the folder runs, since those that wait may be of the same run.
    """
    if running := [key for key in store.keys() if holder_of(store, key) is not None]:
        raise ValueError(f"{running[0]} runs in {store.root}, and others may wait for it; stop that run first")
    jobs = store.jobs()
    stored = sorted(set(wanted) & jobs.keys())
    packed = [key for key in stored if store.packed(key)]
    done = [key for key in stored if not finished and store.done(key) and key not in packed]
    going = set(stored) - set(packed) - set(done)
    while kept := {need for key, job in jobs.items() if key not in going for need in job.waits} & going:
        going -= kept
    order: list[str] = []
    while left := going - set(order):
        order += sorted(left - {need for key in left for need in jobs[key].waits})
    return Removal(order, done, sorted(set(stored) - set(packed) - set(done) - going), packed)


def remove(store: Store, keys: Iterable[str]) -> list[str]:
    """Remove the folders of these jobs; gives those that another process has taken meanwhile."""
    left = []
    for key in keys:
        lease = claim(store, key)
        if lease is None:
            left.append(key)
            continue
        # the record first: a kill leaves a job without a result, no damaged one
        (store.folder(key) / RECORD).unlink(missing_ok=True)
        shutil.rmtree(store.folder(key))
        lease.release()
    return left
