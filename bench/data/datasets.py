"""Facts about data sets, and checks of their files that take milliseconds. Torch-free; `images` loads them."""

import difflib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from bench.data import checksums, folders
from bench.data.folders import Folder


@dataclass(frozen=True)
class Facts:
    """Properties of a data set: images `channels x size x size` in [0,1], normalized inside the model by `mean` and
    `std`.

    `train` and `test` count images, `augment` is the default of the recipe, `default_model` an architecture of
    `bench list models`, `title` one line for `bench list datasets`; `content` identifies the images of a folder.
    """

    name: str
    channels: int
    size: int
    classes: int
    train: int
    test: int
    augment: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    default_model: str
    title: str
    content: str = ""


_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_SVHN = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
_GRAY = (0.0,), (1.0,)  # images stay in [0,1], as in the MNIST nets of Madry and of TRADES
_PHOTOGRAPHS = (0.5,) * 3, (0.25,) * 3  # for image folders, whose own values would need a pass over all images
_NET = "preact_resnet18"

KNOWN: dict[str, Facts] = {
    facts.name: facts
    for facts in (
        Facts("digits", 1, 8, 10, 1437, 360, False, *_GRAY, "mlp", "scikit-learn's 8x8 digits, no download"),
        Facts("mnist", 1, 28, 10, 60_000, 10_000, False, *_GRAY, "lenet5", "handwritten digits"),
        Facts("fashion_mnist", 1, 28, 10, 60_000, 10_000, False, *_GRAY, "lenet5", "clothes in MNIST's format"),
        Facts("cifar10", 3, 32, 10, 50_000, 10_000, True, *_CIFAR10, _NET, "small photographs, 10 classes"),
        Facts("cifar100", 3, 32, 100, 50_000, 10_000, True, *_CIFAR100, _NET, "small photographs, 100 classes"),
        Facts("svhn", 3, 32, 10, 73_257, 26_032, False, *_SVHN, _NET, "street view house numbers"),
    )
}

_IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
# torchvision's layout below the root
FILES: dict[str, tuple[str, ...]] = {
    "digits": (),
    "mnist": tuple(f"MNIST/raw/{name}" for name in _IDX),
    "fashion_mnist": tuple(f"FashionMNIST/raw/{name}" for name in _IDX),
    **{name: tuple(sums) for name, sums in checksums.FILES.items()},
    "svhn": ("train_32x32.mat", "test_32x32.mat"),
}
# archives that torchvision downloads and unpacks; one in the root makes the download unnecessary
ARCHIVES: dict[str, tuple[str, ...]] = {
    **{name: tuple(f"{path}.gz" for path in FILES[name]) for name in ("mnist", "fashion_mnist")},
    "cifar10": ("cifar-10-python.tar.gz",),
    "cifar100": ("cifar-100-python.tar.gz",),
}


def facts(name: str, root: Path, size: int | None = None) -> Facts:
    """The facts of data set `name`; for `folder:PATH` counted from the directories and the headers of images.

    `size` (pixels) is the side a folder's images are resized to; without it the first image must be square.
    Raises LookupError for an unknown name, FileNotFoundError or ValueError for a folder that is not as expected.
    """
    if name.startswith("folder:"):
        return _folder_facts(name, folders.find(name, root), size)
    known = _known(name)
    if size is not None and size != known.size:
        raise ValueError(f"size is {size}, but {name} has {known.size} pixels a side; only folder:PATH is resized")
    return known


def data_root(option: str | Path | None) -> Path:
    """The folder of data sets: the option --data-dir, else BENCH_DATA, else `data` in the user's cache folder."""
    chosen = option or os.environ.get("BENCH_DATA")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return Path(platformdirs.user_cache_dir("defense-bench")) / "data"


def check(name: str, root: Path, *, explicit: bool, download: bool = True) -> None:
    """Reject a data set that cannot be loaded from `root`, in one line and without reading an image.

    `explicit`: the user named this root, so absent data is an error; elsewhere absent data is downloaded later unless
    `download` is False. Raises LookupError (unknown name), FileNotFoundError (absent), ValueError (another file).
    """
    if explicit and not root.is_dir():
        raise FileNotFoundError(f"no data folder {root}; --data-dir or BENCH_DATA names an existing one")
    if name.startswith("folder:"):
        folders.find(name, root)
        return
    _known(name)
    absent = missing(name, root)
    if not absent:
        check_files(name, root)
        return
    archives = ARCHIVES.get(name, ())
    archived = bool(archives) and all((root / path).is_file() for path in archives)
    if (explicit or not download) and not archived:
        hint = f"; did you mean {root.parent}?" if root.name == Path(absent[0]).parts[0] else ""
        raise FileNotFoundError(
            f"no {absent[0]} in {root}; expected torchvision's layout of {name}: {root / absent[0]}{hint}"
        )


def missing(name: str, root: Path) -> list[str]:
    """The files of a known data set that are absent below `root`, as relative paths."""
    return [path for path in FILES[name] if not (root / path).is_file()]


def check_files(name: str, root: Path) -> None:
    """Reject MNIST-like files with a wrong idx header or length, and empty files. Raises ValueError in one line."""
    for relative in FILES[name]:
        path = root / relative
        found = path.stat().st_size
        if found == 0:
            raise ValueError(f"{path} is empty, not {name}; remove it, or put the true file there")
        if not relative.endswith("-ubyte"):
            continue
        n = KNOWN[name].train if path.name.startswith("train") else KNOWN[name].test
        header = struct.pack(">4I", 0x803, n, 28, 28) if "images" in path.name else struct.pack(">2I", 0x801, n)
        expected = len(header) + n * (784 if "images" in path.name else 1)
        with path.open("rb") as file:
            start = file.read(len(header))
        if start[:4] != header[:4]:
            raise ValueError(f"{path} is not {name.upper()}: magic number {start[:4].hex()}, not {header[:4].hex()}")
        if start != header or found != expected:
            raise ValueError(f"{path} is not {name.upper()}: {found} bytes, expected {n} images in {expected} bytes")


def _known(name: str) -> Facts:
    if name in KNOWN:
        return KNOWN[name]
    near = difflib.get_close_matches(name.lower().replace("-", ""), KNOWN, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise LookupError(f"no data set '{name}'.{hint} Known: {', '.join(KNOWN)}, folder:PATH")


def _folder_facts(name: str, images: Folder, size: int | None) -> Facts:
    from PIL import Image

    first = images.path / images.train[0][0]
    try:
        with Image.open(first) as image:  # the header only
            (width, height), mode = image.size, image.mode
    except (OSError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"cannot read image {first}: {error}") from None
    if folders.mode_channels(mode) is None:
        raise ValueError(f"image {first} has mode {mode}; expected 8-bit gray or color")
    if size is None and width != height:
        raise ValueError(f"image {first} is {width} x {height}; expected a square, or give data.size to resize all")
    content, colored = folders.scan(images)
    side, channels = size or width, 3 if colored else 1
    if channels == 3:
        model = _NET if side >= 8 else "mlp"
    else:
        model = "lenet5" if side >= 14 and side % 2 == 0 else "mlp"
    counts = (len(images.classes), len(images.train), len(images.test))
    mean, std = _GRAY if channels == 1 else _PHOTOGRAPHS
    return Facts(name, channels, side, *counts, colored, mean, std, model, f"images of {images.path}", content)
