"""C30: is a model as robust on images that its author cannot have stored as on the test images?

A model that answers with the label of the nearest stored test image withstands every attack whose budget is small
against the distances between images, and has learned nothing. Two kinds of other images are judged: training images,
and test images that are shifted and turned a little. Which ones and by how much follows from the key of the audit, and
so from the checkpoint: an author does not know it when he chooses what to store.

What is compared, and why honest nets pass. On training images a net that has learned is at least as robust as on test
images. The move costs robustness, but less than half of the budget: the share of moved images that withstands half of
it is about that of the unmoved ones that withstands the whole, or above (at most 2 points below for nets on 8x8 digits
and on MNIST, trained without augmentation). Both are shares of the images classified correctly, which wrong labels in a
training set change little; accuracy itself has a wide limit.

What still evades: a memory of training *and* test images that moved images do not leave, since they stay nearest to
their originals (as in 8x8 digits); there it has the robustness of a nearest-neighbor rule. A memory in front of a net
that by itself is nearly as robust. A memory of many moved copies of each image, or one that aligns images before it
compares them. And one whose gradients are masked, which C4, C5, C9 and C19 report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.pgd import PGD
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.data.images import to_float
from bench.soundness.audit import LOSSES, Audit, Effort, Unseen, accuracy, scaled
from bench.soundness.catalog import JUDGED, LOST_ACCURACY, MOVED_BUDGET, SHIFT, TURN
from bench.soundness.checks import Check, Finding, NotApplicable, NotMeasured


def robust_elsewhere(check: Check, audit: Audit) -> Iterator[Finding]:
    """C30: the model is as robust on training images and on moved test images as on the test images."""
    if audit.unseen is None:
        raise NotApplicable("no images beyond the test set were given")
    wide = replace(check, limits={"U": LOST_ACCURACY})
    x, y = audit.x[: JUDGED[audit.level]], audit.y[: JUDGED[audit.level]]
    test = replace(audit, x=x, y=y)
    if not bool(test.clean.any()):
        raise NotMeasured("no image is classified correctly")
    trained = replace(audit, x=audit.unseen.x, y=audit.unseen.y)
    moved = replace(audit, x=move(x, audit.unseen.seed), y=y)
    both = test.clean & moved.clean
    yield _fall(wide, "accuracy on training images", test.clean, trained.clean, paired=False)
    yield _fall(wide, "accuracy on moved test images", test.clean, moved.clean)
    for threat in audit.budgets:
        eps, here = str(threat.eps), _robust(test, threat)
        there, far = _robust(trained, threat), _robust(moved, half := scaled(threat, MOVED_BUDGET))
        name = "robust share of training images"
        yield _fall(check, name, here[test.clean], there[trained.clean], eps=eps, paired=False)
        yield _fall(check, f"robust share of moved test images at eps {half.eps}", here[both], far[both], eps=eps)


def _fall(
    check: Check, name: str, here: Tensor, there: Tensor, *, eps: str | None = None, paired: bool = True
) -> Finding:
    """How much lower a share is on other images (`there`) than on test images (`here`): a bool for each image."""
    if not len(there):
        return check.not_checked("no other image is classified correctly")
    note = f"{name} {accuracy(there):.1%}, of test images {accuracy(here):.1%}"
    return check.difference(here.tolist(), there.tolist(), note, eps=eps, paired=paired)


def _robust(audit: Audit, threat: Threat) -> Tensor:
    """Images that a short PGD on either loss leaves correct, bool of shape n."""
    left = audit.clean
    for loss in LOSSES:
        attack = PGD(threat, steps=10, rel_step_size=0.25, loss=loss)
        left = left & audit.run(f"elsewhere-{loss}@{threat.eps}", attack, only=left).correct
    return left


def move(x: Tensor, drawn: int) -> Tensor:
    """Each image (n c h w) shifted by SHIFT of its side in a random direction and turned by TURN / 2 to TURN degrees.

    Linear between pixels, the border continued. Drawn on the CPU, so that it does not depend on the device.
    """
    with scope(seed(drawn, "move")):
        way, turn, sign = torch.rand(3, len(x), dtype=torch.float64)
    way, turn = 2 * torch.pi * way, torch.deg2rad(TURN * (0.5 + 0.5 * turn)) * (sign - 0.5).sign()
    rows = [[turn.cos(), -turn.sin(), 2 * SHIFT * way.cos()], [turn.sin(), turn.cos(), 2 * SHIFT * way.sin()]]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1).to(x)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False).clamp(0, 1)


def unseen(x: Tensor, y: Tensor, level: Effort, key: str) -> Unseen:
    """Training images for an audit, drawn out of all of them (uint8, n c h w) by the key of the job."""
    drawn = seed("unseen", key)
    with scope(drawn):
        rows = torch.randperm(len(x))[: JUDGED[level]].to(x.device)
    return Unseen(to_float(x[rows]), y[rows], drawn)
