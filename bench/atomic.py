"""Files of the store. Writes are atomic: temporary file, fsync, rename, fsync of the folder. Reads take what may come
from strangers: a link, a FIFO or a file of many GB in place of a record is an error that names it, never a wait.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
MOST_BYTES = {"": 2**10, ".json": 2**23, ".jsonl": 2**26, ".npz": 2**30}  # of a file that is read whole, by suffix
LARGEST = 2**36  # bytes of every other file: weights, images, logs
DEEPEST = 50  # levels of lists and objects in a JSON file
_KINDS = {
    **{stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"},
    **dict.fromkeys((stat.S_IFCHR, stat.S_IFBLK), "a device"),
}
_REFUSED = {errno.ELOOP: "is a link", errno.ENXIO: "is a socket"}
_CAREFUL = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
_EXPECTED = "results hold regular files only"
_DEEP = f"it has more than {DEEPEST} levels of lists and objects"
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
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text by write_atomic."""
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
    free = shutil.disk_usage(path.parent).free
    wanted = "" if need is None else f"{size_text(need)} are needed, "
    what = f"cannot write {path}: {os.strerror(error.errno or 0)}; {wanted}{size_text(free)} are free there"
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


def open_regular(path: Path) -> io.BufferedReader:
    """A file of the store, opened for reading. Follows no link and does not wait for the writer of a FIFO.

    Raises FileNotFoundError if there is none, and ValueError that names it for anything but a regular file of at most
    MOST_BYTES. Kind and size are those of the opened file: nobody can exchange it meanwhile.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | _CAREFUL)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise ValueError(f"{path} {_REFUSED[error.errno]}; {_EXPECTED}") from None
    found, most = os.fstat(descriptor), MOST_BYTES.get(path.suffix, LARGEST)
    if odd := kind_of(found):
        problem = f"{path} is {odd}; {_EXPECTED}"
    elif found.st_size > most:
        problem = f"{path} has {size_text(found.st_size)}; expected at most {size_text(most)}"
    else:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ValueError(problem)


def kind_of(status: os.stat_result) -> str:
    """What a file is, such as "a FIFO"; empty for a regular one."""
    return "" if stat.S_ISREG(status.st_mode) else _KINDS.get(stat.S_IFMT(status.st_mode), "no file")


def read_json(path: Path) -> Any:
    """The value of a JSON file of the store. Raises what `open_regular` and `parse_json` raise."""
    with open_regular(path) as file:
        return parse_json(file.read())


def parse_json(data: bytes, finite: bool = True) -> Any:
    """The value of a JSON text.

    Raises ValueError for what is not JSON, has more than DEEPEST levels, or holds a number that is not finite (unless
    `finite` is false), an integer of more than 64 bits or half a surrogate pair.
    """
    number = _finite if finite else float
    try:
        values = json.loads(data.decode(), parse_int=_integer, parse_float=number, parse_constant=number)
        _refuse_deep(values, DEEPEST)
    except RecursionError:
        raise ValueError(_DEEP) from None
    return values


def _integer(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"an integer of {len(text)} digits; expected at most 64 bits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is not finite")
    return number


def _refuse_deep(values: Any, levels: int) -> None:
    if isinstance(values, str):
        values.encode()
    elif isinstance(values, (list, dict)):
        if levels == 0:
            raise ValueError(_DEEP)
        for each in values if isinstance(values, list) else (*values, *values.values()):
            _refuse_deep(each, levels - 1)


def size_text(count: float) -> str:
    """A number of bytes as 900 bytes, 12 KB, 340 MB or 2.5 GB."""
    if count < 2**10:
        return f"{count:.0f} bytes"
    if count < 2**20:
        return f"{count / 2**10:.0f} KB"
    return f"{count / 2**20:.0f} MB" if count < 2**30 else f"{count / 2**30:.1f} GB"


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file that the user named, None if there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
