"""Checks that compare attacks: C7 one step, C8, C9 budgets, C10 more effort, C11 silent success, C12 noise; and C17."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from attacks.pgd import PGD
from bench.core.classifier import frozen
from bench.core.epsilon import Epsilon
from bench.core.rng import scope, seed
from bench.core.threat import Threat
from bench.soundness.audit import ATTACKS, BLOCK, LOSSES, Audit, Run, accuracy, scaled, whole_box
from bench.soundness.catalog import BUDGET_FACTORS, DRAWS, LAST_STEPS, STILL_RISING
from bench.soundness.checks import Check, Finding, NotMeasured
from bench.terminal import counted

ITERATIVE = ATTACKS[1:]
EACH = 100  # draws between two updates of the images that are still correct


def worst(audit: Audit, threat: Threat, attacks: Sequence[str] = ATTACKS) -> Tensor:
    """Images that none of these attacks of the audit misclassified, bool of shape n."""
    return torch.stack([audit.attacked(name, threat).correct for name in attacks]).all(0)


def _above(
    check: Check, audit: Audit, threat: Threat, weaker: Tensor, attacks: Sequence[str], what: str
) -> Iterator[Finding]:
    """Accuracy under each PGD and under all of `attacks` together, minus that under an attack known to be weaker."""
    reference, eps = weaker.tolist(), str(threat.eps)
    for name in ITERATIVE:
        yield check.difference(audit.attacked(name, threat).correct.tolist(), reference, eps=eps, attack=name)
    whole = worst(audit, threat, attacks)
    failure = f"accuracy {accuracy(whole) - accuracy(weaker):+.1%} under {what}"
    yield check.difference(whole.tolist(), reference, failure=failure, eps=eps)


def one_step(check: Check, audit: Audit) -> Iterator[Finding]:
    """C7: PGD leaves no more images correct than FGSM does."""
    audit.require_deterministic()
    for threat in audit.budgets:
        yield from _above(check, audit, threat, audit.attacked("fgsm", threat).correct, ITERATIVE, "PGD against FGSM")


def noise(check: Check, audit: Audit) -> Iterator[Finding]:
    """C12: random search misclassifies no more images than the gradient attacks, up to 1 pp."""
    audit.require_deterministic()
    for threat in audit.budgets:
        drawn = random_search(audit, threat)
        yield from _above(check, audit, threat, drawn, ATTACKS, "the gradient attacks against random draws")


@torch.no_grad()
def random_search(audit: Audit, threat: Threat) -> Tensor:
    """Images correct on each of 1 000 (full: 10 000) uniform draws from the ball, shape n; computed once a budget."""
    name = f"noise@{threat.eps}"
    if name not in audit.drawn:
        correct = audit.clean.clone()
        with frozen(audit.model), scope(seed(audit.seed, name)):
            for _ in range(DRAWS[audit.level] // EACH):
                rows = correct.nonzero().squeeze(1)
                for part in rows.split(BLOCK) if len(rows) else ():
                    x, y = audit.x[part], audit.y[part]
                    held = torch.ones_like(y, dtype=torch.bool)
                    for _ in range(EACH):
                        held &= audit.model.predict(threat.project_to_image(x, x + threat.sample(x))) == y
                    correct[part] = held
        audit.drawn[name] = correct
    return audit.drawn[name]


def converged(check: Check, audit: Audit) -> Iterator[Finding]:
    """C10: twice the steps or twice the restarts hardly lower accuracy at the largest budget."""
    audit.require_deterministic()
    threat = audit.largest
    left, eps = worst(audit, threat), str(threat.eps)
    for what, steps in (("steps", 2 * audit.steps), ("restarts", audit.steps)):
        attack = PGD(threat, steps=steps, rel_step_size=0.1, loss="cw")
        run = audit.run(f"pgd-cw twice the {what}@{eps}", attack, only=left)
        note = f"accuracy lost to twice the {what}"
        yield check.difference(left.tolist(), (left & run.correct).tolist(), note, eps=eps)
    moved = audit.attacked("pgd-ce", threat).columns.get("moved")
    share = accuracy(~(moved[left] <= STILL_RISING)) if moved is not None and bool(left.any()) else 0.0
    note = f"share of robust images whose best loss still rose in the last {LAST_STEPS} steps"
    yield Finding(check.code, "F" if share > STILL_RISING else "ok", share, STILL_RISING, note, eps)


def silent_success(check: Check, audit: Audit) -> Iterator[Finding]:
    """C11: no image is misclassified on the path of an attack and correct at the point that the attack returned."""
    audit.require_deterministic()
    for threat in audit.budgets:
        lost, eps = torch.zeros_like(audit.clean), str(threat.eps)
        for name in ITERATIVE:
            run = audit.attacked(name, threat)
            silent = run.columns.get("met", torch.zeros_like(run.correct)) & run.correct
            lost |= silent
            yield check.finding(float(silent.sum()), eps=eps, attack=name)
        count = float((lost & worst(audit, threat)).sum())
        failure = f"{counted(count, 'image')} misclassified on the path, and at no returned point"
        yield check.finding(count, failure=failure, eps=eps)


def monotone(check: Check, audit: Audit) -> Iterator[Finding]:
    """C8: attacked anew, accuracy does not rise with eps; adversarial points of a smaller eps stay such."""
    audit.require_deterministic()
    budgets = list(dict.fromkeys(scaled(audit.largest, Fraction(factor)) for factor in BUDGET_FACTORS))
    forgotten, curves = 0, []
    for loss in LOSSES:
        runs = []
        for threat in budgets:
            attack = PGD(threat, steps=audit.steps // 4, rel_step_size=0.25, loss=loss)
            runs.append(audit.run(f"curve-{loss}@{threat.eps}", attack))
        curves.append([audit.clean, *(run.correct for run in runs)])
        forgotten += sum(_forgotten(audit, run) for run in runs)
        yield _rise(check, curves[-1], budgets, attack=f"pgd-{loss}")
    found = _rise(check, [torch.stack(rung).all(0) for rung in zip(*curves, strict=True)], budgets)
    if forgotten and found.level == "ok":
        note = f"{counted(forgotten, 'image')} misclassified at a smaller eps, correct when evaluated again"
        found = replace(found, level="F", note=note)
    yield found


def _rise(check: Check, curve: list[Tensor], budgets: list[Threat], attack: str | None = None) -> Finding:
    """The largest rise of accuracy above that of a smaller budget along the curve, which begins at eps 0."""
    values = [accuracy(correct) for correct in curve]
    lowest = [min(range(i + 1), key=values.__getitem__) for i in range(len(values))]
    place = max(range(len(values)), key=lambda i: values[i] - values[lowest[i]])
    rise = values[place] - values[lowest[place]]
    failure = f"accuracy {rise:+.1%} up to eps {budgets[place - 1].eps}"
    return check.difference(curve[place].tolist(), curve[lowest[place]].tolist(), failure=failure, attack=attack)


def _forgotten(audit: Audit, run: Run) -> int:
    """Number of images whose adversarial point is classified correctly when evaluated again."""
    return int((audit.correct_on(run.x_adv) & audit.clean & ~run.correct).sum())


def unbounded(check: Check, audit: Audit) -> Iterator[Finding]:
    """C9: in a ball that contains every image, PGD on both losses together misclassifies all images."""
    threat = whole_box(audit.largest, audit.x)
    left = audit.clean
    for loss in LOSSES:
        attack = PGD(threat, steps=audit.steps // 2, rel_step_size=0.25, loss=loss)
        left = audit.run(f"unbounded-{loss}", attack, only=left).correct
    value = accuracy(left)
    yield check.finding(value, failure=f"{value:.1%} accuracy where every image is allowed", eps=str(threat.eps))


def no_trace(check: Check, audit: Audit) -> Iterator[Finding]:
    """C17: an attack at eps 0 changes no prediction, and no attack so far changed the state of the model."""
    notes = []
    with suppress(NotMeasured):  # other checks report an attack that cannot run
        attack = PGD(Threat(audit.threats[0].norm, Epsilon(0)), steps=10, rel_step_size=0.1)
        correct = audit.correct_on(audit.run("pgd at eps 0", attack).x_adv)
        changed = int((correct != audit.clean).sum())
        # a stochastic model may draw from a generator that no seed of ours reaches
        own_draws = changed and audit.model.stochastic and not torch.equal(audit.correct_on(audit.x), audit.clean)
        if changed and not own_draws:
            notes.append(f"eps 0 changes {counted(changed, 'prediction')}")
    notes += dict.fromkeys(audit.changes)
    more = f" and {len(notes) - 3} more" if len(notes) > 3 else ""
    yield check.finding(float(len(notes)), "; ".join(notes[:3]) + more)
