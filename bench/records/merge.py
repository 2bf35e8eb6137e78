"""`bench merge`: combines the results of several machines in one folder. If records conflict, nothing is copied.

If both folders hold an equal record, the files that the target lacks are copied (records from git have no weights).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from bench.atomic import file_hash, write_atomic
from bench.planning.job import Job
from bench.records.leases import claim
from bench.records.record import Record, audit_findings
from bench.records.store import IMAGES, JOB, RECORD, SAMPLES, Store, refuse_links
from bench.terminal import counted

NOT_COPIED = (JOB, RECORD, "progress.json")  # written by their own rules, last, or not at all


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
            known = plan.take.get(key) or (target if target.has(key, RECORD) else None)
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
    names = source.damaged(key, record)
    if SAMPLES in record.files and not source.has(key, SAMPLES):
        names.append(SAMPLES)
    return f"{', '.join(names)} of {key} in {source.root} do not match the record" if names else ""


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


def _lacking(known: Store, source: Store, key: str) -> dict[str, str]:
    """Name and hash of each file of a record that `known` lacks and the source has."""
    record = known.record(key)
    ours = record.files if record is not None else {}
    absent = {name: expected for name, expected in ours.items() if not known.has(key, name)}
    return {name: expected for name, expected in absent.items() if expected and source.hash_of(key, name) == expected}


def _fill(source: Store, target: Store, key: str) -> int | None:
    """Copy the files that a record of the target lacks. Returns their number; None if a process runs the job there."""
    if not target.packed(key):
        refuse_links(target.folder(key))
    lease = claim(target, key)
    if lease is None:
        return None
    try:
        lacking = _lacking(target, source, key)
        for name, expected in lacking.items():
            copy = target.folder(key) / name
            _copy_file(source, key, name, copy)
            if file_hash(copy) != expected:
                copy.unlink()
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
        if target.record(key) is not None:
            return False
        for name in source.files(key):
            if name not in NOT_COPIED and not name.startswith((".", "lease-")):
                _copy_file(source, key, name, target.folder(key) / name)
        record = source.record(key)
        changed = target.damaged(key, record) if record is not None else [RECORD]
        if changed:
            raise OSError(f"{changed[0]} of {key} changed while it was copied; nothing of {key} counts, merge again")
        _copy_file(source, key, RECORD, target.folder(key) / RECORD)
    finally:
        lease.release()
    return True


def _copy_file(source: Store, key: str, name: str, copy: Path) -> None:
    path = source.folder(key) / name
    if path.is_symlink():
        raise ValueError(f"{path} is a link; results hold real files only")
    if file_hash(copy) != source.hash_of(key, name):
        with source.open(key, name) as file:
            write_atomic(copy, lambda out: shutil.copyfileobj(file, out))
