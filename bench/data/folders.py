"""Image folders: what lies in them, and whether it is still what it was. Torch-free."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from bench.atomic import write_json

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff")


@dataclass(frozen=True)
class Folder:
    """An image folder: `train` and `test` list (path relative to `path`, class index), sorted."""

    path: Path
    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def find(name: str, root: Path) -> Folder:
    """List `folder:PATH`, that is PATH/train/<class>/* and PATH/test/<class>/*; hidden files are passed over.

    A relative PATH is looked for below `root` first, then in the current folder. Raises FileNotFoundError or
    ValueError in one line.
    """
    written = name.removeprefix("folder:").strip()
    if not written:
        raise ValueError(
            "folder: names no path; expected folder:PATH with PATH/train/<class>/* and PATH/test/<class>/*"
        )
    relative = Path(written).expanduser()
    places = [root / relative, relative] if not relative.is_absolute() else [relative]
    path = next((place for place in places if place.is_dir()), None)
    if path is None:
        raise FileNotFoundError(f"no image folder {' or '.join(str(place) for place in places)}")
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise FileNotFoundError(
                f"no folder {path / part}; expected {path}/train/<class>/* and {path}/test/<class>/*"
            )
    classes = _names(path / "train", folders=True)
    if len(classes) < 2:
        raise ValueError(f"{path / 'train'} has {len(classes)} class folders; expected at least 2")
    different = sorted(set(classes) ^ set(_names(path / "test", folders=True)))
    if different:
        raise ValueError(f"train and test of {path} differ in classes ({', '.join(different[:5])}); expected the same")
    return Folder(path, classes, _images(path, "train", classes), _images(path, "test", classes))


def content(images: Folder) -> str:
    """16 hex digits of SHA-256 over the bytes, the labels and the order of all images, by which a changed folder makes
    new jobs. Kept in the user's cache for as long as no file's name, size or time of change differs."""
    place = hashlib.sha256(str(images.path.resolve()).encode()).hexdigest()[:12]
    kept, now = cache() / f"folder-{place}.json", stamp(images)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["stamp"] == now:
            return str(found["content"])
    digest = hashlib.sha256()
    for part, listed in (("train", images.train), ("test", images.test)):
        for relative, label in listed:
            held = (images.path / relative).read_bytes()
            digest.update(f"{part} {label} {len(held)}\n".encode() + held)
    found = digest.hexdigest()[:16]
    with contextlib.suppress(OSError):  # without a cache the next start is slower, not wrong
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, {"stamp": now, "content": found})
    return found


def stamp(images: Folder) -> str:
    """SHA-256 over the names, sizes and times of change of all files: without one being read, whether any changed."""
    digest = hashlib.sha256()
    for relative, _ in (*images.train, *images.test):
        stat = (images.path / relative).stat()
        digest.update(f"{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def cache() -> Path:
    """The user's cache folder: BENCH_CACHE, or the system's place for it."""
    import platformdirs

    return Path(os.environ.get("BENCH_CACHE") or platformdirs.user_cache_dir("defense-bench")).expanduser()


def _names(path: Path, *, folders: bool) -> tuple[str, ...]:
    with os.scandir(path) as entries:
        found = [e.name for e in entries if not e.name.startswith(".") and (e.is_dir() if folders else e.is_file())]
    return tuple(sorted(found))


def _images(path: Path, part: str, classes: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    found: list[tuple[str, int]] = []
    for label, name in enumerate(classes):
        place = path / part / name
        files = [file for file in _names(place, folders=False) if file.lower().endswith(_SUFFIXES)]
        if not files:
            raise ValueError(f"no images in {place}; expected {', '.join(_SUFFIXES)}")
        found += [(f"{part}/{name}/{file}", label) for file in files]
    return tuple(found)
