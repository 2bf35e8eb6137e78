"""Reads the files of a job from its folder results/<key>/, or else from a pack results/<name>.zip."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from functools import cached_property
from pathlib import Path

from bench.atomic import kind_of, open_regular, unless_gone
from bench.planning.job_json import KEY
from bench.records.packs import JOB, NAMES, RECORD, Packs
from bench.records.record import Record

BLOCKS = "blocks"  # the folder of the unfinished work of a job


class JobFiles:
    """The files of every job in a results folder, whether it has a folder or is in a pack."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def packs(self) -> Packs:
        """The published records in this folder, by key. Raises PackError if a pack is damaged."""
        return Packs(self.root)

    def place(self, key: str) -> Path:
        """Where the folder of a job is. Raises ValueError unless the key is 12 hexadecimal digits (a path)."""
        if not KEY.fullmatch(key):
            raise ValueError(f"'{key}' is not a job key; expected 12 hexadecimal digits")
        return self.root / key

    def folder(self, key: str) -> Path:
        """The folder of a job. Raises ValueError for what cannot be a key, and for a link in its place."""
        folder = self.place(key)
        if folder.is_symlink():
            raise ValueError(f"{folder} is a link; job folders must be real ones")
        return folder

    def keys(self) -> list[str]:
        """Every job that has a folder or is in a pack, sorted."""
        named = self._named()
        return sorted({name for name, kind in named.items() if not kind} | (self.packs.keys() - named.keys()))

    def odd_places(self) -> dict[str, str]:
        """The links and files that have the name of a job, in place of its folder, with their kind."""
        return {name: kind for name, kind in self._named().items() if kind}

    def _named(self) -> dict[str, str]:
        paths = sorted(self.root.iterdir()) if self.root.is_dir() else ()
        found = {path.name: path.lstat() for path in paths if KEY.fullmatch(path.name)}
        return {name: "" if stat.S_ISDIR(at.st_mode) else kind_of(at) or "a file" for name, at in found.items()}

    def packed(self, key: str) -> bool:
        """Is a job read from a pack? Not where it has a folder with job.json or record.json."""
        if key not in self.packs:
            return False
        folder = self.folder(key)
        return not ((folder / JOB).exists() or (folder / RECORD).exists())

    def read(self, key: str, name: str) -> bytes | None:
        """The content of a file of a job, from its folder or its pack; None if there is none.

        Raises ValueError, as `open` does, for what is not a regular file.
        """
        try:
            with self.open(key, name) as file:
                return file.read()
        except FileNotFoundError:
            return None

    def open(self, key: str, name: str) -> io.BufferedReader | io.BytesIO:
        """A file of a job, opened for reading. Raises FileNotFoundError if there is none, ValueError for an odd one."""
        data = self.packs[key].read(key, name) if name in NAMES and self.packed(key) else None
        try:
            return open_regular(self.folder(key) / name) if data is None else io.BytesIO(data)
        except PermissionError as error:
            raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None

    def has(self, key: str, name: str) -> bool:
        """Has a job anything of this name, in its folder or its pack?"""
        if name in NAMES and self.packed(key):
            return name in self.packs[key].members[key]
        return os.path.lexists(self.folder(key) / name)

    def size_of(self, key: str, name: str) -> int | None:
        """Bytes of a file of a job, None if there is none."""
        if name in NAMES and self.packed(key):
            member = self.packs[key].members[key].get(name)
            return None if member is None else member.file_size
        try:
            return (self.folder(key) / name).lstat().st_size
        except FileNotFoundError:
            return None

    def hash_of(self, key: str, name: str) -> str | None:
        """SHA-256 of a file of a job, None if there is none. Raises ValueError for what is not a regular file."""
        try:
            with self.open(key, name) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def matches(self, key: str, name: str, record: Record | None) -> bool:
        """Is a file of a job here, with the hash that its record names?"""
        expected = record.files.get(name) if record is not None else None
        try:
            return expected is not None and self.hash_of(key, name) == expected
        except ValueError:
            return False

    def damaged(self, key: str, record: Record) -> dict[str, str]:
        """What is wrong with each file of a record that exists and is not what the record names, by its name."""
        found: dict[str, str] = {}
        for name, expected in sorted(record.files.items()):
            try:
                if self.hash_of(key, name) not in (None, expected):
                    found[name] = f"{name} does not match its SHA-256"
            except ValueError as problem:
                found[name] = str(problem)
        return found

    def odd_files(self, key: str) -> dict[str, str]:
        """What in the folder of a job is neither a regular file nor the folder of its blocks, with its kind."""
        folder = self.folder(key)
        held = {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}
        if (blocks := held.get(BLOCKS)) and stat.S_ISDIR(blocks.lstat().st_mode):
            del held[BLOCKS]
            held |= {f"{BLOCKS}/{path.name}": path for path in sorted(blocks.iterdir())}
        found = dict[str, str]()
        for name, path in held.items():
            with unless_gone():  # temporary files and leases of other processes
                if kind := kind_of(path.lstat()):
                    found[name] = kind
        return found
