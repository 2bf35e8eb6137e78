"""What the attacks of `autoattack_fast` share: rows (an image and a target class), found images, streams of numbers.

Many rows go through the net in one pass. Rows of images that are broken leave at once, since their verdict is known.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bench.core.classifier import Counted, predicted
from bench.core.epsilon import reach
from bench.core.precision import bf16_pays, clock
from bench.core.rng import seed
from bench.core.threat import Threat

SHRINK = 0.9  # rows are gathered anew once less than this share of them is left
PROBED, PASS_S = 16, 0.04  # of the probe of bf16: images of its first pass, seconds that a pass may take

Note = Callable[[float], None]  # reports the share of a stage that is done


class Found:
    """The images under attack (b c h w), their labels, and the adversarial image of each that is broken.

    `number`: the attack under way, counted from 1; `stage`: that which broke each image, -1 for none.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> None:
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.x_adv = x.clone()
        self.stage = torch.full((len(x),), -1, dtype=torch.int8, device=x.device)
        self.number = 0

    @property
    def robust(self) -> Tensor:
        """Images that nothing has broken, bool of shape b."""
        return self.stage < 0

    def before(self, number: int) -> Tensor:
        """Images that no attack before this one broke; the same before and after a restart."""
        return (self.stage < 0) | (self.stage >= number)

    def offer(self, image: Tensor, candidates: Tensor, hit: Tensor) -> None:
        """Take the candidates (r c h w) of rows where `hit` holds, one for each robust image. Each is verified by a
        pass of its own through the model, inside ball and box by float64."""
        hit = hit & self.robust[image]
        if not bool(hit.any()):
            return
        rows = hit.nonzero().squeeze(1)
        first = torch.full((len(self.x),), len(image), device=rows.device).scatter_reduce(
            0, image[rows], rows, "amin", include_self=True
        )
        rows = first[first < len(image)]
        images, points = image[rows], candidates[rows].detach()
        centers = self.x[images].double()
        inside = (points.double() - centers).abs().flatten(1).amax(1) <= reach(self.threat.radius)
        inside &= (points.flatten(1).amin(1) >= 0) & (points.flatten(1).amax(1) <= 1)
        with torch.no_grad():
            inside &= predicted(self.model(points)) != self.y[images]
        self.x_adv[images[inside]] = points[inside]
        self.stage[images[inside]] = self.number


@dataclass
class Rows:
    """Rows of one pass. `image`: index of each row's image; `target`: its target class, None for untargeted rows;
    `rank`: place of the target among the wrong classes."""

    image: Tensor
    rank: Tensor
    target: Tensor | None

    def split(self, size: int) -> list[Rows]:
        """Parts of at most `size` rows."""
        targets = [None] * len(self.image) if self.target is None else list(self.target.split(size))
        parts = zip(self.image.split(size), self.rank.split(size), targets, strict=False)
        return [Rows(image, rank, target) for image, rank, target in parts]

    def kept(self, keep: Tensor) -> Rows:
        """The rows where `keep` holds."""
        return Rows(self.image[keep], self.rank[keep], None if self.target is None else self.target[keep])


def targeted(found: Found, images: Tensor, logits: Tensor, ranks: int) -> Rows:
    """Rows of images and their `ranks` most likely wrong classes; the most likely class of all images comes first, so
    that rows of images which it breaks never start."""
    order = logits.argsort(dim=1, descending=True)
    wrong = order[order != found.y[images][:, None]].view(len(images), -1)[:, :ranks]
    rank = torch.arange(wrong.shape[1], device=images.device).repeat_interleave(len(images))
    return Rows(images.repeat(wrong.shape[1]), rank, wrong.T.flatten())


def gather(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] in the memory layout of `x`."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def uniforms(shape: tuple[int, ...], key: int, rows: Rows) -> Tensor:
    """Numbers in [0, 1) of this shape for each row, from a stream of its own: `key`, image and rank of the target
    determine it, so that batches, shards and restarts change nothing."""
    drawn = torch.empty((len(rows.image), *shape))
    for place, (image, rank) in enumerate(zip(rows.image.tolist(), rows.rank.tolist(), strict=True)):
        torch.rand(shape, generator=torch.Generator().manual_seed(seed(key, image, rank)), out=drawn[place])
    return drawn.to(rows.image.device)


def arithmetic(precision: str, x: Tensor) -> AbstractContextManager[object]:
    """Context of gradient passes: bfloat16 where it is asked for, else that of the model."""
    return torch.autocast(x.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def gradients_in_bf16_pay(model: nn.Module, x: Tensor, size: int) -> bool:
    """Are gradient passes over `size` of these images at least 1.5 times as fast in bf16? Tried over fewer images where
    passes are slow, and not counted as passes."""
    model = model.model if isinstance(model, Counted) else model

    def gradient(precision: str, images: int) -> None:
        point = gather(x, torch.arange(images, device=x.device) % len(x)).requires_grad_()
        with arithmetic(precision, point):
            logits = model(point)
        torch.autograd.grad(logits.float().square().sum(), point)

    def seconds(images: int) -> float:
        started = clock(x.device)
        gradient("fp32", images)
        return clock(x.device) - started

    count = min(size, PROBED)
    gradient("fp32", count)
    while count < size and seconds(count) < PASS_S:
        count = min(size, 2 * count)
    return bf16_pays(partial(gradient, images=count), x.device)


class PoolBySlices(TorchFunctionMode):
    """Context of passes without gradients on a CPU: max-pooling over windows of 2 x 2 as the maximum of four slices.

    The numbers are the same; with few channels in channels_last it takes a tenth of the time of `max_pool2d`, which
    also stores where each maximum was. Not for gradients: of equal pixels `max_pool2d` passes it to the first alone.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_max_pool2d if func is F.max_pool2d else func)(*args, **(kwargs or {}))


def _max_pool2d(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, **more: Any) -> Any:
    two = (2, (2, 2), [2, 2])
    plain = padding in (0, (0, 0)) and more.get("dilation", 1) == 1
    plain = plain and not more.get("ceil_mode") and not more.get("return_indices")
    even = x.dim() == 4 and x.shape[2] % 2 == x.shape[3] % 2 == 0 and not x.requires_grad and x.device.type == "cpu"
    if not (plain and even and kernel_size in two and stride in (None, *two)):
        return F.max_pool2d(x, kernel_size, stride, padding, **more)
    rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])
