"""Images as uint8 tensors on the device: loading, fixed subsets, and batches that are cropped and mirrored there."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.rng import seed as named_seed
from bench.data import datasets, folders
from bench.data.datasets import Facts
from bench.data.decoding import decoded
from bench.data.vision import Bytes, Labels, read
from bench.terminal import counted


class Images(NamedTuple):
    """Images `x` (uint8, n c h w) and labels `y` (int64, n), both on the device."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Data:
    """A loaded data set. `test_hash`: hash of pixels and labels of the test subset, so that results on different test
    images are never mixed. `validation` may be empty."""

    facts: Facts
    class_names: tuple[str, ...]
    train: Images
    validation: Images
    test: Images
    test_hash: str


def load(
    name: str,
    *,
    root: Path,
    device: torch.device,
    size: int | None = None,
    train: int | None = None,
    test: int | None = None,
    validation: int = 0,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
) -> Data:
    """Load data set `name` from `root` to `device`, after a download if torchvision has one.

    `test`: number of test images, the first ones, in a folder after one fixed permutation, so that smaller subsets are
    parts of larger ones. `train`: number of training images, the first ones after a fixed permutation (None: all, in
    order). Neither depends on `seed`; the choice of the `validation` images out of those `train` does, and in a folder
    their order, so that the first ones are of all classes. `report` is called with a description of what takes long.
    Raises LookupError, ValueError, FileNotFoundError or ConnectionError in one line.
    """
    report = report or (lambda note: None)
    facts = datasets.facts(name, root, size)
    in_folder = name.startswith("folder:")
    raw = decoded(folders.find(name, root), facts, size is not None, report) if in_folder else read(name, root, report)
    chosen, held_out = _split(_count("train", train, facts.train), facts.train, validation, seed)
    if in_folder:  # where classes stand one after another; the other data sets mix them
        held_out = held_out[_permutation(len(held_out), "validation order", seed)]
    n = _count("test", test, facts.test)
    order = _permutation(facts.test, "test")[:n] if in_folder else np.arange(n)

    def images(x: Bytes, y: Labels, index: Labels) -> Images:
        return Images(torch.from_numpy(x[index]).to(device), torch.from_numpy(y[index]).to(device))

    train_images, validation_images = (images(raw.train_x, raw.train_y, index) for index in (chosen, held_out))
    test_images = images(raw.test_x, raw.test_y, order)
    return Data(facts, raw.classes, train_images, validation_images, test_images, content_hash(test_images))


def with_validation_as_test(data: Data, n: int) -> Data:
    """The same data with the first `n` validation images in place of the test images."""
    images = Images(data.validation.x[:n], data.validation.y[:n])
    return replace(data, test=images, test_hash=content_hash(images))


def content_hash(images: Images) -> str:
    """16 hex digits of the SHA-256 of pixels and labels."""
    digest = hashlib.sha256(images.x.cpu().contiguous().numpy().data)
    digest.update(images.y.cpu().numpy().astype("<i8").data)
    return digest.hexdigest()[:16]


def to_float(x: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0,1], the same shape."""
    return x.to(torch.float32) / 255


def to_channels_last(x: Tensor) -> Tensor:
    """Images in channels_last memory format, like the weights of the nets, unless there is one channel only."""
    return x.contiguous(memory_format=torch.channels_last) if x.shape[1] > 1 else x


def batches(
    images: Images, batch_size: int, *, shuffle_seed: int, augment: bool, drop_last: bool, first: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One shuffled pass: images (float in [0,1], b c h w), labels, and their indices in `images`, all on its device.

    Order and augmentation depend on `shuffle_seed` only: not on the global generator, the device or the batch size.
    `first`: number of batches that are skipped at the start, at no cost.
    `augment` pads by an eighth of the side (4 pixels of 32) and crops, with uniform offsets; color images are mirrored
    with probability 1/2, gray ones are not, as they are mostly digits. Raises ValueError if there is no batch.
    """
    n = len(images.x)
    if batch_size < 1 or n == 0 or (drop_last and batch_size > n):
        raise ValueError(f"batch size is {batch_size} for {counted(n, 'image')}; expected 1 to {n}")
    places = range(first * batch_size, n - n % batch_size if drop_last else n, batch_size)
    return _pass(images, places, shuffle_seed, augment)


def test_block(data: Data, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Test images `start` to `stop` (exclusive) as floats in [0,1], and their labels. Raises ValueError outside."""
    if not 0 <= start < stop <= len(data.test.x):
        raise ValueError(f"test block {start}:{stop} is outside the {counted(len(data.test.x), 'test image')}")
    return to_float(data.test.x[start:stop]), data.test.y[start:stop]


def _pass(images: Images, places: range, seed: int, augmented: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    # All random numbers of the epoch are drawn at once: on the CPU, so that they do not depend on the device, and moved
    # in one transfer, so that no batch waits for one.
    n, channels, side = images.x.shape[:3]
    generator = torch.Generator().manual_seed(seed)
    pad = side // 8
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    mirror = torch.randint(0, 2 if channels == 3 else 1, (n,), generator=generator)
    index, dy, dx, flip = torch.stack([order, offsets[0], offsets[1], mirror]).to(images.x.device)
    for start in places:
        part = slice(start, min(start + places.step, places.stop))
        x = images.x[index[part]]
        if augmented:
            x = _crop(x, dy[part], dx[part], flip[part], pad)
        yield to_float(x), images.y[index[part]], index[part]


def _crop(x: Tensor, dy: Tensor, dx: Tensor, mirror: Tensor, pad: int) -> Tensor:
    """The h x w window of the padded image at row `dy`, column `dx`, mirrored where `mirror` is 1; each of length n."""
    n, c, h, w = x.shape
    padded = F.pad(x, (pad, pad, pad, pad))
    rows = dy[:, None] + torch.arange(h, device=x.device)
    across = torch.arange(w, device=x.device).expand(n, w)
    columns = dx[:, None] + torch.where(mirror[:, None] == 1, w - 1 - across, across)
    padded = padded.gather(2, rows[:, None, :, None].expand(n, c, h, padded.shape[3]))
    return padded.gather(3, columns[:, None, None, :].expand(n, c, h, w))


def _permutation(n: int, *parts: str | int) -> Labels:
    generator = torch.Generator().manual_seed(named_seed("subset", *parts))
    return torch.randperm(n, generator=generator).numpy()


def _split(n: int, available: int, validation: int, seed: int) -> tuple[Labels, Labels]:
    """Indices of the training and of the validation images, both in ascending order where all are used."""
    if not 0 <= validation < n:
        raise ValueError(
            f"validation is {validation}; expected 0 or more, and less than the {counted(n, 'training image')}"
        )
    chosen = np.arange(n) if n == available else _permutation(available, "train")[:n]
    mask = np.zeros(n, dtype=bool)
    mask[_permutation(n, "validation", seed)[:validation]] = True
    return chosen[~mask], chosen[mask]


def _count(part: str, requested: int | None, available: int) -> int:
    if requested is not None and not 0 < requested <= available:
        raise ValueError(f"{part} is {requested}, but the data set has {counted(available, f'{part} image')}")
    return requested or available
