"""x' = argmin over random squares of margin(f(x'), y), accepted greedily: the next few squares of an image in one pass

Square Attack (Andriushchenko et al. 2020, arXiv 1912.00049) for Linf with AutoAttack's settings: p = 0.8, 5000 queries,
one restart, margin loss, schedule of p not rescaled. Only forward passes, always in the model's own arithmetic.

In the law of the authors' package, in which the images of a batch share their squares; here each image draws its own.
Every pixel is at one end of its interval, so that the state is one bit a pixel. Of the next squares of an image the
first that lowers the margin is accepted, and those behind it are judged again: they count as queries not yet made. A
square that changes nothing, or that was refused since the last acceptance, needs no pass to be refused.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attacks._rows import Found, Note, PoolBySlices, Rows, gather, uniforms
from bench.core.pgd import margin

QUERIES, SHARE = 5000, 0.8  # of an image; side^2 of the first squares as a share of the image
HALVED = (10, 50, 200, 500, 1000, 2000, 4000)  # queries after which the share is halved
AHEAD, WIDEST = 24, 6  # squares of an image that one round looks at, and that it judges at most


def square(
    found: Found, images: Tensor, key: int, size: int, note: Note, leave: dict[int, float] | None = None
) -> None:
    """Attack images; hits go to `found`. `size`: most rows in one pass.

    `leave`: an image leaves where its margin is larger than this number times the fall of the margin so far, by the
    number of queries made.
    """
    images = images[found.robust[images]]
    if len(images):
        with torch.no_grad():  # not inference_mode: a model may take a gradient of its own
            _Search(found, images, key, size).run(note, sorted((leave or {}).items()))


def sides(channels_first: tuple[int, ...]) -> Tensor:
    """The side of the square of each query for images c h w."""
    _, height, width = channels_first
    found = []
    for query in range(QUERIES):
        share = SHARE / 2 ** sum(query > bound for bound in HALVED)
        found.append(min(max(round(math.sqrt(share * height * width)), 1), height, width))
    return torch.tensor(found)


class _Search:
    """Images under attack. `high`: pixels at the upper end; `query`: the next of each image; `accepted`: the last that
    was taken; `least`: the margin of the true class, positive while the image is robust."""

    def __init__(self, found: Found, images: Tensor, key: int, size: int) -> None:
        self.found, self.images, self.size = found, images, size
        x, radius = gather(found.x, images), found.threat.radius
        self.low, self.top = (x - radius).clamp_min_(0), (x + radius).clamp_max_(1)
        channels, height, width = x.shape[1:]
        rows = Rows(images, torch.zeros_like(images), None)
        drawn = uniforms((channels * width + QUERIES * (2 + channels),), key, rows)
        stripes, squares = drawn.split([channels * width, QUERIES * (2 + channels)], dim=1)
        squares = squares.view(len(images), QUERIES, 2 + channels)
        self.side = sides(tuple(x.shape[1:])).to(x.device)
        self.row = (squares[:, :, 0] * (height - self.side)).to(torch.int16)
        self.column = (squares[:, :, 1] * (width - self.side)).to(torch.int16)
        self.up = squares[:, :, 2:] >= 0.5
        self.earlier = self._earlier()
        self.high = torch.empty_like(x, dtype=torch.bool).copy_(stripes.view(-1, channels, 1, width) >= 0.5)
        self.query = torch.zeros_like(images)
        self.accepted = torch.full_like(images, -1)
        with torch.no_grad():
            self.clean = -margin(found.model(x), found.y[images])
        self.least = self._margin(torch.arange(len(images), device=x.device), self.high)

    def _earlier(self) -> Tensor:
        """For each query the last one before it with the same square and signs; -1 for none."""
        code = self.row.long() * 10_000 + self.column
        for channel in range(self.up.shape[2]):
            code = 2 * code + self.up[:, :, channel]
        code = code * 10_000 + self.side
        order = code.argsort(dim=1, stable=True)
        inorder = code.gather(1, order)
        same = inorder[:, 1:] == inorder[:, :-1]
        before = torch.full_like(order, -1)
        return before.scatter(1, order[:, 1:], order[:, :-1].where(same, -1)).to(torch.int16)

    def _margin(self, rows: Tensor, high: Tensor) -> Tensor:
        """The margin of the true class of rows with these pixels at the upper end; those without are hits."""
        points = torch.where(high, gather(self.top, rows), gather(self.low, rows))
        images = self.images[rows]
        with PoolBySlices():
            logits = self.found.model(points)
        found = -margin(logits, self.found.y[images])
        self.found.offer(images, points, ~(found > 0))  # NaN is an error of the model too
        return found

    def run(self, note: Note, leave: list[tuple[int, float]]) -> None:
        """All queries of all images."""
        active = self._left(leave)
        while len(active):
            self._round(active)
            active = self._left(leave)
            note(float(self.query.float().mean()) / QUERIES)

    def _left(self, leave: list[tuple[int, float]]) -> Tensor:
        """The images to go on with."""
        goes_on = (self.least > 0) & (self.query < QUERIES)
        for queries, factor in leave:
            hopeless = self.least > factor * (self.clean - self.least)
            goes_on &= ~(hopeless & (self.query >= queries))
        return goes_on.nonzero().squeeze(1)

    def _round(self, active: Tensor) -> None:
        """Judge the next squares of each image: more of them where none was accepted for long, as many as fit."""
        queries = self.query[active][:, None] + torch.arange(AHEAD, device=active.device)
        inside = queries < QUERIES
        at = (active[:, None], queries.clamp_max(QUERIES - 1))
        judged = inside & (self.earlier[at] <= self.accepted[active][:, None]) & self._changes(active, at)
        width = (1 + (self.query - self.accepted)[active] // 2).clamp_max(max(1, min(WIDEST, self.size // len(active))))
        place = judged.cumsum(1)
        judged &= place <= width[:, None]
        row, ahead = judged.nonzero(as_tuple=True)
        margins = self.least.new_full(judged.shape, float("inf"))
        high = self._painted(active[row], queries[row, ahead])
        if len(row):
            margins[row, ahead] = self._margin(active[row], high)
        better = judged & ((margins < self.least[active][:, None]) | ~(margins > 0))
        taken = better.any(1)
        first = better.int().argmax(1)
        # without acceptance: on behind the last square that was judged, or behind all if fewer than `width` were left
        full = place[:, -1] >= width
        behind = torch.where(full, (place >= width[:, None]).int().argmax(1) + 1, inside.sum(1))
        self.query[active] += torch.where(taken, first + 1, behind)
        rows = active[taken]
        if len(rows):
            self.accepted[rows] = queries[taken, first[taken]]
            self.least[rows] = margins[taken, first[taken]]
            number = torch.full(judged.shape, -1, device=active.device)
            number[row, ahead] = torch.arange(len(row), device=active.device)
            self.high[rows] = high[number[taken, first[taken]]]

    def _window(self, at: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """First row, first column and side of the squares."""
        return self.row[at].long(), self.column[at].long(), self.side[at[1]]

    def _changes(self, active: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        """Would each square change a pixel? By sums over rectangles from the corner of the image."""
        high = self.high[active]
        count, channels = len(active), high.shape[1]
        sums = torch.zeros((count, channels, high.shape[2] + 1, high.shape[3] + 1), device=active.device)
        sums[:, :, 1:, 1:] = high.float().cumsum(2).cumsum(3)
        top, left, side = self._window(at)
        image = torch.arange(count, device=active.device)[:, None]

        def corner(row: Tensor, column: Tensor) -> Tensor:
            return sums[image, :, row, column]

        bottom, right = top + side, left + side
        filled = corner(bottom, right) - corner(top, right) - corner(bottom, left) + corner(top, left)
        aim = torch.where(self.up[at], side[..., None] ** 2, 0)
        return (filled != aim).any(2)

    def _painted(self, rows: Tensor, queries: Tensor) -> Tensor:
        """The pixels at the upper end after these squares, shape p c h w."""
        high = gather(self.high, rows)
        top, left, side = self._window((rows, queries))
        down, across = (torch.arange(length, device=rows.device) for length in high.shape[2:])
        inside_rows = (down >= top[:, None]) & (down < (top + side)[:, None])
        inside_columns = (across >= left[:, None]) & (across < (left + side)[:, None])
        window = inside_rows[:, None, :, None] & inside_columns[:, None, None, :]
        return torch.where(window, self.up[rows, queries][:, :, None, None], high, out=high)
