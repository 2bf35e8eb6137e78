"""Checks of the input gradient: C3 finite values, C4 zero gradients, C5 a path to the input, C29 roughness."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.classifier import frozen
from bench.core.pgd import AttackLoss, attack_loss, margin
from bench.core.rng import scope, seed
from bench.soundness.audit import BLOCK, Audit, accuracy, first_line, require_numbers
from bench.soundness.catalog import MOVE_SIZE, MOVES
from bench.soundness.checks import Check, Finding, NotMeasured
from bench.terminal import counted

DRAWS = 4  # of a stochastic model: its gradient counts as zero if that of each draw is


class Gradients(NamedTuple):
    """Of one loss at the clean images, shape n: is the input gradient exactly 0, is it finite?"""

    zero: Tensor
    finite: Tensor


def losses(audit: Audit) -> list[AttackLoss]:
    """The losses that attacks maximize; DLR needs three classes."""
    return ["ce", "cw", "dlr"] if audit.logits.shape[1] >= 3 else ["ce", "cw"]


def input_gradients(audit: Audit, loss: AttackLoss) -> Gradients:
    """Gradients of the model that attacks use. Raises NotMeasured where there is no path (see C5)."""
    zero = torch.ones(len(audit.x), dtype=torch.bool, device=audit.x.device)
    finite = zero.clone()
    with frozen(audit.model), scope(seed(audit.seed, "gradient", loss)):
        surrogate = audit.model.surrogate()
        for _ in range(DRAWS if audit.model.stochastic else 1):
            for start in range(0, len(audit.x), BLOCK):
                part = slice(start, start + BLOCK)
                x = audit.x[part].detach().requires_grad_()
                try:
                    value = attack_loss(loss, audit.y[part])(surrogate(x)).sum()
                    (grad,) = torch.autograd.grad(value, x)
                except (RuntimeError, TypeError) as error:
                    raise NotMeasured(f"no gradient: {first_line(error)}") from None
                zero[part] &= (grad == 0).flatten(1).all(1)
                finite[part] &= grad.isfinite().flatten(1).all(1)
    return Gradients(zero, finite)


def finite(check: Check, audit: Audit) -> Iterator[Finding]:
    """C3: no NaN and no Inf in logits, loss, gradient and adversarial images, nor in the passes of all other checks."""
    bad = {
        "logits": int((~audit.logits.isfinite()).any(1).sum()),
        "loss": int((~F.cross_entropy(audit.logits, audit.y, reduction="none").isfinite()).sum()),
    }
    try:
        for loss in losses(audit):
            bad[f"gradient of {loss}"] = int((~input_gradients(audit, loss).finite).sum())
        for threat in audit.budgets:
            audit.attacked("pgd-ce", threat)
    except NotMeasured:
        pass  # C5 reports a missing path; a failed attack is reported below
    attacks = [f"adversarial images ({name})" for name, text in audit.failed.items() if "NaN" in text]
    found = [f"{what} of {counted(count, 'image')}" for what, count in bad.items() if count] + attacks
    passes = int(audit.not_finite)
    found += [f"the largest logit in {counted(passes, 'pass')} of an image in [0,1]"] if passes else []
    yield check.finding(
        float(max(*bad.values(), len(attacks), passes)), "not finite: " * bool(found) + ", ".join(found)
    )


def zero_gradients(check: Check, audit: Audit) -> Iterator[Finding]:
    """C4: share of the images classified correctly whose input gradient is exactly 0, by loss and for all losses."""
    correct = audit.clean
    if not bool(correct.any()):
        raise NotMeasured("no image is classified correctly")
    gradients = {loss: input_gradients(audit, loss) for loss in losses(audit)}
    if not all(bool(found.finite[correct].all()) for found in gradients.values()):
        raise NotMeasured("some gradients are NaN or Inf (C3)")
    shares = {loss: accuracy(found.zero[correct]) for loss, found in gradients.items()}
    least = min(shares.values())  # the loss with the fewest zero gradients decides
    yield check.finding(least, failure=f"{least:.1%} of the gradients are exactly 0 for every loss")
    for loss, share in shares.items():
        yield check.finding(share, attack=loss)


def differentiable(check: Check, audit: Audit) -> Iterator[Finding]:
    """C5: the loss is differentiable with respect to the image."""
    fault = ""
    with frozen(audit.model), scope(seed(audit.seed, "path")):
        x = audit.x[:BLOCK].detach().requires_grad_()
        surrogate = audit.model.surrogate()
        try:
            logits = surrogate(x)
            if not logits.requires_grad:
                fault = "the graph is cut: logits carry no gradient"
            elif torch.autograd.grad(logits.sum(), x, allow_unused=True)[0] is None:
                fault = "the logits do not depend on the image"
        except (RuntimeError, TypeError) as error:
            fault = f"autograd fails: {first_line(error)}"
    own = "" if surrogate is audit.model else "through the author's own surrogate"
    yield check.finding(float(bool(fault)), fault or own)


@torch.no_grad()
def rough(check: Check, audit: Audit) -> Iterator[Finding]:
    """C29: how much the margin changes, relative to itself, under small random moves of the images."""
    audit.require_deterministic()
    threat = audit.largest.scaled(MOVE_SIZE)
    total = torch.zeros(len(audit.x), device=audit.x.device)
    with frozen(audit.model), scope(seed(audit.seed, "moves")):
        for start in range(0, len(audit.x), BLOCK):
            part = slice(start, start + BLOCK)
            x, y = audit.x[part], audit.y[part]
            before = margin(audit.logits[part], y)
            for _ in range(MOVES):
                after = margin(audit.model(threat.project_to_image(x, x + threat.sample(x))), y)
                change = (after - before).abs() / before.abs().clamp_min(1e-12)
                total[part] += change.clamp_max(1.0)
    require_numbers(total)
    yield check.finding(float(total.mean()) / MOVES)
