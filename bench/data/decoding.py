"""The images of a folder, decoded once and stored in the user's cache."""

import contextlib
import hashlib
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.atomic import write_atomic
from bench.data import folders
from bench.data.datasets import Facts
from bench.data.folders import Folder
from bench.data.vision import Bytes, Raw
from bench.terminal import counted


def decoded(images: Folder, facts: Facts, resize: bool, report: Callable[[str], None]) -> Raw:
    """Decoded images of a folder, from the cache unless the name, size or modification time of a file differs."""
    files = [*images.train, *images.test]
    content = hashlib.sha256(f"{facts.channels} {facts.size} {folders.stamp(images)}".encode()).hexdigest()
    place = hashlib.sha256(os.fsencode(f"{images.path.resolve()}\0{facts.size}\0{resize}")).hexdigest()[:12]
    cached = folders.cache() / f"folder-{place}-{content[:20]}.npz"
    x = _cached(cached, (len(files), facts.channels, facts.size, facts.size))
    if x is None:
        report(f"decoding {counted(len(files), 'image')} of {images.path}")
        x = _decode([images.path / relative for relative, _ in files], facts, resize)
        with contextlib.suppress(OSError):  # without a cache the next start is slower
            _write(cached, x, f"folder-{place}-*.npz")
    n, labels = len(images.train), np.array([label for _, label in files], dtype=np.int64)
    classes = tuple(name.encode(errors="backslashreplace").decode() for name in images.classes)  # for the report
    return Raw(classes, x[:n], labels[:n], x[n:], labels[n:])


def _cached(path: Path, shape: tuple[int, ...]) -> Bytes | None:
    """The cached images, or None if there are none or the file is damaged (zip has checksums)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x: Bytes = file["x"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return x if x.shape == shape and x.dtype == np.uint8 else None


def _write(path: Path, x: Bytes, older: str) -> None:
    """Write the cache atomically, and remove older ones of the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: np.savez(file, x=x))
    for old in set(path.parent.glob(older)) - {path}:
        old.unlink(missing_ok=True)


def _decode(paths: list[Path], facts: Facts, resize: bool) -> Bytes:
    """Images n c h w. Raises ValueError, naming the file, for one that is unreadable or of another size or mode."""
    from PIL import Image

    side, mode = facts.size, "L" if facts.channels == 1 else "RGB"
    x = np.empty((len(paths), side, side, facts.channels), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, path in enumerate(paths):
            try:
                with Image.open(path) as file:
                    image: Image.Image = file.convert(mode)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Warning) as error:
                raise ValueError(f"cannot read image {path}: {error}") from None
            if folders.mode_channels(file.mode) is None:
                raise ValueError(f"image {path} has mode {file.mode}; expected 8-bit gray or color")
            if image.size != (side, side) and not resize:
                raise ValueError(f"image {path} has size {image.size}; expected {side} x {side}, or give data.size")
            if image.size != (side, side):
                image = image.resize((side, side), Image.Resampling.BICUBIC)
            x[i] = np.asarray(image).reshape(side, side, facts.channels)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
