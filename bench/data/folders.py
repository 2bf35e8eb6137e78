"""Image folders: a listing of their files, and a hash of their content. Torch-free."""

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
    """List `folder:PATH`, that is PATH/train/<class>/* and PATH/test/<class>/*, without hidden files.

    A relative PATH is relative to `root` or, if it does not exist there, to the current folder. Raises
    FileNotFoundError or ValueError in one line.
    """
    layout = "{0}/train/<class>/* and {0}/test/<class>/*"
    written = name.removeprefix("folder:").strip()
    if not written:
        raise ValueError(f"folder: names no path; expected folder:PATH with {layout.format('PATH')}")
    relative = Path(written).expanduser()
    places = [root / relative, relative] if not relative.is_absolute() else [relative]
    path = next((place for place in places if place.is_dir()), None)
    if path is None:
        raise FileNotFoundError(f"no image folder {' or '.join(str(place) for place in places)}")
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise FileNotFoundError(f"no folder {path / part}; expected {layout.format(path)}")
    classes = _names(path / "train", folders=True)
    if len(classes) < 2:
        raise ValueError(f"{path / 'train'} has {len(classes)} class folders; expected at least 2")
    different = sorted(set(classes) ^ set(_names(path / "test", folders=True)))
    if different:
        raise ValueError(f"train and test of {path} differ in classes ({', '.join(different[:5])}); expected the same")
    return Folder(path, classes, _images(path, "train", classes), _images(path, "test", classes))


def content(images: Folder) -> str:
    """16 hex digits of SHA-256 over the bytes, the labels and the order of all images; part of the keys of jobs.

    Read from the user's cache unless the name, size or modification time of a file differs.
    """
    path_hash = hashlib.sha256(str(images.path.resolve()).encode()).hexdigest()[:12]
    cached, now = cache() / f"folder-{path_hash}.json", stamp(images)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(cached.read_text(encoding="utf-8"))
        if found["stamp"] == now:
            return str(found["content"])
    digest = hashlib.sha256()
    for part, listed in (("train", images.train), ("test", images.test)):
        for relative, label in listed:
            data = (images.path / relative).read_bytes()
            digest.update(f"{part} {label} {len(data)}\n".encode() + data)
    found = digest.hexdigest()[:16]
    with contextlib.suppress(OSError):  # without a cache the next start is slower
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_json(cached, {"stamp": now, "content": found})
    return found


def stamp(images: Folder) -> str:
    """Hash of the names, sizes and modification times of all files, by which a change is noticed without reading."""
    digest = hashlib.sha256()
    for relative, _ in (*images.train, *images.test):
        stat = (images.path / relative).stat()
        digest.update(f"{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def cache() -> Path:
    """The user's cache folder: BENCH_CACHE, or the default of the operating system."""
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
