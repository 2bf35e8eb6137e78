"""Checks that need forward passes only: C1 determinism, C2 logits, C18 pixel space."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.core.classifier import keep_buffers, predicted
from bench.core.epsilon import Epsilon
from bench.core.stats import wilson
from bench.soundness.audit import BLOCK, Audit, accuracy, require_numbers
from bench.soundness.catalog import BETTER_SCALE, HALF_GRAY_LEVEL, IN_BATCH, LOWER_THAN_CLAIMED, PASSES, SOFTMAX_SUM
from bench.soundness.checks import Check, Finding
from bench.terminal import counted

ALONE = 4  # images that are also classified in a batch of one


def deterministic(check: Check, audit: Audit) -> Iterator[Finding]:
    """C1: in the mode in which it was loaded, the model gives the same logits for the same image."""
    if audit.model.stochastic:
        yield Finding(check.code, "I", note="declares its noise: evaluated by EOT and fresh draws, in its own section")
        return
    x, same = audit.x[:BLOCK], check.limits["U"]
    with torch.no_grad(), keep_buffers(audit.model):
        first, *later = [audit.model(x) for _ in range(PASSES)]
        reversed_batch = audit.model(x.flip(0)).flip(0)
        alone = [_alone(audit, x[i : i + 1]) for i in range(min(ALONE, len(x)))]
    require_numbers(first, *later, reversed_batch, *(one for one in alone if one is not None))
    flips = int(torch.stack([predicted(logits) != predicted(first) for logits in later]).any(0).sum())
    gap = max(_gap(logits, first) for logits in later)
    gaps_alone = [_gap(one, first[i : i + 1]) if one is not None else 2.0 for i, one in enumerate(alone)]
    batch, mode = max(*gaps_alone, _gap(reversed_batch, first)), _gap(audit.logits[:BLOCK], first)
    notes = []
    if flips or gap > same:
        notes.append(f"{flips} of {len(x)} labels change between {PASSES} passes")
    elif batch > IN_BATCH:
        alone_fails = any(one is None for one in alone)
        notes.append("fails on a single image" if alone_fails else "the logits depend on the rest of the batch")
    if mode > same and not (flips or gap > same):
        notes.append("loaded in train mode: eval mode gives other logits")
    yield Finding(check.code, "U" if notes else "ok", max(gap, batch, mode), same, "; ".join(notes))


def _alone(audit: Audit, image: Tensor) -> Tensor | None:
    try:
        return audit.model(image)
    except ValueError:  # BatchNorm in train mode has no statistics of one value
        return None


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest distance between rows of logits, each divided by its L2 norm."""
    a, b = a / (a.norm(dim=1, keepdim=True) + 1e-10), b / (b.norm(dim=1, keepdim=True) + 1e-10)
    return float((a - b).norm(dim=1).max())


def last_function(logits: Tensor) -> str:
    """ "softmax" or "log_softmax" if all rows (b k) are outputs of it, otherwise empty."""
    z = logits.double()
    if bool((((z.sum(1) - 1).abs() <= SOFTMAX_SUM) & (z.amin(1) >= 0)).all()):
        return "softmax"
    return "log_softmax" if bool((z.logsumexp(1).abs() <= SOFTMAX_SUM).all()) else ""


def gives_logits(check: Check, audit: Audit) -> Iterator[Finding]:
    """C2: neither probabilities nor their logarithms."""
    require_numbers(audit.logits)
    name = last_function(audit.logits)
    failure = f"the rows are {name} outputs: leave it out of forward, predictions do not change"
    yield check.finding(float(bool(name)), failure=failure)


def pixel_space(check: Check, audit: Audit) -> Iterator[Finding]:
    """C18: accuracy on raw images in [0,1] is the claimed one, and no other scale suits the model better."""
    measured, n, half = accuracy(audit.clean), len(audit.x), Epsilon(HALF_GRAY_LEVEL)
    name, gain = _better_scale(audit)
    if name and audit.logits.shape[1] == 2 and 1 - 2 * measured >= gain:  # an exchange gains as much as any scale
        note = f"{measured:.1%} correct, {1 - measured:.1%} with the two classes exchanged: another order of classes"
        yield Finding(check.code, "X", 1 - 2 * measured, BETTER_SCALE, note)
    elif name:
        note = f"{gain:+.1%} accuracy on images {name}: the model does not take images in [0,1]"
        yield Finding(check.code, "X", gain, BETTER_SCALE, note)
    elif audit.claimed is None:
        yield Finding(check.code, "ok", measured, None, "no accuracy is claimed; no other scale suits the model better")
    else:
        # an interval of 99.9 %: X on one row in a thousand by chance would be too many at 95 %
        lower = wilson(int(audit.clean.sum()), n, 3.29)[1] < audit.claimed - LOWER_THAN_CLAIMED
        note = f"{measured:.1%} of {counted(n, 'image')} correct, {audit.claimed:.1%} claimed"
        yield Finding(check.code, "X" if lower else "ok", audit.claimed - measured, LOWER_THAN_CLAIMED, note)
    for threat in audit.budgets:
        if threat.norm == "Linf" and threat.eps < half:
            note = f"eps {threat.eps} is below half a gray level ({half}): was it divided by 255 twice?"
            yield Finding(check.code, "F", threat.radius, float(half), note, str(threat.eps))


def _better_scale(audit: Audit) -> tuple[str, float]:
    """Another scale on which accuracy is higher by more than 10 pp and three deviations of the paired difference.

    Skipped for a randomized model: a scale of higher contrast outweighs its noise.
    """
    if audit.model.stochastic:
        return "", 0.0
    x = audit.x
    deviation = x.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    scales = {
        "from 0 to 255": 255 * x,
        "from -1 to 1": 2 * x - 1,
        "of mean 0 and deviation 1": (x - x.mean((0, 2, 3), keepdim=True)) / deviation,
        "divided by 255": x / 255,
    }
    best, most = "", 0.0
    for name, images in scales.items():
        correct = audit.correct_on(images)
        gained, lost = int((correct & ~audit.clean).sum()), int((audit.clean & ~correct).sum())
        gain = (gained - lost) / len(x)
        if gain > max(BETTER_SCALE, most) and gained - lost > 3 * (gained + lost) ** 0.5:
            best, most = name, gain
    return best, most
