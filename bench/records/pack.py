"""`bench pack` and `bench unpack`: records <-> results/<name>.zip (bench.records.packs describes the file)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from bench.atomic import write_atomic
from bench.records.packs import JOB, NAMES, RECORD, SAMPLES, SUFFIX, Pack, write
from bench.records.store import Store
from bench.terminal import counted

OTHER = "other"  # the pack of records that no other pack holds


def pack_records(store: Store, name: str, keys: Iterable[str] | None) -> str:
    """Write the records of jobs to the pack `name` (default: of every job that no other pack holds). Returns a summary.

    Raises LookupError if none of the jobs has a record, ValueError if a record or its samples are damaged.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"'{name}' cannot name a pack; expected letters, digits, '.', '_' and '-'")
    path = store.root / f"{name}{SUFFIX}"
    if keys is None:
        elsewhere = {key for key, pack in store.packs.items() if pack.path != path}
        keys = [key for key in store.keys() if key not in elsewhere]
    wanted = sorted(set(keys))
    jobs = [(key, _published(store, key)) for key in wanted if store.has(key, RECORD)]
    if not jobs:
        raise LookupError(f"no job of {name} has a record in {store.root}; `bench run` makes them")
    write(path, jobs)
    missing = len(wanted) - len(jobs)
    left_out = f"; {counted(missing, 'job')} without a record left out" if missing else ""
    return f"{path}: {counted(len(jobs), 'record')}{left_out}"


def unpack_records(store: Store, packs: list[Path] | None) -> str:
    """Write the jobs of packs (default: all of the store) as folders, each record last. Returns a summary."""
    sources = {key: pack for path in packs or () for pack in [Pack(path)] for key in pack.members} or store.packs
    if packs is None and not sources:
        raise LookupError(f"no pack in {store.root}; `bench pack` writes one")
    left = 0
    for key, pack in sources.items():
        folder = store.folder(key)
        if (folder / JOB).exists() or (folder / RECORD).exists():
            left += 1
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name in sorted(pack.members[key], key=lambda name: name == RECORD):
            data = pack.read(key, name) or b""
            write_atomic(folder / name, lambda file, data=data: file.write(data))  # type: ignore[misc]
    there = f"; {counted(left, 'job')} had a folder already" if left else ""
    return f"{counted(len(sources) - left, 'job')} unpacked to {store.root}{there}"


def _published(store: Store, key: str) -> dict[str, bytes]:
    """The files of one job that are published, by name. Raises ValueError if one is damaged."""
    store.job(key)
    record = store.record(key)
    if record is None:
        raise ValueError(f"{store.root}/{store.damage(key)}; `bench run` does the job again")
    if SAMPLES in record.files:
        store.content(key)
    found = {name: store.read(key, name) for name in NAMES}
    return {name: data for name, data in found.items() if data is not None}
