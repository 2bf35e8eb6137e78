"""samples.npz -> NumPy arrays, for tables over thousands of evaluations: equal columns are unpacked once.

Evaluations of one test set store the same `index` and `label`. What was packed alike is one array here, which nobody
may write to; `numpy.load` would unpack it each time and parse its header by compiling it.
"""

from __future__ import annotations

import functools
import io
import struct
import zipfile
import zlib
from collections.abc import Container, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

# of the directory: number of members and where their entries begin; of an entry what follows its signature
_END = struct.Struct("<10xH4xI2x")
_ENTRY = struct.Struct("<10xH4xIIIHHH8xI")
SHARED = ("index", "label")


class Reader:
    """Reads columns; those that evaluations share are kept and given again."""

    def __init__(self) -> None:
        self._known: dict[bytes, Array] = {}

    def unpack(self, data: bytes, only: Container[str] | None) -> tuple[dict[str, Array], frozenset[str]]:
        """The columns of a file's content named in `only` (None: all), read-only, and the names of its others.

        Raises ValueError where the content is no such file.
        """
        try:
            members = list(_members(data))
        except (struct.error, UnicodeDecodeError) as problem:
            raise ValueError(f"no .npz file: {problem}") from None
        wanted = {m.name: self._column(m, data) for m in members if only is None or m.name in only}
        return wanted, frozenset(m.name for m in members) - wanted.keys()

    def _column(self, member: _Member, data: bytes) -> Array:
        packed = data[member.start : member.start + member.packed]
        if member.name not in SHARED:
            return _array(_unpacked(packed, member))
        found = self._known.get(packed)
        if found is None:
            found = self._known[packed] = _array(_unpacked(packed, member))
        return found


class _Member(NamedTuple):
    name: str
    method: int
    crc: int
    packed: int
    size: int
    start: int


def _members(data: bytes) -> Iterator[_Member]:
    """What the directory at the end of a zip file lists; `zipfile` takes ten times as long, and is for any zip file."""
    if len(data) < _END.size or data[-_END.size : -_END.size + 4] != b"PK\5\6":
        raise ValueError("no .npz file: it does not end as one")
    count, place = _END.unpack(data[-_END.size :])
    for _ in range(count):
        method, crc, packed, size, name, extra, comment, start = _ENTRY.unpack_from(data, place)
        named = data[place + _ENTRY.size : place + _ENTRY.size + name].decode()
        # the header before the member itself repeats the name, and may have other extras
        before = sum(struct.unpack_from("<HH", data, start + 26))
        yield _Member(named.removesuffix(".npy"), method, crc, packed, size, start + 30 + before)
        place += _ENTRY.size + name + extra + comment


def _unpacked(packed: bytes, member: _Member) -> bytes:
    raw = packed
    if member.method == zipfile.ZIP_DEFLATED:
        try:
            raw = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, member.size)
        except zlib.error:
            raise ValueError(f"column {member.name} is damaged") from None
    elif member.method != zipfile.ZIP_STORED:
        raise ValueError(f"column {member.name} is packed in a way that NumPy does not write")
    if len(raw) != member.size or zlib.crc32(raw) != member.crc:
        raise ValueError(f"column {member.name} is damaged")
    return raw


def _array(raw: bytes) -> Array:
    import numpy as np

    if len(raw) < 10 or raw[:6] != b"\x93NUMPY":
        raise ValueError("a column is no NumPy array")
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
    return shape, fortran, kind
