"""`bench merge`: combines the results of several machines in one folder. If records conflict, nothing is copied.

If both folders hold an equal record, the files that the target lacks are copied (records from git have no weights).
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from bench.atomic import write_atomic
from bench.planning.job import Job
from bench.records.leases import claim
from bench.records.packs import LOG
from bench.records.record import Record, audit_findings
from bench.records.store import IMAGES, RECORD, SAMPLES, Store
from bench.terminal import counted

LOGS = (LOG, "log.txt")  # copied beside the files that a record names


@dataclass
class Plan:
    """What a merge would do. `take`: source of each record to copy, by key. `fill`: equal records, with a source that
    has files which the target lacks. `problems`: conflicts and damaged records, if any."""

    take: dict[str, Store] = field(default_factory=dict)
    fill: list[tuple[str, Store]] = field(default_factory=list)
    same: int = 0
    unfinished: int = 0
    problems: list[str] = field(default_factory=list)


def merge(sources: list[Path], target: Path) -> int:
    """Copy the records that the target lacks. Returns the exit code: 1 for conflicts (then nothing is copied)."""
    for folder in sources:
        if not folder.is_dir():
            raise FileNotFoundError(f"no results folder {folder}")
        if folder.resolve() == target.resolve():
            raise ValueError(f"{folder} is the results folder itself")
    store = Store(target)
    plan = planned([Store(folder) for folder in sources], store)
    for line in plan.problems:
        print(line)
    if plan.problems:
        print(f"{counted(len(plan.problems), 'problem')}; nothing was copied")
        return 1
    store.prepare()
    busy = [key for key, source in plan.take.items() if not _copy(source, store, key)]
    done = f"{counted(len(plan.take) - len(busy), 'record')} copied"
    filled = {(key, source.root): _fill(source, store, key) for key, source in plan.fill if key not in busy}
    busy += [key for (key, _), count in filled.items() if count is None]
    completed = {key for (key, _), count in filled.items() if count}
    if completed:
        files = counted(sum(filter(None, filled.values())), "file")
        done += f", {counted(len(completed), 'equal one')} completed by {files}"
    for key in dict.fromkeys(busy):
        print(f"{key} is being done in {target}; left alone")
    print(f"{done}, {counted(plan.same, 'equal one')} skipped, {counted(plan.unfinished, 'unfinished job')} left out")
    return 1 if busy else 0


def planned(sources: list[Store], target: Store) -> Plan:
    """Compare all records before anything is written."""
    plan = Plan()
    for source in sources:
        plan.problems += [f"damaged: {source.root / key} is {kind}" for key, kind in source.odd_places().items()]
        for key in source.keys():
            record, damage = source.record(key), source.damage(key)
            if record is None:
                plan.unfinished += damage is None
                plan.problems += [f"damaged: {source.root}/{damage}"] if damage else []
                continue
            wrong = _wrong(source, key, record)
            if wrong:
                plan.problems.append(f"damaged: {wrong}")
                continue
            known = plan.take.get(key) or (target if target.record(key) is not None else None)
            conflict = _conflict(known, source, key) if known is not None else ""
            if conflict:
                plan.problems.append(f"conflict: {conflict}")
            elif known is None:
                plan.take[key] = source
            elif _lacking(known, source, key):
                plan.fill.append((key, source))
            else:
                plan.same += 1
    return plan


def _wrong(source: Store, key: str, record: Record) -> str:
    """What is damaged in a job to be copied; empty if nothing is. Weights and images may be missing."""
    try:
        source.job(key)
    except (LookupError, ValueError) as error:
        return str(error)
    wrong = list(source.damaged(key, record).values())
    if SAMPLES in record.files and not source.has(key, SAMPLES):
        wrong.append(f"{SAMPLES} is absent")
    for name in LOGS:
        try:
            with contextlib.suppress(FileNotFoundError):
                source.open(key, name).close()
        except ValueError as problem:
            wrong.append(str(problem))
    return f"{source.root}/{key}: {'; '.join(wrong)}" if wrong else ""


def _conflict(known: Store, source: Store, key: str) -> str:
    """How two records of a job conflict. Times, machines, and images with equal outcomes may differ."""
    ours, theirs = known.record(key), source.record(key)
    where = f"{key} in {known.root} and {source.root}"
    if ours is None or theirs is None:
        return f"{where}: a record is damaged"
    if ours.state != theirs.state:
        return f"{where}: {ours.state} and {theirs.state}"
    for name in sorted({*ours.files, *theirs.files} - {IMAGES}):
        if ours.files.get(name) != theirs.files.get(name) and not _equal_samples(known, source, key, name):
            return f"{where}: other {name}"
    return f"{where}: other findings" if audit_findings(ours) != audit_findings(theirs) else ""


def _equal_samples(known: Store, source: Store, key: str, name: str) -> bool:
    """Do two files hold equal columns? Other versions of zlib compress them to other bytes."""
    if name != SAMPLES:
        return False
    import numpy as np

    try:
        ours, theirs = known.samples(key), source.samples(key)
    except ValueError:
        return False
    return set(ours) == set(theirs) and all(
        ours[n].dtype == theirs[n].dtype and np.array_equal(ours[n], theirs[n], equal_nan=ours[n].dtype.kind == "f")
        for n in ours
    )


def _lacking(known: Store, source: Store, key: str) -> list[str]:
    """Each file of a record that is absent or damaged in `known` and whole in the source."""
    record = known.record(key)
    names = record.files if record is not None else {}
    return [name for name in names if not known.matches(key, name, record) and source.matches(key, name, record)]


def _fill(source: Store, target: Store, key: str) -> int | None:
    """Copy the files that a record of the target lacks. Returns their number; None if a process runs the job there."""
    lease = claim(target, key)
    if lease is None:
        return None
    try:
        record, lacking = target.record(key), _lacking(target, source, key)
        for name in lacking:
            if target.has(key, name):
                target.set_aside(key, name, "it is not the file that the record names")
            _copy_file(source, target, key, name)
            if not target.matches(key, name, record):
                (target.folder(key) / name).unlink()
                raise OSError(f"{name} of {key} changed while it was copied; merge again")
    finally:
        lease.release()
    return len(lacking)


def _copy(source: Store, target: Store, key: str) -> bool:
    """Copy a job, its record last. Returns False if a process runs it in the target, or has finished it there."""
    job: Job = source.job(key)
    target.add(job)
    lease = claim(target, key)
    if lease is None:
        return False
    try:
        record = source.record(key)
        if record is None or target.record(key) is not None:
            return False
        target.reopen(key)
        for name in (*record.files, *LOGS):
            if source.has(key, name):
                _copy_file(source, target, key, name)
        if changed := list(target.damaged(key, record)):
            raise OSError(f"{changed[0]} of {key} changed while it was copied; nothing of {key} counts, merge again")
        _copy_file(source, target, key, RECORD)
    finally:
        lease.release()
    return True


def _copy_file(source: Store, target: Store, key: str, name: str) -> None:
    if target.hash_of(key, name) != source.hash_of(key, name):
        with source.open(key, name) as file:
            write_atomic(target.folder(key) / name, lambda out: shutil.copyfileobj(file, out))
