"""A results folder as one command reads it: each file once, however many tables it goes into."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from pathlib import Path
from typing import Any

from bench.planning.job import Job
from bench.records.npz import SHARED, Reader
from bench.records.store import Store

_Held = tuple[dict[str, Any], frozenset[str]]  # columns, and the names of those that are in the file alone
# what tables ask for again and again
_WANTED = frozenset(
    (
        "index",
        "label",
        "correct",
        "broken_at",
        "select",
        "share",
        "select_at",
        "share_at",
        "stage",
        "radius",
        "distance",
    )
)
_MOST = 400_000_000  # bytes of columns kept at a time


class CachedStore(Store):
    """The same folder for readers alone. What it gave once it gives again: make a new one to see what a run adds.

    Records and arrays are shared between all who ask: nobody may change them.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._folders: dict[str, Path] = {}
        self._jobs: dict[str, Job] = {}
        self._records: dict[str, dict[str, Any] | None] = {}
        self._kept: OrderedDict[str, _Held] = OrderedDict()
        self._reader, self._bytes = Reader(), 0

    @classmethod
    def of(cls, store: Store) -> CachedStore:
        """This store read once; itself where it is one."""
        return store if isinstance(store, cls) else cls(store.root)

    def folder(self, key: str) -> Path:
        """As `Store.folder`."""
        found = self._folders.get(key)
        if found is None:
            found = self._folders[key] = super().folder(key)
        return found

    def job(self, key: str) -> Job:
        """As `Store.job`; what raises is read again."""
        found = self._jobs.get(key)
        if found is None:
            found = self._jobs[key] = super().job(key)
        return found

    def record(self, key: str) -> dict[str, Any] | None:
        """As `Store.record`."""
        if key not in self._records:
            self._records[key] = super().record(key)
        return self._records[key]

    def samples(self, key: str, only: Container[str] | None = None) -> dict[str, Any]:
        """As `Store.samples`; arrays are read-only."""
        held = self._kept.get(key)
        if held is None:
            held = self._keep(key, None if only is None else _WANTED)
        else:
            self._kept.move_to_end(key)
        columns, others = held
        if others and (only is None or any(name in only for name in others)):
            return super().samples(key, only)
        return {name: values for name, values in columns.items() if only is None or name in only}

    def _keep(self, key: str, only: Container[str] | None) -> _Held:
        held = self._kept[key] = self._reader.unpack(self.content(key), only)
        self._bytes += _size(held)
        while self._bytes > _MOST and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return held


def _size(held: _Held) -> int:
    return sum(values.nbytes for name, values in held[0].items() if name not in SHARED)
