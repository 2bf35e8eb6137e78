"""Checks that compare attacks: C7 one step, C10 more effort, C11 silent success, C12 noise; and C17, their trace."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from attacks.pgd import PGD
from bench.core.classifier import frozen
from bench.core.epsilon import Epsilon
from bench.core.pgd import AttackLoss
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.soundness.audit import BLOCK, Audit, NotMeasured, Run, accuracy
from bench.soundness.checks import Finding, Level
from bench.soundness.instrumented_pgd import LAST

POINT, CONVERGED, MOVED = 0.01, 0.005, 0.05
LOSSES: tuple[AttackLoss, ...] = ("ce", "cw")
EACH = 100  # draws between two updates of the images that are still correct


def robust_to_gradients(audit: Audit, threat: Threat) -> Tensor:
    """Images that no gradient attack of the audit misclassified, bool of shape n."""
    correct = audit.fgsm(threat).correct
    for loss in LOSSES:
        correct = correct & audit.pgd(threat, loss).correct
    return correct


def one_step(audit: Audit) -> list[Finding]:
    """C7: PGD leaves no more images correct than FGSM does."""
    audit.deterministic()
    found = []
    for threat in audit.budgets:
        eps, single = str(threat.eps), accuracy(audit.fgsm(threat).correct)
        runs = [audit.pgd(threat, loss).correct for loss in LOSSES]
        gaps = [accuracy(correct) - single for correct in runs]
        for loss, gap in zip(LOSSES, gaps, strict=True):
            found.append(Finding("C7", "F" if gap > POINT else "ok", gap, POINT, "", eps, f"pgd-{loss}"))
        gap = accuracy(torch.stack(runs).all(0)) - single
        note = f"accuracy {gap:+.1%} under PGD against FGSM" if gap > POINT else ""
        found.append(Finding("C7", "U" if gap > POINT else "ok", gap, POINT, note, eps))
    return found


def converged(audit: Audit) -> list[Finding]:
    """C10: twice the steps or twice the restarts lower accuracy by at most 0.5 pp at the largest budget."""
    audit.deterministic()
    threat, n = audit.largest, len(audit.x)
    left = robust_to_gradients(audit, threat)
    eps, settings = str(threat.eps), {"rel_step_size": 0.1, "loss": "cw"}
    longer = PGD(threat, steps=2 * audit.steps, **settings)  # type: ignore[arg-type]
    again = PGD(threat, steps=audit.steps, **settings)  # type: ignore[arg-type]
    found = []
    for what, attack in (("steps", longer), ("restarts", again)):
        run = audit.run(f"pgd-cw twice the {what}@{eps}", attack, only=left)
        lower = int((left & ~run.correct).sum()) / n
        level: Level = "F" if lower > CONVERGED else "ok"
        found.append(Finding("C10", level, lower, CONVERGED, f"accuracy lost to twice the {what}", eps))
    moved = audit.pgd(threat, "ce").columns.get("moved")
    share = accuracy(moved[left] > MOVED) if moved is not None and bool(left.any()) else 0.0
    note = f"share of robust images whose best loss still rose in the last {LAST} steps"
    return [*found, Finding("C10", "F" if share > MOVED else "ok", share, MOVED, note, eps)]


def silent_success(audit: Audit) -> list[Finding]:
    """C11: no image is misclassified on the path of an attack and correct at the point that the attack returned."""
    audit.deterministic()
    found = []
    for threat in audit.budgets:
        eps, silent = str(threat.eps), []
        for loss in LOSSES:
            run = audit.pgd(threat, loss)
            silent.append(_misclassified_on_path(run) & run.correct)
            count = float(silent[-1].sum())
            found.append(Finding("C11", "F" if count else "ok", count, 0.0, "", eps, f"pgd-{loss}"))
        count = float((torch.stack(silent).any(0) & robust_to_gradients(audit, threat)).sum())
        note = f"{count:.0f} images were misclassified on the path, and by no returned point" if count else ""
        found.append(Finding("C11", "F" if count else "ok", count, 0.0, note, eps))
    return found


def _misclassified_on_path(run: Run) -> Tensor:
    return run.columns.get("met", torch.zeros_like(run.correct))


def noise(audit: Audit) -> list[Finding]:
    """C12: random search misclassifies no more images than the gradient attacks, up to 1 pp."""
    audit.deterministic()
    found = []
    for threat in audit.budgets:
        eps, drawn = str(threat.eps), accuracy(random_search(audit, threat))
        gaps = {f"pgd-{loss}": accuracy(audit.pgd(threat, loss).correct) - drawn for loss in LOSSES}
        for attack, gap in gaps.items():
            found.append(Finding("C12", "F" if gap > POINT else "ok", gap, POINT, "", eps, attack))
        gap = accuracy(robust_to_gradients(audit, threat)) - drawn
        note = f"accuracy {-gap:+.1%} under random draws against the gradient attacks" if gap > POINT else ""
        found.append(Finding("C12", "U" if gap > POINT else "ok", gap, POINT, note, eps))
    return found


@torch.no_grad()
def random_search(audit: Audit, threat: Threat) -> Tensor:
    """Images correct on each of 1 000 (full: 10 000) uniform draws from the ball, shape n; computed once a budget."""
    name = f"noise@{threat.eps}"
    if name not in audit.drawn:
        correct = audit.clean.clone()
        with frozen(audit.model), scope(seed(audit.seed, name)):
            for _ in range((1_000 if audit.level == "quick" else 10_000) // EACH):
                for part in correct.nonzero().squeeze(1).split(BLOCK):
                    x, y = audit.x[part], audit.y[part]
                    held = torch.ones_like(y, dtype=torch.bool)
                    for _ in range(EACH):
                        held &= audit.model.predict(threat.project_to_image(x, x + threat.sample(x))) == y
                    correct[part] = held
        audit.drawn[name] = correct
    return audit.drawn[name]


def no_trace(audit: Audit) -> list[Finding]:
    """C17: an attack at eps 0 changes no prediction, and no attack so far changed the state of the model."""
    nothing = PGD(Threat(audit.threats[0].norm, Epsilon(0)), steps=10, rel_step_size=0.1)
    changed = 0
    with suppress(NotMeasured):  # other checks report an attack that cannot run
        correct = audit.correct_on(audit.run("pgd at eps 0", nothing).x_adv)
        changed = int((correct != audit.clean).sum())
    notes = list(dict.fromkeys(audit.left))
    if changed:
        notes.insert(0, f"eps 0 changes {changed} predictions")
    more = f" and {len(notes) - 3} more" if len(notes) > 3 else ""
    return [Finding("C17", "X" if notes else "ok", float(len(notes)), 0.0, "; ".join(notes[:3]) + more)]
