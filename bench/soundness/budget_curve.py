"""C8: accuracy does not rise with the budget. C9: an attack in the whole pixel box misclassifies every image."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from attacks.pgd import PGD
from bench.core.pgd import AttackLoss
from bench.core.threat import Threat
from bench.soundness.attack_strength import LOSSES, POINT
from bench.soundness.audit import Audit, Run, accuracy, scaled, whole_box
from bench.soundness.checks import Finding, Level

BUDGET_FACTORS = tuple(Fraction(share) for share in ("1/8", "1/4", "1/2", "1", "2", "4"))  # of 8/255: 1 to 32 over 255


def monotone(audit: Audit) -> list[Finding]:
    """C8: attacked anew, accuracy rises by at most 1 pp with eps; adversarial points of a smaller eps stay such."""
    audit.deterministic()
    budgets = list(dict.fromkeys(scaled(audit.largest, share) for share in BUDGET_FACTORS))
    runs = {loss: [_attack_at(audit, threat, loss) for threat in budgets] for loss in LOSSES}
    found, curves = [], []
    for loss in LOSSES:
        curve = [audit.clean, *(run.correct for run in runs[loss])]
        curves.append(curve)
        rise, _ = _rise(curve)
        found.append(Finding("C8", "F" if rise > POINT else "ok", rise, POINT, "", None, f"pgd-{loss}"))
    worst = [torch.stack(rung).all(0) for rung in zip(*curves, strict=True)]
    rise, place = _rise(worst)
    note = f"accuracy {rise:+.1%} up to eps {budgets[place - 1].eps}" if rise > POINT else ""
    forgotten = sum(_forgotten(audit, runs[loss]) for loss in LOSSES)
    if forgotten and not note:
        note = f"{forgotten} images misclassified at a smaller eps are correct when evaluated again"
    level: Level = "U" if rise > POINT else "F" if forgotten else "ok"
    return [Finding("C8", level, rise, POINT, note), *found]


def _attack_at(audit: Audit, threat: Threat, loss: AttackLoss) -> Run:
    steps = audit.steps // 4
    return audit.run(f"curve-{loss}@{threat.eps}", PGD(threat, steps=steps, rel_step_size=0.25, loss=loss))


def _rise(curve: list[Tensor]) -> tuple[float, int]:
    """The largest rise of accuracy above that of a smaller budget along the curve, and its position."""
    values = [accuracy(correct) for correct in curve]
    rises = [value - min(values[: i + 1]) for i, value in enumerate(values)]
    place = max(range(len(rises)), key=rises.__getitem__)
    return rises[place], place


def _forgotten(audit: Audit, runs: list[Run]) -> int:
    """Number of images whose adversarial point of a smaller budget is classified correctly when evaluated again."""
    return sum(int((audit.correct_on(run.x_adv) & audit.clean & ~run.correct).sum()) for run in runs)


def unbounded(audit: Audit) -> list[Finding]:
    """C9: in a ball that contains every image, PGD on both losses together misclassifies all images."""
    threat = whole_box(audit.largest, audit.x)
    left, found = audit.clean, list[Finding]()
    for loss in LOSSES:
        attack = PGD(threat, steps=audit.steps // 2, rel_step_size=0.25, loss=loss)
        run = audit.run(f"unbounded-{loss}", attack, only=left)
        left = run.correct
    value = accuracy(left)
    level: Level = "U" if value > 0.1 else "F" if value > 0.01 else "ok"
    note = f"{value:.1%} accuracy where every image is allowed" if level != "ok" else ""
    return [*found, Finding("C9", level, value, 0.01, note, str(threat.eps))]
