"""`bench logs`, `bench retry` and `bench gc`: care of a results folder. Only `retry` removes records."""

from __future__ import annotations

import io
import re
import shutil
import sys
import time
from pathlib import Path

from bench.atomic import kind_of, open_regular, size_text
from bench.records.leases import claim, holder_of, holders
from bench.records.store import FINISHED, IMAGES, SAMPLES, Store
from bench.terminal import counted

POLL = 0.5  # seconds between looks at a log
FRESH = 3600.0  # seconds for which a temporary file may be in use
LEFT_OVER = re.compile(r"\.((record|job|retries|attempts)\.json|samples\.npz|lease|.*\.safetensors)\..+|progress\.tmp")


def resolve(store: Store, prefix: str) -> str:
    """The key with this prefix. Raises LookupError if there is none, or more than one."""
    found = [key for key in store.keys() if prefix and key.startswith(prefix)]
    if not found:
        raise LookupError(f"no job {prefix or 'without a key'} in {store.root}; `bench status` names them")
    if len(found) > 1:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise LookupError(f"{len(found)} jobs begin with {prefix}: {', '.join(found[:5])}{more}; give more digits")
    return found[0]


def logs(store: Store, prefix: str, follow: bool) -> None:
    """Print the log of a job; with `follow` until the job has ended."""
    key = resolve(store, prefix)
    path, position = store.folder(key) / "log.txt", 0
    while True:
        over = not follow or (store.record(key) is not None and holder_of(store, key) is None)
        try:
            with io.TextIOWrapper(open_regular(path), encoding="utf-8", errors="replace") as file:
                file.seek(position)
                shutil.copyfileobj(file, sys.stdout)
                position = file.tell()
            sys.stdout.flush()
        except FileNotFoundError:
            if over:
                print(f"no log of {key}: it was not run here")
        if over:
            return
        time.sleep(POLL)


def retry(store: Store, prefixes: list[str], failed: bool) -> int:
    """Remove the records of failed jobs, so that the same `bench run` repeats them. Returns the exit code.

    Raises ValueError for a job that did not fail, before anything is changed.
    """
    if failed == bool(prefixes):
        raise ValueError("name either jobs (KEY...) or --failed; `bench status` shows what failed")
    keys = store.keys() if failed else list(dict.fromkeys(resolve(store, prefix) for prefix in prefixes))
    states = {key: _state(store, key) for key in keys}
    for key in () if failed else keys:
        if states[key] in ("done", "unsupported", "waiting"):
            raise ValueError(f"{key} is {states[key]}; only a job that failed can be tried again")
    left, count = 0, 0
    for key in [key for key in keys if states[key] not in ("done", "unsupported", "waiting")]:
        lease = claim(store, key)
        if lease is None:
            print(f"{key} is being done by another process; left alone")
            left += 1
            continue
        store.reopen(key)
        lease.release()
        print(f"{key} was {states[key]}; the same `bench run` does it again")
        count += 1
    print(f"{counted(count, 'record')} removed; the logs stay")
    return 1 if left else 0


def _state(store: Store, key: str) -> str:
    record = store.record(key)
    return record.state if record is not None else "damaged" if store.damage(key) else "waiting"


def gc(store: Store, dry_run: bool) -> None:
    """Remove files that no job reads any more, and print their size."""
    total = count = 0
    whole = _assembled(store)
    for key in store.keys():
        found = [(path, why, _size(path)) for path, why in orphans(store, key, key in whole)]
        lease = claim(store, key) if found and not dry_run else None
        if found and not dry_run and lease is None:
            continue  # another process began to run it
        for path, why, size in found:
            print(f"{'would remove' if dry_run else 'removed'} {path} ({size_text(size)}): {why}")
            total, count = total + size, count + 1
            if not dry_run:
                _remove(path)
        if lease is not None:
            lease.release()
    freed = f"{counted(count, 'path')}, {size_text(total)}"
    print(f"{freed} {'would be' if dry_run else 'were'} freed; no record was touched")


def orphans(store: Store, key: str, whole: bool) -> list[tuple[Path, str]]:
    """Files of a job that nothing reads, with the reason. `whole`: the job is a shard of a combined evaluation."""
    folder, record, now = store.folder(key), store.record(key), time.time()
    if any(holder.alive for holder in holders(folder, now)):
        return []
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith("lease-"):
            found.append((path, "of a process that has ended"))
        if LEFT_OVER.fullmatch(path.name) and now - path.lstat().st_mtime > FRESH:
            found.append((path, "left by a write that was killed"))
        if record is None or record.state not in FINISHED:
            continue
        if path.name == "blocks":
            found.append((path, "partial work of a job that has ended"))
        elif path.name.endswith(".safetensors") and path.name[0] != "." and path.name not in record.files:
            found.append((path, "no record names it"))
        elif whole and path.name == IMAGES:
            found.append((path, "its evaluation holds these images too"))
    return found


def _assembled(store: Store) -> set[str]:
    """Shards whose combined evaluation is done, with its samples, and with images if the shards have any."""
    found: set[str] = set()
    for job, record in store.records():
        images = IMAGES not in record.files or (store.folder(job.key) / IMAGES).exists()
        if job.parts and images and SAMPLES in record.files and store.intact(job.key):
            found.update(job.parts)
    return found


def _size(path: Path) -> int:
    return sum(status.st_size for p in [path, *path.rglob("*")] if not kind_of(status := p.lstat()))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)  # the claim removed dead leases
