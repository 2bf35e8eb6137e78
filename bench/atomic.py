"""Atomic writes: temporary file, fsync, rename, fsync of the folder. Logs that are appended to."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
GONE = (errno.ENOENT, errno.ESTALE)  # ESTALE: another machine removed a file on NFS while it was read


@contextlib.contextmanager
def unless_gone() -> Iterator[None]:
    """Context that ends without an error if a file that it reads is removed meanwhile."""
    try:
        yield
    except OSError as error:
        if error.errno not in GONE:
            raise


def write_json(path: Path, values: Any) -> None:
    """Sorted, indented JSON by write_atomic, so that equal content gives equal bytes."""
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Replace a file atomically: a reader sees the old content or the whole new one.

    Raises OSError that names the path, the bytes needed and the free space if the disk is full.
    """
    try:
        _write_atomic(path, write)
    except OSError as error:
        if error.errno not in FULL or not path.parent.is_dir():
            raise
        raise no_room(path, error, _size(write)) from error


def write_hashed(path: Path, data: bytes) -> str:
    """Write bytes by write_atomic. Returns their SHA-256."""
    write_atomic(path, lambda file: file.write(data))
    return hashlib.sha256(data).hexdigest()


def no_room(path: Path, error: OSError, need: int | None = None) -> OSError:
    """The error for a full disk. `need`: bytes to write, if known."""
    free = shutil.disk_usage(path.parent).free / 2**20
    size = f"{need} bytes" if (need or 0) < 2**20 else f"{(need or 0) / 2**20:.0f} MB"
    wanted = "" if need is None else f"{size} are needed, "
    what = f"cannot write {path}: {os.strerror(error.errno or 0)}; {wanted}{free:.0f} MB are free there"
    return OSError(error.errno, f"{what}. Make room and run the same command again")


class _Counter(io.RawIOBase):
    """Counts the bytes written to it."""

    total = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.total += (size := memoryview(data).nbytes)
        return size


def _size(write: Callable[[IO[bytes]], object]) -> int | None:
    """Bytes that `write` writes; None if it raises."""
    counter = _Counter()
    with contextlib.suppress(Exception):
        write(counter)  # type: ignore[arg-type]
        return counter.total
    return None


def appending(path: Path) -> IO[str]:
    """A log, opened for appending. If a kill left its last line incomplete, a line break is added first."""
    torn = False
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
    opened = path.open("a", buffering=1, encoding="utf-8", errors="replace")
    if torn:
        opened.write("\n")
    return opened


def _write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file, None if there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
