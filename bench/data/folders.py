"""Image folders: a listing of their files, and a hash of their content. Torch-free."""

import contextlib
import hashlib
import io
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.atomic import write_json
from bench.terminal import counted

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff")
_GRAY_MODES, _COLOR_MODES = ("1", "L", "LA"), ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class Folder:
    """An image folder: `train` and `test` list (path relative to `path`, class index), in the order of torchvision's
    ImageFolder. `passed_over`: number of files without the suffix of an image, or outside the class folders."""

    path: Path
    classes: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]
    passed_over: int = 0


class Scan(NamedTuple):
    """`content`: 16 hex digits of SHA-256 over the bytes, the labels and the order of all images; part of the keys of
    jobs. `colored`: whether any image is colored."""

    content: str
    colored: bool


def find(name: str, root: Path) -> Folder:
    """List `folder:PATH`, that is PATH/train/<class>/* and PATH/test/<class>/* with their subfolders.

    Hidden files are left out, as are files that are no images, which are counted.
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
    classes = _classes(path / "train")
    if len(classes) < 2:
        raise ValueError(f"{path / 'train'} has {counted(len(classes), 'class folder')}; expected at least 2")
    different = sorted(set(classes) ^ set(_classes(path / "test")))
    if different:
        raise ValueError(f"train and test of {path} differ in classes ({', '.join(different[:5])}); expected the same")
    (train, others), (test, more) = (_images(path, part, classes) for part in ("train", "test"))
    return Folder(path, classes, train, test, others + more)


def scan(images: Folder) -> Scan:
    """Read all images once: from the user's cache unless the name, size or modification time of a file differs."""
    path_hash = hashlib.sha256(os.fsencode(images.path.resolve())).hexdigest()[:12]
    cached, now = cache() / f"folder-{path_hash}.json", stamp(images)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(cached.read_text(encoding="utf-8"))
        if found["stamp"] == now:
            return Scan(str(found["content"]), bool(found["colored"]))
    digest, colored = hashlib.sha256(), False
    for part, listed in (("train", images.train), ("test", images.test)):
        for relative, label in listed:
            data = (images.path / relative).read_bytes()
            digest.update(f"{part} {label} {len(data)}\n".encode() + data)
            colored = colored or _is_colored(data)
    found = Scan(digest.hexdigest()[:16], colored)
    with contextlib.suppress(OSError):  # without a cache the next start is slower
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_json(cached, {"stamp": now, **found._asdict()})
    return found


def stamp(images: Folder) -> str:
    """Hash of the names, sizes and modification times of all files, by which a change is noticed without reading."""
    digest = hashlib.sha256()
    for relative, _ in (*images.train, *images.test):
        stat = (images.path / relative).stat()
        digest.update(os.fsencode(f"{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
    return digest.hexdigest()[:20]


def cache() -> Path:
    """The user's cache folder: BENCH_CACHE, or the default of the operating system."""
    import platformdirs

    return Path(os.environ.get("BENCH_CACHE") or platformdirs.user_cache_dir("defense-bench")).expanduser()


def mode_channels(mode: str) -> int | None:
    """1 for a gray PIL image mode, 3 for a colored one, None for one that is not supported (16-bit, float)."""
    return 1 if mode in _GRAY_MODES else 3 if mode in _COLOR_MODES else None


def _is_colored(data: bytes) -> bool:
    """Whether an image is colored by its header; False for one that cannot be read, which is an error when decoded."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                return mode_channels(image.mode) == 3
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return False


def _classes(path: Path) -> tuple[str, ...]:
    with os.scandir(path) as entries:
        return tuple(sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()))


def _images(path: Path, part: str, classes: tuple[str, ...]) -> tuple[tuple[tuple[str, int], ...], int]:
    """The images of a part with their labels, and the number of other files in it."""
    files = _files(path, part)
    images: dict[str, list[str]] = {name: [] for name in classes}
    for file in files:
        name = file.split("/")[1]
        if name in images and file.lower().endswith(_SUFFIXES) and (path / file).is_file():
            images[name].append(file)
    empty = [name for name in classes if not images[name]]
    if empty:
        raise ValueError(f"no images in {path / part / empty[0]}; expected {', '.join(_SUFFIXES)}")
    found = [(file, label) for label, name in enumerate(classes) for file in sorted(images[name], key=os.path.split)]
    return tuple(found), len(files) - len(found)


def _files(path: Path, folder: str) -> list[str]:
    """Paths relative to `path` of all files below `folder` that are not hidden."""
    found: list[str] = []
    with os.scandir(path / folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                relative = f"{folder}/{entry.name}"
                found += _files(path, relative) if entry.is_dir() else [relative]
    return found
