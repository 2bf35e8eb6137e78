"""Images as uint8 tensors on the device: loading, fixed subsets, and batches with crop and flip made there."""

from __future__ import annotations

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
from bench.data import datasets, folders, vision
from bench.data.datasets import Facts
from bench.data.decoding import decoded
from bench.data.vision import Bytes, Labels

Report = Callable[[str], None]


class Images(NamedTuple):
    """Images `x` (uint8, n c h w) and labels `y` (int64, n), both on the device."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Data:
    """A loaded data set. `test_hash`: 16 hex digits of SHA-256 over pixels and labels of the test subset, so that
    results on different test images are never mixed. `validation` may be empty."""

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
    report: Report | None = None,
) -> Data:
    """Load data set `name` from `root`, downloading what torchvision can download, and hold it on `device`.

    `test`: the first so many test images, in a folder after one fixed permutation, so smaller subsets nest in larger
    ones. `train`: the first so many after a fixed permutation (None: all, in order). Neither depends on `seed`;
    the `validation` images, taken out of those `train`, do. `report` is told in words what takes long.
    Raises LookupError, ValueError, FileNotFoundError or ConnectionError in one line.
    """
    tell = report or (lambda note: None)
    facts = datasets.facts(name, root, size)
    if name.startswith("folder:"):
        raw = decoded(folders.find(name, root), facts, size is not None, tell)
    else:
        raw = vision.read(name, root, tell)
    kept, held_out = _split(_count("train", train, facts.train), facts.train, validation, seed)
    n = _count("test", test, facts.test)
    order = _permutation(facts.test, "test")[:n] if name.startswith("folder:") else np.arange(n)
    test_x, test_y = raw.test_x[order], raw.test_y[order]

    def held(x: Bytes, y: Labels) -> Images:
        return Images(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device))

    train_images, others = (held(raw.train_x[part], raw.train_y[part]) for part in (kept, held_out))
    return Data(facts, raw.classes, train_images, others, held(test_x, test_y), _digest(test_x, test_y))


def judged_by_validation(data: Data, n: int) -> Data:
    """The same data with the first `n` validation images in the place of the test images."""
    x, y = data.validation.x[:n], data.validation.y[:n]
    return replace(data, test=Images(x, y), test_hash=_digest(x.cpu().numpy(), y.cpu().numpy()))


def _digest(x: Bytes, y: Labels) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(x).data)
    digest.update(y.astype("<i8").data)
    return digest.hexdigest()[:16]


def to_float(x: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0,1], the same shape."""
    return x.to(torch.float32) / 255


def to_channels_last(x: Tensor) -> Tensor:
    """channels_last images where there is more than one channel to interleave (the nets' weights are already so)."""
    return x.contiguous(memory_format=torch.channels_last) if x.shape[1] > 1 else x


def augment(x: Tensor, *, pad: int, flip: bool) -> Tensor:
    """Random crops of the zero-padded images `x` (n c h w, any type), mirrored with probability 1/2 if `flip`.

    Offsets are uniform on 0..2 pad in each direction, drawn for each image from torch's global generator.
    """
    n, device = len(x), x.device
    dy, dx = torch.randint(0, 2 * pad + 1, (2, n), device=device)
    mirror = torch.randint(0, 2 if flip else 1, (n,), device=device)
    return _crop(x, dy, dx, mirror, pad)


def batches(
    images: Images, batch_size: int, *, shuffle_seed: int, augment: bool, drop_last: bool, first: int = 0
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One shuffled pass: images (float in [0,1], b c h w), labels, and their indices in `images`, all on its device.

    Order and augmentation depend on `shuffle_seed` only: not on the global generator, the device or the batch size.
    `first`: so many batches are left out at the start, at no cost.
    `augment` pads by an eighth of the side (4 pixels of 32) and crops; color images are mirrored too, gray ones are
    not, as they are mostly digits. Raises ValueError where no batch would come out.
    """
    n = len(images.x)
    if batch_size < 1 or n == 0 or (drop_last and batch_size > n):
        raise ValueError(f"batch size is {batch_size} for {n} images; expected 1 to {n}")
    places = range(first * batch_size, n - n % batch_size if drop_last else n, batch_size)
    return _pass(images, places, shuffle_seed, augment)


def test_block(data: Data, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Test images `start` to `stop` (exclusive) as floats in [0,1], and their labels. Raises ValueError outside."""
    if not 0 <= start < stop <= len(data.test.x):
        raise ValueError(f"test block {start}:{stop} lies outside the {len(data.test.x)} test images")
    return to_float(data.test.x[start:stop]), data.test.y[start:stop]


def _pass(images: Images, places: range, seed: int, augmented: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    # All random numbers of the epoch are drawn here at once: on the CPU, so that every device sees the same ones, and
    # moved in one go, so that no batch waits for a transfer.
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


def _permutation(n: int, *parts: object) -> Labels:
    generator = torch.Generator().manual_seed(named_seed("subset", *parts))
    return torch.randperm(n, generator=generator).numpy()


def _split(n: int, there: int, validation: int, seed: int) -> tuple[Labels, Labels]:
    """Indices of the training and of the validation images, both in ascending order where all are used."""
    if not 0 <= validation < n:
        raise ValueError(f"validation is {validation}; expected 0 or more, and less than the {n} training images")
    chosen = np.arange(n) if n == there else _permutation(there, "train")[:n]
    mask = np.zeros(n, dtype=bool)
    mask[_permutation(n, "validation", seed)[:validation]] = True
    return chosen[~mask], chosen[mask]


def _count(what: str, asked: int | None, there: int) -> int:
    if asked is not None and not 0 < asked <= there:
        raise ValueError(f"{what} is {asked}, but the data set has {there} {what} images")
    return asked or there
