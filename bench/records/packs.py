"""Packs: results/<name>.zip holds the published records of a matrix and is read without unpacking.

Members are <key>/{job.json, record.json, samples.npz, train.jsonl}, sorted by name, uncompressed (git compresses them),
with a fixed time: equal records give equal bytes with every version of zlib, and no member is larger than its file. A
job with a folder of its own is read from there. Packs may share jobs (specs share trainings) that are equal in all.
"""

from __future__ import annotations

import re
import weakref
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from bench.atomic import open_regular, write_atomic

JOB, RECORD, SAMPLES, LOG = "job.json", "record.json", "samples.npz", "train.jsonl"
NAMES = (JOB, RECORD, SAMPLES, LOG)  # the files of a job that are published
SUFFIX = ".zip"
TIME = (1980, 1, 1, 0, 0, 0)  # of every member
_MEMBER = re.compile(rf"([0-9a-f]{{12}})/({'|'.join(map(re.escape, NAMES))})")


class PackError(Exception):
    """A pack cannot be used. Not a ValueError, which readers that tolerate a damaged job catch."""


class Pack:
    """One pack, opened for reading. Raises PackError if its table of contents is not that of a pack."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members: dict[str, dict[str, zipfile.ZipInfo]] = {}
        try:
            opened = open_regular(path)
            weakref.finalize(self, opened.close)
            self._file = zipfile.ZipFile(opened)
        except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError) as problem:
            raise self.error(str(problem)) from None
        try:
            self._index()
        except PackError:
            self._file.close()
            raise

    def error(self, reason: str) -> PackError:
        """What is wrong with this pack, and what to do."""
        return PackError(f"{self.path} is not a usable pack of records: {reason}. Restore it or move it elsewhere")

    def read(self, key: str, name: str) -> bytes | None:
        """The content of a file of a job, None if the pack has none. Raises PackError if it is damaged."""
        member = self.members.get(key, {}).get(name)
        if member is None:
            return None
        try:
            return self._file.read(member)
        except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as problem:
            raise self.error(f"{member.filename} is damaged ({problem})") from None

    def _index(self) -> None:
        total = 0
        for member in self._file.infolist():
            found = _MEMBER.fullmatch(member.filename)
            if found is None:
                expected = f"expected <key>/ and one of {', '.join(NAMES)}"
                raise self.error(f"it holds {member.filename[:80]!a}; {expected}")
            key, name = found.groups()
            if name in self.members.setdefault(key, {}):
                raise self.error(f"it holds {member.filename} twice")
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise self.error(f"{member.filename} is compressed; members of a pack are stored as they are")
            self.members[key][name] = member
            total += member.compress_size
        if total > self.path.stat().st_size:
            raise self.error("its members are larger than the file")
        if not self.members:
            raise self.error("it holds no job")
        for key, names in self.members.items():
            if not {JOB, RECORD} <= names.keys():
                raise self.error(f"job {key} lacks {' and '.join(sorted({JOB, RECORD} - names.keys()))}")


class Packs(Mapping[str, Pack]):
    """The pack of each job that any pack in a folder holds, by key. Reads the tables of contents once, when made."""

    def __init__(self, folder: Path) -> None:
        self._packs: dict[str, Pack] = {}
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            pack = Pack(path)
            for key in pack.members:
                other = self._packs.setdefault(key, pack)
                if other is not pack and _contents(other, key) != _contents(pack, key):
                    raise PackError(f"{other.path} and {path} hold different records of job {key}; move one elsewhere")

    def __getitem__(self, key: str) -> Pack:
        return self._packs[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packs)

    def __len__(self) -> int:
        return len(self._packs)


def _contents(pack: Pack, key: str) -> dict[str, tuple[int, int]]:
    return {name: (member.file_size, member.CRC) for name, member in pack.members[key].items()}


def write(path: Path, jobs: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write a pack of jobs (key, and content by file name) atomically; equal content gives equal bytes."""
    files = {f"{key}/{name}": data for key, contents in jobs for name, data in contents.items()}

    def save(file: object) -> None:
        with zipfile.ZipFile(file, "w") as pack:  # type: ignore[call-overload]
            for name in sorted(files):
                member = zipfile.ZipInfo(name, TIME)
                member.create_system, member.external_attr = 3, 0o644 << 16  # as on Unix, wherever it is written
                pack.writestr(member, files[name])

    write_atomic(path, save)
