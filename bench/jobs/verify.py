"""`bench verify`: do records and files say what they said when they were written, and do stored images still fool?"""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bench.planning.job import EvaluateJob, EvaluationJob, Job
from bench.records.evaluated_weights import AGAIN, outdated
from bench.records.record import Record, evaluation_metrics
from bench.records.store import IMAGES, SAMPLES, Store

MOST = 20  # problems printed


@dataclass
class Verdict:
    """What was looked at and what is wrong."""

    records: int = 0
    files: int = 0
    absent: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    scorable: list[str] = field(default_factory=list)


def verify(store: Store, share: float, full: bool, root: Path) -> int:
    """Print what holds; gives the exit code: 4 where something was changed or damaged."""
    if not 0 <= share <= 1:
        raise ValueError(f"--sample is {share}; expected a share between 0 and 1")
    found = checked(store)
    print(f"{found.records} records and {found.files} files match their checksums" * (not found.problems), end="")
    print(f"{found.records} records, {found.files} files looked at" * bool(found.problems))
    for name, count in sorted(found.absent.items()):
        print(f"{count} x {name} not in this copy: not checked")
    count = len(found.scorable) if full else math.ceil(share * len(found.scorable))
    chosen = random.SystemRandom().sample(found.scorable, count)  # nobody can know which ones
    if chosen:
        from bench.jobs.rescore import rescore

        for key in chosen:
            wrong, note = rescore(store, key, root)
            print(f"{key}: {note}")
            found.problems += [f"{key}: {note}"] * wrong
        print(f"{len(chosen)} of {len(found.scorable)} evaluations with images and weights looked at again")
    elif found.records:
        print(f"no images judged again: {len(found.scorable)} evaluations have images and weights here")
    for line in found.problems[:MOST]:
        print(f"WRONG  {line}")
    if len(found.problems) > MOST:
        print(f"and {len(found.problems) - MOST} more")
    return 4 if found.problems else 0


def checked(store: Store) -> Verdict:
    """Checksums of every record and file, and what can be derived from the samples."""
    found = Verdict()
    for key in store.keys():
        record = store.record(key)
        if record is None:
            damage = store.damage(key)
            found.problems += [damage] if damage else []
            continue
        found.records += 1
        try:
            job = store.job(key)
        except (LookupError, ValueError) as error:
            found.problems.append(f"{key}: {error}")
            continue
        there = [name for name in record.files if store.has(key, name)]
        found.files += len(there)
        wrong = [f"{name} does not match its SHA-256" for name in store.damaged(key, record)]
        wrong += [f"{name} is absent" for name in record.files if name not in there and name == SAMPLES]
        found.absent.update(name for name in record.files if name not in there and name != SAMPLES)
        wrong = wrong or derivations(store, job, record)
        found.problems += [f"{key}: {line}" for line in wrong]
        if not wrong and isinstance(job, EvaluateJob) and IMAGES in there and _weights(store, job):
            found.scorable.append(key)
    return found


def derivations(store: Store, job: Job, record: Record) -> list[str]:
    """What the record says that its samples do not."""
    if record.kind != job.kind:
        return [f"the record is of kind {record.kind}, the job of kind {job.kind}"]
    if outdated(store, job):
        return [f"it judged other weights than its training has now; {AGAIN}"]
    if not isinstance(job, EvaluationJob) or record.state != "done" or SAMPLES not in record.files:
        return []
    columns, metrics = store.samples(job.key), evaluation_metrics(record)
    first, last = job.range
    wrong = []
    if "index" in columns and columns["index"].tolist() != list(range(first, last)):
        wrong.append(f"samples are not images {first} to {last - 1} in order")
    if any(len(values) != last - first for values in columns.values()) or metrics.n not in (None, last - first):
        wrong.append(f"n is {metrics.n}, the job has {last - first} images")
    for name, says in (("forwards", metrics.forwards_per_image), ("backwards", metrics.backwards_per_image)):
        if name in columns and says is not None and not math.isclose(says, columns[name].mean(), rel_tol=1e-5):
            wrong.append(f"{name}_per_image is {says}, its samples say {columns[name].mean()}")
    return wrong


def _weights(store: Store, job: EvaluateJob) -> bool:
    record = store.record(job.needs[0])
    name = f"weights-{job.weights}.safetensors"
    key = job.needs[0]
    return record is not None and name in record.files and store.has(key, name) and not store.damaged(key, record)
