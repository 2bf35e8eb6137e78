"""Files that are whole or not there: temp file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def write_json(path: Path, values: Any) -> None:
    """Sorted, indented JSON by write_atomic, so that equal content gives equal bytes."""
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, lambda file: file.write(text.encode()))


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Temp file, fsync, rename, fsync of the folder: a reader sees the old file or the whole new one.

    Raises OSError that names path and free space where the disk is full.
    """
    try:
        _write_atomic(path, write)
    except OSError as error:
        if error.errno not in FULL or not path.parent.is_dir():
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        what = f"cannot write {path}: {os.strerror(error.errno)}; {free:.0f} MB are free there"
        raise OSError(error.errno, f"{what}. Make room and run the same command again") from error


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
    """SHA-256 of a file, None where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
