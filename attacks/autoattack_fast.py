"""x' = the first of APGD-CE, targeted APGD-DLR, targeted FAB and Square to break f at x, many rows in one pass

AutoAttack's standard ensemble (Croce and Hein 2020, arXiv 2003.01690) for Linf and deterministic models, in our own
code: the budgets are the package's, a row is an image with a target class, and a row leaves the pass once its image is
broken. `mode=full` has the law of the package (tests/attacks/test_autoattack_fast.py compares attack by attack), with
other random numbers. In `mode=quick` rows without hope leave early, by limits that were set on three nets: no row of
the tables takes it for AutoAttack. Where a gradient is exactly zero, none leaves.

Differs from the package in FAB, which judges a point by the next gradient pass (a pass less a step, distances as
small), and in Square, where each image draws squares of its own instead of sharing them with its batch.

`audit=m` screens all images by targeted APGD-DLR on three targets, in quick mode, and runs the full suite on m random
images of those that survive. If it breaks none, the share of the other survivors that it would break has an exact
binomial bound whatever the screen is; if it breaks one, or if a gradient is exactly zero, it runs on all.

Images with a proof that no perturbation changes their prediction are left out (`interval`, attacks/_proofs.py): the
outcome is the same by the proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from attacks._apgd import apgd
from attacks._fab import fab
from attacks._proofs import proved_images
from attacks._rows import Found, Rows, gradients_in_bf16_pay, targeted
from attacks._square import square
from bench.core.attack import Attack, Columns, Context
from bench.core.rng import seed

STAGES = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETS, SCREENED = 9, 3  # target classes of the suite and of the screen
# without hope: loss of APGD by steps, distance of FAB in eps by steps, margin of Square over its fall by queries
LEAVE: dict[str, dict[int, float]] = {
    "apgd-t": {10: -0.35, 25: -0.25, 50: -0.15},
    "fab-t": {10: 2.5, 20: 1.6, 30: 1.25, 50: 1.08},
    "square": {201: 6.0, 501: 1.5, 1001: 0.7, 2001: 0.3},
}


@dataclass
class AutoAttackFast(Attack):
    """The standard ensemble, at a fraction of its time. Column `stage`: number of the attack that broke the image, -1
    for none; `proved` (no attack can, so none was made); with `audit` also `audited` (drawn for the full suite) and
    `screened` (not broken or proved, and not judged by the full suite); with `precision=auto` also `bf16` (what was
    chosen).
    """

    norms: ClassVar[tuple[str, ...]] = ("Linf",)
    needs_determinism: ClassVar[bool] = True
    block: ClassVar[int] = 1000
    cost: ClassVar[str] = "100F to 9000F"
    needed_classes: ClassVar[dict[str, int]] = {"full": 4, "quick": 4}
    test_settings: ClassVar[dict[str, Any]] = {"mode": "quick"}

    mode: Literal["full", "quick"] = "full"
    """full: all budgets of the package; quick: rows without hope leave early."""
    audit: Annotated[int, Ge(0)] = 0
    """Random survivors of a screen, in each block of images, that the suite judges; 0: it judges all images."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Arithmetic of gradient passes; auto: bf16 where it makes them at least 1.5 times as fast. Square and every
    verdict are in that of the model."""
    batch_size: Annotated[int, Gt(0)] = 512
    """Rows in one pass."""
    block_size: Annotated[int, Gt(0)] = 1000
    """Images in a block, the unit of seeds and shards."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        """For each image the result of the first attack that breaks it, else the image itself."""
        run = _Run(self, Found(model, x, y, self.threat), ctx)
        proved = proved_images(model, x, y, self.threat)
        everything = (~proved).nonzero().squeeze(1)
        if not self.audit:
            run.suite(everything)
            return run.found.x_adv, {**run.columns(), "proved": proved}
        run.attack("apgd-t", everything, SCREENED, quick=True)
        drawn = run.sample(self.audit, everything)
        run.suite(drawn)
        whole = run.masked or not bool(run.found.robust[drawn].all())
        if whole:
            run.suite(everything)
        audited = torch.zeros_like(run.found.robust).index_fill_(0, drawn, True)
        screened = run.found.robust & ~audited & ~proved if not whole else torch.zeros_like(audited)
        columns = {"audited": audited, "screened": screened, "proved": proved}
        return run.found.x_adv, {**run.columns(), **columns}


class _Run:
    """One block of images. Attacks are numbered as they come; each is a sequence of parts (rows of one pass), and the
    state is saved after each part: the parts of a restart are the same, and those found saved are not done again.

    `masked`: some gradient was exactly zero; from then on no row leaves without hope. `bf16`: so are gradient passes.
    """

    def __init__(self, settings: AutoAttackFast, found: Found, ctx: Context) -> None:
        self.settings, self.found, self.ctx = settings, found, ctx
        self.names: list[str] = []  # of the attacks so far
        self.parts, self.done, self.masked = 0, 0, False
        self.bf16 = settings.precision == "bf16"
        with torch.no_grad():
            self.logits = torch.cat([found.model(part) for part in found.x.split(settings.batch_size)])
        if self.logits.shape[1] < 4:
            raise ValueError(f"autoattack_fast needs 4 classes, this model has {self.logits.shape[1]}; use autoattack")
        if ctx.saved:
            self.bf16 = bool(ctx.saved["bf16"])
            found.x_adv, found.stage = ctx.saved["x_adv"].to(found.x), ctx.saved["stage"].to(found.stage)
            self.done, self.masked = int(ctx.saved["parts"]), bool(ctx.saved["masked"])
        elif settings.precision == "auto":
            self.bf16 = gradients_in_bf16_pay(found.model, found.x, settings.batch_size)

    def suite(self, images: Tensor) -> None:
        """The four attacks, each on the images that none before it broke."""
        for name in STAGES:
            self.attack(name, images, TARGETS, quick=self.settings.mode == "quick")

    def attack(self, name: str, images: Tensor, targets: int, quick: bool) -> None:
        """One attack on those of the images that none before it broke."""
        self.names.append(name)
        number, size = len(self.names), self.settings.batch_size
        images = images[self.found.before(number)[images]]
        if not len(images):
            return
        if name == "square":
            parts = _untargeted(images).split(max(size // 8, 1))
        elif name == "apgd-ce":
            parts = _untargeted(images).split(size)
        else:
            parts = targeted(self.found, images, self.logits[images], targets).split(size)
        for place, part in enumerate(parts):
            self.parts += 1
            if self.parts > self.done:
                self.found.number = number
                leave = LEAVE.get(name) if quick and not self.masked else None
                self._part(name, part, leave, partial(self._report, name, len(parts), place))
                self._save()

    def _part(self, name: str, rows: Rows, leave: dict[int, float] | None, note: Callable[[float], None]) -> None:
        precision = "bf16" if self.bf16 else "fp32"
        if name == "square":
            square(self.found, rows.image, self._key(), self.settings.batch_size, note, leave)
        elif name == "fab-t":
            fab(self.found, rows, precision, leave)
        elif not apgd(self.found, rows, self._key(), precision, leave):
            self.masked = True
        note(1.0)

    def _key(self) -> int:
        """Seed of the attack under way; equal attacks on equal images draw anew."""
        return seed(self.ctx.seed, len(self.names))

    def _save(self) -> None:
        state = {"x_adv": self.found.x_adv, "stage": self.found.stage}
        numbers = {"parts": self.parts, "masked": self.masked, "bf16": self.bf16}
        self.ctx.save(state | {name: torch.tensor(value) for name, value in numbers.items()})

    def _report(self, name: str, parts: int, done: int, share: float) -> None:
        robust, total = int(self.found.robust.sum()), len(self.found.x)
        shares = len(self.names) - 1 + (done + share) / parts
        planned = len(STAGES) + (self.settings.audit > 0)
        if len(self.names) > planned:  # all images go through the suite after the audit
            planned += len(STAGES)
        self.ctx.report(int(100 * shares), 100 * planned, f"{name}: {robust} of {total} still robust")

    def sample(self, count: int, images: Tensor) -> Tensor:
        """Random ones of the images that the screen did not break."""
        left = images[self.found.before(len(self.names) + 1)[images]].cpu()
        generator = torch.Generator().manual_seed(seed(self.ctx.seed, "audit"))
        return left[torch.randperm(len(left), generator=generator)[:count]].sort().values.to(self.logits.device)

    def columns(self) -> Columns:
        """The number in STAGES of the attack that broke each image, -1 for none; and what auto chose."""
        numbers = [-1, *(STAGES.index(name) + 1 for name in self.names)]
        known = torch.tensor(numbers, dtype=torch.int8, device=self.logits.device)
        stage = known[self.found.stage.long().clamp_min(0)]
        if self.settings.precision != "auto":
            return {"stage": stage}
        return {"stage": stage, "bf16": torch.full_like(stage, self.bf16, dtype=torch.bool)}


def _untargeted(images: Tensor) -> Rows:
    return Rows(images, torch.zeros_like(images), None)
