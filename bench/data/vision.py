"""Reading and downloading the known data sets, as arrays on the host.

torchvision is needed for downloads and for the files of CIFAR and SVHN only; its import takes seconds.
"""

import contextlib
import http.client
import importlib
import importlib.metadata
import os
import shutil
import socket
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.data import checksums, datasets

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]
_CLASSES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
_DIGITS = tuple("0123456789")
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_PAUSES = (2.0, 8.0)  # seconds between the tries of a download
_TIMEOUT = 60.0  # seconds without a byte after which a try has failed
_libraries: list[torch.library.Library] = []  # a declaration of operators lives as long as its Library object


class Raw(NamedTuple):
    """A whole data set on the host: images uint8 n c h w, labels int64 n."""

    classes: tuple[str, ...]
    train_x: Bytes
    train_y: Labels
    test_x: Bytes
    test_y: Labels


def read(name: str, root: Path, report: Callable[[str], None]) -> Raw:
    """A known data set, downloaded to `root` first if its files are absent, which is reported in words.

    Raises ValueError for a file with other content than the published one, and what `download` raises.
    """
    if name == "digits":
        return _digits()
    if datasets.missing(name, root):
        report(f"downloading {name} to {root}")
        download(name, root)
    datasets.check_files(name, root)
    if "mnist" in name:
        return _idx(name, root)
    checksums.check(name, root)
    try:
        train, test = (_open(name, root, train=part, download=False) for part in (True, False))
    except RuntimeError:
        raise ValueError(f"{name} under {root} is damaged (its MD5 sum is wrong); remove it, to load it anew") from None
    if name == "svhn":
        return Raw(_DIGITS, train.data, train.labels.astype(np.int64), test.data, test.labels.astype(np.int64))
    train_x, test_x = (np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)) for part in (train, test))
    train_y, test_y = (np.asarray(part.targets, dtype=np.int64) for part in (train, test))
    return Raw(tuple(train.classes), train_x, train_y, test_x, test_y)


def _digits() -> Raw:
    """scikit-learn's digits, from its own file: its import takes longer than a small job."""
    package = importlib.metadata.distribution("scikit-learn")
    table = np.loadtxt(str(package.locate_file("sklearn/datasets/data/digits.csv.gz")), delimiter=",")
    x = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)  # 0..16 -> 0..255
    y, n = table[:, -1].astype(np.int64), datasets.KNOWN["digits"].train
    return Raw(_DIGITS, x[:n], y[:n], x[n:], y[n:])


def _idx(name: str, root: Path) -> Raw:
    """MNIST's files, whose headers have been checked. Raises ValueError for a label above 9."""
    paths = [root / path for path in datasets.FILES[name]]
    train_x, train_y, test_x, test_y = (np.fromfile(p, np.uint8, offset=16 if "images" in p.name else 8) for p in paths)
    for path, y in ((paths[1], train_y), (paths[3], test_y)):
        if y.max() > 9:
            raise ValueError(f"{path} is damaged: it has the label {y.max()}, expected 0 to 9; put the true file there")
    x, test = train_x.reshape(-1, 1, 28, 28), test_x.reshape(-1, 1, 28, 28)
    classes = _CLOTHES if name == "fashion_mnist" else _DIGITS
    return Raw(classes, x, train_y.astype(np.int64), test, test_y.astype(np.int64))


def _open(name: str, root: Path, *, train: bool, download: bool) -> Any:
    """torchvision's data set. CIFAR's files are pickles: `read` has checked their SHA-256 before."""
    module = torchvision_datasets()
    if name == "svhn":
        return module.SVHN(str(root), split="train" if train else "test", download=download)
    return getattr(module, _CLASSES[name])(str(root), train=train, download=download)


def download(name: str, root: Path) -> None:
    """Download the absent files of `name` to `root` by torchvision, which checks their MD5 sums; three tries.

    Archives in `root` are unpacked without a network. Files appear under their names by a rename, so that a kill or a
    second process does no harm. Raises ConnectionError or FileNotFoundError in one line.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".download-", dir=root))
    except OSError as error:
        raise FileNotFoundError(
            f"no {name} in {root}, where it cannot be written ({error.strerror}); pass --data-dir"
        ) from None
    try:
        for archive in datasets.ARCHIVES.get(name, ()):
            if (root / archive).is_file():
                (staging / archive).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / archive, staging / archive)
        _fetch(name, staging, root)
        for path in datasets.missing(name, root):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / path, root / path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def bring(names: list[str], root: Path, note: Callable[[str], None]) -> list[str]:
    """Download those of these data sets that are absent from `root`, each once. Returns a line for each that cannot be
    had. `note` is called with what is downloaded."""
    problems = []
    for name in names:
        note(f"downloading {name} to {root}")
        try:
            download(name, root)
        except (ConnectionError, FileNotFoundError) as error:
            problems.append(str(error))
    return problems


def _fetch(name: str, staging: Path, root: Path) -> None:
    for pause in (*_PAUSES, None):
        try:
            with _timeout(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tarfile's, about filters, on some Python versions
                if name in checksums.FILES:
                    _unpack(name, staging)
                else:
                    for train in (True, False):
                        _open(name, staging, train=train, download=True)
            return
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            if pause is None:
                raise ConnectionError(_not_downloaded(name, root, error)) from error
            time.sleep(pause)


def _not_downloaded(name: str, root: Path, error: Exception) -> str:
    """The reason in a few words, and the files that the user can bring by hand."""
    corrupted = "corrupted" in str(error)  # torchvision's word for another MD5 sum
    reason = "the downloaded file is not the published one" if corrupted else "offline?"
    wanted = [path for path in (datasets.ARCHIVES.get(name) or datasets.FILES[name]) if not (root / path).is_file()]
    files = ", ".join(Path(path).name for path in wanted)
    place = (root / (wanted or datasets.FILES[name])[0]).parent
    return f"cannot download {name} ({reason}, {len(_PAUSES) + 1} tries); put {files} into {place}, or pass --data-dir"


def _unpack(name: str, folder: Path) -> None:
    """Download an archive of pickles to `folder` unless it is there, and unpack it, without opening a pickle."""
    known = getattr(torchvision_datasets(), _CLASSES[name])
    utils = importlib.import_module("torchvision.datasets.utils")
    utils.download_url(known.url, str(folder), known.filename, known.tgz_md5)
    checksums.check_archive(name, folder)
    with tarfile.open(folder / known.filename) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # type: ignore[assignment]  # 3.11.4 on
        archive.extractall(folder)  # noqa: S202  (its sum was just checked)


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torchvision sets none: a silent server would block a job forever
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def torchvision_datasets() -> ModuleType:
    """The module `torchvision.datasets`, imported on first use.

    PyPI's wheel of torchvision is built for CUDA: with a CPU-only torch its compiled operators do not load, and the
    import fails with "operator torchvision::nms does not exist". Its data sets do not need them: declarations of the
    operators are enough for the import. Raises ImportError in one line if torchvision does not fit torch otherwise.
    """
    if "torchvision" not in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some versions warn of the image codecs too, which are not used here
            try:
                _import_with_operators()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ImportError(
                    f"torchvision does not fit torch {torch.__version__} ({reason}); install the pair of one build"
                ) from error
    return importlib.import_module("torchvision.datasets")


def _import_with_operators() -> None:
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):  # all operators that torchvision uses without a check that they are there
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")
