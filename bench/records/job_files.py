"""Reads the files of a job from its folder results/<key>/, or else from a pack results/<name>.zip."""

from __future__ import annotations

import hashlib
import io
import re
from functools import cached_property
from pathlib import Path
from typing import IO

from bench.atomic import file_hash
from bench.records.packs import JOB, NAMES, RECORD, Packs
from bench.records.record import Record

KEY = re.compile(r"[0-9a-f]{12}")


class JobFiles:
    """The files of every job in a results folder, whether it has a folder or is in a pack."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def packs(self) -> Packs:
        """The published records in this folder, by key. Raises PackError if a pack is damaged."""
        return Packs(self.root)

    def folder(self, key: str) -> Path:
        """The folder of a job. Raises ValueError unless the key is 12 hexadecimal digits (it becomes a path)."""
        if not KEY.fullmatch(key):
            raise ValueError(f"'{key}' is not a job key; expected 12 hexadecimal digits")
        folder = self.root / key
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link; job folders must be real ones")
        return folder

    def keys(self) -> list[str]:
        """Every job that has a folder or is in a pack, sorted."""
        paths = self.root.iterdir() if self.root.is_dir() else []
        folders = {p.name for p in paths if KEY.fullmatch(p.name) and p.is_dir() and not p.is_symlink()}
        return sorted(folders | self.packs.keys())

    def packed(self, key: str) -> bool:
        """Is a job read from a pack? Not where it has a folder with job.json or record.json."""
        if key not in self.packs:
            return False
        folder = self.folder(key)
        return not ((folder / JOB).exists() or (folder / RECORD).exists())

    def read(self, key: str, name: str) -> bytes | None:
        """The content of a file of a job, from its folder or its pack; None if there is none."""
        if name in NAMES and self.packed(key):
            return self.packs[key].read(key, name)
        try:
            return (self.folder(key) / name).read_bytes()
        except FileNotFoundError:
            return None

    def open(self, key: str, name: str) -> IO[bytes]:
        """A file of a job, opened for reading. Raises FileNotFoundError if there is none."""
        data = self.read(key, name) if name in NAMES and self.packed(key) else None
        return (self.folder(key) / name).open("rb") if data is None else io.BytesIO(data)

    def files(self, key: str) -> list[str]:
        """Names of the files of a job, sorted, in its folder and (where it is read from one) its pack."""
        packed = self.packs[key].members[key].keys() if self.packed(key) else set[str]()
        paths = self.folder(key).iterdir() if self.folder(key).is_dir() else ()
        return sorted({path.name for path in paths if path.is_file()} | packed)

    def has(self, key: str, name: str) -> bool:
        """Has a job this file, in its folder or its pack?"""
        if name in NAMES and self.packed(key):
            return name in self.packs[key].members[key]
        return (self.folder(key) / name).is_file()

    def size_of(self, key: str, name: str) -> int | None:
        """Bytes of a file of a job, None if there is none."""
        if name in NAMES and self.packed(key):
            member = self.packs[key].members[key].get(name)
            return None if member is None else member.file_size
        try:
            return (self.folder(key) / name).stat().st_size
        except FileNotFoundError:
            return None

    def hash_of(self, key: str, name: str) -> str | None:
        """SHA-256 of a file of a job, None if there is none."""
        if name in NAMES and self.packed(key):
            data = self.packs[key].read(key, name)
            return None if data is None else hashlib.sha256(data).hexdigest()
        return file_hash(self.folder(key) / name)

    def damaged(self, key: str, record: Record) -> list[str]:
        """Names of the files of a record that exist with another hash."""
        found = {name: self.hash_of(key, name) for name in record.files}
        return sorted(name for name, actual in found.items() if actual not in (None, record.files[name]))
