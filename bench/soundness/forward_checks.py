"""Checks that need forward passes only: C1 determinism, C2 logits, C18 pixel space."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.core.classifier import keep_buffers
from bench.core.epsilon import Epsilon
from bench.core.stats import wilson
from bench.soundness.audit import BLOCK, Audit, accuracy
from bench.soundness.checks import Finding

PASSES, SAME, SAME_BATCH = 5, 1e-4, 1e-3
BETTER = 0.1  # accuracy on another scale beyond that on [0,1]
ALONE = 4  # images that are also classified in a batch of one
HALF_LEVEL = Epsilon("1/510")


def deterministic(audit: Audit) -> list[Finding]:
    """C1: in the mode in which it was loaded, the model gives the same logits for the same image."""
    if audit.model.stochastic:
        return [Finding("C1", "I", note="declares its noise: evaluated by EOT and fresh draws, in its own section")]
    x = audit.x[:BLOCK]
    with torch.no_grad(), keep_buffers(audit.model):
        passes = [audit.model(x) for _ in range(PASSES)]
        turned = audit.model(x.flip(0)).flip(0)
        alone = [_alone(audit, x[i : i + 1]) for i in range(min(ALONE, len(x)))]
    first = passes[0]
    flips = torch.stack([later.argmax(1) != first.argmax(1) for later in passes[1:]]).any(0).sum()
    gap = max(_gap(later, first) for later in passes[1:])
    given = max(_gap(one, first[i : i + 1]) if one is not None else 2.0 for i, one in enumerate(alone))
    batch, mode = max(given, _gap(turned, first)), _gap(audit.logits[:BLOCK], first)
    notes = []
    if int(flips) or gap > SAME:
        notes.append(f"{int(flips)} of {len(x)} labels change between {PASSES} passes")
    elif batch > SAME_BATCH:
        alone_fails = any(one is None for one in alone)
        notes.append("fails on a single image" if alone_fails else "the logits depend on the rest of the batch")
    if mode > SAME and not (int(flips) or gap > SAME):
        notes.append("loaded in train mode: eval mode gives other logits")
    return [Finding("C1", "U" if notes else "ok", max(gap, batch, mode), SAME, "; ".join(notes))]


def _alone(audit: Audit, image: Tensor) -> Tensor | None:
    try:
        return audit.model(image)
    except ValueError:  # BatchNorm in train mode has no statistics of one value
        return None


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest distance between rows of logits, each divided by its L2 norm."""
    a, b = a / (a.norm(dim=1, keepdim=True) + 1e-10), b / (b.norm(dim=1, keepdim=True) + 1e-10)
    return float((a - b).norm(dim=1).nan_to_num(0.0).max())


def gives_logits(audit: Audit) -> list[Finding]:
    """C2: neither probabilities nor their logarithms."""
    z = audit.logits.double()
    softmax = ((z.sum(1) - 1).abs() <= 1e-5) & (z.amin(1) >= 0)
    log_softmax = z.logsumexp(1).abs() <= 1e-5
    for name, rows in (("softmax", softmax), ("log_softmax", log_softmax)):
        if bool(rows.all()):
            note = f"the rows are {name} outputs: leave it out of forward, predictions do not change"
            return [Finding("C2", "F", 1.0, None, note)]
    return [Finding("C2", "ok", max(accuracy(softmax), accuracy(log_softmax)))]


def pixel_space(audit: Audit) -> list[Finding]:
    """C18: accuracy on raw images in [0,1] is the claimed one, and no other scale suits the model better."""
    measured, n = accuracy(audit.clean), len(audit.x)
    correct, found = int(audit.clean.sum()), []
    for threat in audit.budgets:
        if threat.norm == "Linf" and threat.eps < HALF_LEVEL:
            note = f"eps {threat.eps} is below half a gray level (1/510): was it divided by 255 twice?"
            found.append(Finding("C18", "F", threat.radius, float(HALF_LEVEL), note, str(threat.eps)))
    name, gain = _better_scale(audit)
    if name:
        note = f"{gain:+.1%} accuracy on images {name}: the model does not take images in [0,1]"
        return [Finding("C18", "X", gain, BETTER, note), *found]
    if audit.claimed is None:
        note = "no accuracy is claimed; no other scale suits the model better"
        return [Finding("C18", "ok", measured, None, note), *found]
    gap = audit.claimed - measured
    # an interval of 99.9 %: X on one row in a thousand by chance would be too many at 95 %
    level = "X" if wilson(correct, n, 3.29)[1] < audit.claimed - 0.01 else "ok"
    note = f"{measured:.1%} of {n} images correct, {audit.claimed:.1%} claimed"
    return [Finding("C18", level, gap, 0.01, note), *found]  # type: ignore[arg-type]


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
        if gain > max(BETTER, most) and gained - lost > 3 * (gained + lost) ** 0.5:
            best, most = name, gain
    return best, most
