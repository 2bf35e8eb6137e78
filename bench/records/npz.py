"""Reads samples.npz for tables over thousands of evaluations.

Evaluations of one test set store equal columns `index` and `label`: equal compressed bytes are unpacked once, to one
read-only array. `numpy.load` would unpack them for each file, and parse each header with Python's parser.
"""

from __future__ import annotations

import functools
import io
import struct
import tokenize
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any

from bench.atomic import size_text

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

SHARED = ("index", "label")
MOST_BYTES = 2**30  # of the unpacked columns of one file
# columns that tables read
_WANTED = (
    "index", "label", "correct", "broken_at", "select", "share", "select_at", "share_at", "stage", "radius", "distance",
)  # fmt: skip
_MOST = 400_000_000  # bytes of columns in memory at a time
# what zipfile, zlib and NumPy's parser of headers raise for damaged or hostile content, besides ValueError
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, SyntaxError, TypeError, LookupError,
    MemoryError, OverflowError, OSError, struct.error, tokenize.TokenError,
)  # fmt: skip
_Held = tuple[dict[str, "Array"], frozenset[str]]  # columns, and names of the columns that were not read


class Reader:
    """Reads columns. Shared columns are unpacked once."""

    def __init__(self) -> None:
        self._known: dict[bytes, Array] = {}

    def unpack(self, data: bytes, only: Container[str] | None) -> tuple[dict[str, Array], frozenset[str]]:
        """The columns of a file's content named in `only` (None: all), read-only, and the names of its others.

        Raises ValueError if the content is not an .npz file.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                refuse_large(file.infolist())
                members = {member.filename.removesuffix(".npy"): member for member in file.infolist()}
                wanted = {
                    name: self._column(name, member, file, data)
                    for name, member in members.items()
                    if only is None or name in only
                }
        except _DAMAGE as problem:
            raise ValueError(f"not an .npz file: {problem}") from None
        return wanted, frozenset(members) - wanted.keys()

    def _column(self, name: str, member: zipfile.ZipInfo, file: zipfile.ZipFile, data: bytes) -> Array:
        if name not in SHARED:
            values = _array(file.read(member))
            if name == "correct" and values.ndim != 1:
                raise ValueError(f"column {name} has {values.ndim} dimensions; expected an outcome for each image")
            return values
        # the local header repeats the name and may have other extra fields
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", data, member.header_offset + 26))
        packed = data[start : start + member.compress_size]
        if packed not in self._known:
            values = _array(file.read(member))
            if values.dtype.kind not in "iu" or values.ndim != 1:
                raise ValueError(f"column {name} is not a list of integers")
            self._known[packed] = values
        return self._known[packed]


class ColumnCache:
    """Caches the columns of many files; beyond 400 MB the least recently used are dropped."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._reader, self._bytes = Reader(), 0

    def columns(self, key: str, only: Container[str] | None, read: Callable[[], bytes]) -> dict[str, Array]:
        """The columns of a file that are named in `only` (None: all), read-only; `read` returns the file's content."""
        held = self._held.get(key)
        if held is None:
            held = self._add(key, None if only is None else _WANTED, read())
        else:
            self._held.move_to_end(key)
        columns, others = held
        if others and (only is None or any(name in only for name in others)):
            columns, _ = self._reader.unpack(read(), only)
        return {name: values for name, values in columns.items() if only is None or name in only}

    def _add(self, key: str, only: Container[str] | None, data: bytes) -> _Held:
        held = self._held[key] = self._reader.unpack(data, only)
        self._bytes += _size(held)
        while self._bytes > _MOST and len(self._held) > 1:
            self._bytes -= _size(self._held.popitem(last=False)[1])
        return held


def _size(held: _Held) -> int:
    return sum(values.nbytes for name, values in held[0].items() if name not in SHARED)


def refuse_large(members: list[zipfile.ZipInfo]) -> None:
    """Raises ValueError if the columns would unpack to more than 1 GiB, which no evaluation writes."""
    size = sum(member.file_size for member in members)
    if size > MOST_BYTES:
        raise ValueError(f"its columns would unpack to {size_text(size)}; expected at most {size_text(MOST_BYTES)}")


def _array(raw: bytes) -> Array:
    import numpy as np

    if len(raw) < 10 or raw[:6] != b"\x93NUMPY":
        raise ValueError("a column is not a NumPy array")
    size = 10 + int.from_bytes(raw[8:10], "little") if raw[6] == 1 else 12 + int.from_bytes(raw[8:12], "little")
    shape, fortran, kind = _header(raw[:size])
    found = np.frombuffer(raw, dtype=kind, offset=size)
    return found.reshape(shape, order="F" if fortran else "C")


@functools.lru_cache(maxsize=256)
def _header(raw: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    from numpy.lib import format as npy

    file = io.BytesIO(raw)
    version = npy.read_magic(file)
    shape, fortran, kind = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    if kind.hasobject:
        raise ValueError("a column holds Python objects, which are never read")
    if kind.kind not in "biuf" or not shape:
        raise ValueError(f"a column is an array of {kind} of shape {shape}; expected numbers, a row for each image")
    return shape, fortran, kind
