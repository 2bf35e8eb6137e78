"""`bench verify`: compares records, files and derived values with each other, and scores stored images again."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bench.planning.job import EvaluateJob, EvaluationJob, Job, ModelJob, TrainJob
from bench.records.evaluated_weights import REPEATED, outdated
from bench.records.record import Record, evaluation_metrics, weights_file
from bench.records.store import IMAGES, SAMPLES, Store
from bench.terminal import counted

MAX_PRINTED = 20  # problems


@dataclass
class Verdict:
    """What was compared and what is wrong. `with_images`: keys of evaluations whose images can be scored again."""

    records: int = 0
    files: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    with_images: list[str] = field(default_factory=list)


def verify(store: Store, share: float, full: bool, root: Path) -> int:
    """Print what was verified and what is wrong. Returns the exit code: 4 if anything was changed or damaged."""
    if not 0 <= share <= 1:
        raise ValueError(f"--sample is {share}; expected a share between 0 and 1")
    found = checked(store)
    if found.problems:
        print(f"{counted(found.records, 'record')}, {counted(found.files, 'file')} looked at")
    else:
        print(f"{counted(found.records, 'record')} and {counted(found.files, 'file')} match their checksums")
    for name, count in sorted(found.missing.items()):
        print(f"{count} x {name} not in this copy: not checked")
    count = len(found.with_images) if full else math.ceil(share * len(found.with_images))
    chosen = random.SystemRandom().sample(found.with_images, count)  # a forger cannot predict the choice
    if chosen:
        from bench.jobs.recheck import verify_images

        for key in chosen:
            wrong, note = verify_images(store, key, root)
            print(f"{key}: {note}")
            found.problems += [f"{key}: {note}"] * wrong
        print(f"{len(chosen)} of {counted(len(found.with_images), 'evaluation')} with images and weights scored again")
    elif found.records:
        print(f"no images scored again of {counted(len(found.with_images), 'evaluation')} with images and weights here")
    return print_problems(found.problems)


def print_problems(problems: list[str]) -> int:
    """Print the first problems. Returns the exit code: 4 if there is any."""
    for line in problems[:MAX_PRINTED]:
        print(f"WRONG  {line}")
    if len(problems) > MAX_PRINTED:
        print(f"and {len(problems) - MAX_PRINTED} more")
    return 4 if problems else 0


def checked(store: Store) -> Verdict:
    """Compare every record and file with its checksum, and derived values with the samples."""
    found = Verdict(problems=[f"{key} is {kind}; remove it" for key, kind in store.odd_places().items()])
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
        present = [name for name in record.files if store.has(key, name)]
        found.files += len(present)
        wrong = [f"{what}; {_remedy(job, name)}" for name, what in store.damaged(key, record).items()]
        for name in record.files.keys() - set(present):
            if name == SAMPLES:
                wrong.append(f"{name} is absent; {_remedy(job, name)}")
            else:
                found.missing[name] += 1
        try:
            wrong = wrong or contradictions(store, job, record)
        except ValueError as problem:
            wrong = [str(problem)]
        found.problems += [f"{key}: {line}" for line in wrong]
        if not wrong and isinstance(job, EvaluateJob) and IMAGES in present and _has_weights(store, job):
            found.with_images.append(key)
    return found


def _remedy(job: Job, name: str) -> str:
    """What to do about a file that is not what its record names."""
    if name == SAMPLES:
        return "`bench run` does the job again"
    if not isinstance(job, (ModelJob, EvaluationJob)):
        return "remove it"
    made = "trains" if isinstance(job, TrainJob) else "makes"
    return f"remove it, and `bench run` {made} it again if a job needs it; or `bench merge` a folder that has it"


def contradictions(store: Store, job: Job, record: Record) -> list[str]:
    """How a record contradicts its job or its samples."""
    if record.kind != job.kind:
        return [f"the record is of kind {record.kind}, the job of kind {job.kind}"]
    if outdated(store, job):
        return [f"it used other weights than its training has now; {REPEATED}"]
    if not isinstance(job, EvaluationJob) or record.state != "done" or SAMPLES not in record.files:
        return []
    columns, metrics = store.samples(job.key), evaluation_metrics(record)
    first, last = job.range
    n = last - first
    wrong = []
    if any(len(values) != n for values in columns.values()) or metrics.n not in (None, n):
        wrong.append(f"n is {metrics.n}, the job has {counted(n, 'image')}")
    elif "index" in columns and columns["index"].tolist() != list(range(first, last)):
        wrong.append(f"samples are not images {first} to {last - 1} in order")
    for name, stored in (("forwards", metrics.forwards_per_image), ("backwards", metrics.backwards_per_image)):
        if name in columns and stored is not None and not math.isclose(stored, columns[name].mean(), rel_tol=1e-5):
            wrong.append(f"{name}_per_image is {stored}, the mean of its samples is {columns[name].mean()}")
    return wrong


def _has_weights(store: Store, job: EvaluateJob) -> bool:
    record, name = store.record(job.model_key), weights_file(job.weights)
    return store.matches(job.model_key, name, record)
