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
from collections.abc import Container
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

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
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                members = {member.filename.removesuffix(".npy"): member for member in file.infolist()}
                wanted = {
                    name: self._column(name, member, file, data)
                    for name, member in members.items()
                    if only is None or name in only
                }
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, struct.error) as problem:
            raise ValueError(f"no .npz file: {problem}") from None
        return wanted, frozenset(members) - wanted.keys()

    def _column(self, name: str, member: zipfile.ZipInfo, file: zipfile.ZipFile, data: bytes) -> Array:
        if name not in SHARED:
            return _array(file.read(member))
        # the header before the member itself repeats the name, and may have other extras
        start = member.header_offset + 30 + sum(struct.unpack_from("<HH", data, member.header_offset + 26))
        packed = data[start : start + member.compress_size]
        if packed not in self._known:
            self._known[packed] = _array(file.read(member))
        return self._known[packed]


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
