"""Checks of the input gradient: C3 finite values, C4 zero gradients, C5 a path to the input, C29 roughness."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.core.classifier import frozen
from bench.core.pgd import AttackLoss, attack_loss, margin
from bench.core.rng import scope, seed
from bench.soundness.audit import BLOCK, Audit, NotMeasured, accuracy
from bench.soundness.checks import Finding

DRAWS = 4  # of a randomized model: its gradient counts as zero where that of each draw is
MOVES, SHARE, ROUGH = 100, 0.05, 0.1
FEW, MANY = 0.01, 0.1


class Gradients(NamedTuple):
    """Of one loss at the clean images, shape n: is the input gradient exactly 0, is it finite?"""

    zero: Tensor
    finite: Tensor


def losses(audit: Audit) -> list[AttackLoss]:
    """The losses that attacks climb; DLR needs three classes."""
    return ["ce", "cw", "dlr"] if audit.logits.shape[1] >= 3 else ["ce", "cw"]


def input_gradients(audit: Audit, loss: AttackLoss) -> Gradients:
    """Gradients through what attacks climb. Raises NotMeasured where there is no path (C5 says so)."""
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
                    raise NotMeasured(f"no gradient: {str(error).partition(chr(10))[0][:120]}") from None
                zero[part] &= (grad == 0).flatten(1).all(1)
                finite[part] &= grad.isfinite().flatten(1).all(1)
    return Gradients(zero, finite)


def finite(audit: Audit) -> list[Finding]:
    """C3: no NaN and no Inf in logits, loss, gradient and adversarial images."""
    bad = {
        "logits": int((~audit.logits.isfinite()).any(1).sum()),
        "loss": int((~F.cross_entropy(audit.logits, audit.y, reduction="none").isfinite()).sum()),
    }
    try:
        for loss in losses(audit):
            bad[f"gradient of {loss}"] = int((~input_gradients(audit, loss).finite).sum())
        for threat in audit.budgets:
            audit.pgd(threat, "ce")
    except NotMeasured:
        pass  # C5 reports a missing path; a failed attack is reported below
    found = [f"{what} of {count} images" for what, count in bad.items() if count]
    found += [f"adversarial images ({name})" for name, text in audit.failed.items() if "NaN" in text]
    return [
        Finding(
            "C3", "X" if found else "ok", float(max(bad.values())), 0.0, "not finite: " * bool(found) + ", ".join(found)
        )
    ]


def zero_gradients(audit: Audit) -> list[Finding]:
    """C4: share of the images classified correctly whose input gradient is exactly 0, by loss and for all losses."""
    correct = audit.clean
    if not bool(correct.any()):
        raise NotMeasured("no image is classified correctly")
    shares = {loss: accuracy(input_gradients(audit, loss).zero[correct]) for loss in losses(audit)}
    found = [Finding("C4", "F" if share > FEW else "ok", share, FEW, attack=loss) for loss, share in shares.items()]
    least = min(shares.values())  # the loss with the fewest zero gradients decides
    level = "U" if least > MANY else "F" if least > FEW else "ok"
    note = "" if level == "ok" else f"{least:.1%} of the gradients are exactly 0 for every loss"
    return [Finding("C4", level, least, MANY, note), *found]  # type: ignore[arg-type]


def differentiable(audit: Audit) -> list[Finding]:
    """C5: the loss is differentiable with respect to the image."""
    own = audit.model.surrogate() is not audit.model
    with frozen(audit.model), scope(seed(audit.seed, "path")):
        x = audit.x[:BLOCK].detach().requires_grad_()
        note = ""
        try:
            logits = audit.model.surrogate()(x)
            if logits.requires_grad:
                (grad,) = torch.autograd.grad(logits.sum(), x, allow_unused=True)
                note = "" if grad is not None else "the logits do not depend on the image"
            else:
                note = "the graph is cut: logits carry no gradient"
        except (RuntimeError, TypeError) as error:
            note = f"autograd fails: {str(error).partition(chr(10))[0][:120]}"
    if note:
        return [Finding("C5", "U", 1.0, 0.0, note)]
    return [Finding("C5", "ok", 0.0, 0.0, "through the author's own surrogate" if own else "")]


@torch.no_grad()
def rough(audit: Audit) -> list[Finding]:
    """C29: how much the margin changes, relative to itself, under small random moves of the images."""
    audit.deterministic()
    threat = audit.largest.scaled(SHARE)
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
    value = float(total.mean()) / MOVES
    return [Finding("C29", "F" if value > ROUGH else "ok", value, ROUGH)]
