"""Symptoms of false robustness in stored outcomes: each check looks at one row and one seed and gives findings.

Two outcomes are always compared on the images that both have. pp are percentage points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.core.epsilon import Epsilon
from bench.core.stats import wilson
from bench.soundness.checks import Finding, Level
from bench.soundness.evidence import Attacked, Column, Evidence, on_shared, worst_of

MARGIN = 0.01  # C7, C8, C12
BLACK_BOX, BLACK_BOX_GRAVE = 0.002, 0.02  # C13
TRANSFER = 0.005  # C14
LOSSES = 0.05  # C15
OVERFIT, HIGH = 0.2, 0.8  # C26: the gap, and how much of clean accuracy FGSM must leave


def iterative_beats_one_step(e: Evidence) -> list[Finding]:
    """C7: several steps never leave more images right than one step does."""
    once, whole = _one_step(e), e.white_box(iterative=True)
    if once is None or whole is None:
        return [not_checked("C7", "needs a one-step and an iterative gradient attack")]
    worst, single = on_shared([whole, once])
    note = f"one step {_pp(single.share)}, iterative {_pp(worst.share)}"
    found = [_above("C7", worst.share - single.share, MARGIN, "U", note)]
    for attack in (a for a in e.attacks if a.name == "pgd" and not a.one_step):
        own, single = on_shared([attack.right, once])
        if own.share > single.share + MARGIN:
            found.append(_above("C7", own.share - single.share, MARGIN, "F", "weaker than one step", attack.label))
    return found


def success_grows(e: Evidence, smaller: list[Evidence]) -> list[Finding]:
    """C8: accuracy never rises with the budget, against the rows at smaller budgets of the same norm."""
    if not smaller:
        return [not_checked("C8", "one budget, or none smaller than this one")]
    found = []
    for other in smaller:
        pairs = [(a, b) for a in e.attacks for b in other.attacks if a.label == b.label]
        for attack, before in pairs:
            own, earlier = on_shared([attack.right, before.right])
            rise, note = own.share - earlier.share, f"above its own accuracy at eps {other.row.eps}"
            if rise > MARGIN:
                found.append(_above("C8", rise, MARGIN, "F", note, attack.label))
        whole, small = e.worst(), other.worst()
        # only equal attack sets: a budget at which fewer were run is not the weaker for its size
        if pairs and len(pairs) == len(e.attacks) == len(other.attacks) and whole and small:
            own, earlier = on_shared([whole, small])
            note = f"worst case {_pp(own.share)} here, {_pp(earlier.share)} at eps {other.row.eps}"
            found.append(_above("C8", own.share - earlier.share, MARGIN, "U", note))
    whole_set = [f for f in found if f.attack is None]
    if not whole_set:
        return [*found, not_checked("C8", "no smaller budget has the same attacks")]
    return [max(whole_set, key=lambda f: f.value or 0.0), *(f for f in found if f.attack)]


def black_box_does_not_win(e: Evidence) -> list[Finding]:
    """C13: a search without gradients adds next to nothing to the gradient attacks."""
    white = e.white_box()
    searches = [a.right for a in e.attacks if a.scores_stage and (a.access == "scores" or a.white is not None)]
    if white is None or not searches:
        return [not_checked("C13", "needs a gradient attack, and Square or AutoAttack standard")]
    before, after = on_shared([white, worst_of([white, *searches])])
    drop = before.share - after.share
    note = f"gradient attacks leave {_pp(before.share)}, with search {_pp(after.share)}"
    grave = _above("C13", drop, BLACK_BOX_GRAVE, "U", note)
    return [grave if grave.level == "U" else _above("C13", drop, BLACK_BOX, "F", note)]


def transfer_does_not_win(e: Evidence) -> list[Finding]:
    """C14: images made on other models add next to nothing to the gradient attacks."""
    white, moved = e.white_box(), [a.right for a in e.of_kind("images")]
    if white is None or not moved:
        return [not_checked("C14", "needs a gradient attack and the attack transfer")]
    before, after = on_shared([white, worst_of([white, *moved])])
    note = f"gradient attacks leave {_pp(before.share)}, with transferred images {_pp(after.share)}"
    return [_above("C14", before.share - after.share, TRANSFER, "F", note)]


def losses_agree(e: Evidence) -> list[Finding]:
    """C15: PGD on cross-entropy and on a margin break about equally many.

    Two evaluations with equal settings say so best, then the audit's two, then the evaluations most alike.
    """
    pgd = [a for a in e.attacks if a.name == "pgd"]
    pairs = [(a, b) for a in pgd for b in pgd if _loss(a) == "ce" and _loss(b) in ("cw", "dlr")]
    pair = min(pairs, key=lambda pair: (_differences(*pair), pair[0].label, pair[1].label), default=None)
    audited = [e.audited.get(f"pgd-{loss}@{e.row.eps}") for loss in ("ce", "cw")]
    if pair is not None and (_differences(*pair) == 0 or None in audited):
        ce, cw = on_shared([attack.right for attack in pair])
        names = f"{pair[0].label}, {pair[1].label}" + (", not at equal settings" if _differences(*pair) else "")
    elif audited[0] is not None and audited[1] is not None:
        ce, cw = on_shared([audited[0], audited[1]])
        names = "PGD of the audit on ce, on cw"
    else:
        return [not_checked("C15", "needs pgd with loss=ce and with loss=cw")]
    note = f"{names}: {_pp(ce.share)}, {_pp(cw.share)}"
    return [_above("C15", abs(ce.share - cw.share), LOSSES, "F", note)]


def certificate_holds(e: Evidence) -> list[Finding]:
    """C25: certified accuracy at r is never above attacked accuracy at the same L2 r, beyond the intervals."""
    worst = e.worst(deployed=True)
    if e.certified is None or worst is None or e.row.norm != "L2":
        return [Finding("C25", "n/a", note="needs a certificate and an attack at one L2 radius")]
    column, radius = e.certified
    covered = column._replace(right=column.right & (radius >= e.row.eps_value))
    certified, attacked = on_shared([covered, worst])
    n = len(certified.right)
    if n == 0:
        return [not_checked("C25", "certificate and attack share no image")]
    low, high = wilson(int(certified.right.sum()), n)[0], wilson(int(attacked.right.sum()), n)[1]
    note = f"certified {_pp(certified.share)}, attacked {_pp(attacked.share)} on {n} images"
    return [Finding("C25", "X" if low > high else "ok", certified.share - attacked.share, high - low, note)]


def no_sudden_overfitting(e: Evidence) -> list[Finding]:
    """C26: a net trained against a threat that resists one step and falls to several."""
    threat = e.train.threat
    if threat is None:
        return [Finding("C26", "n/a", note="not trained against a threat")]
    dropped = e.trained.get("sudden_drop_epoch")
    if dropped is not None and e.weights == "last":
        return [Finding("C26", "F", note=f"accuracy under PGD on validation images fell by 20 pp in epoch {dropped}")]
    if e.row.norm != threat.norm or e.row.eps_value > float(Epsilon(threat.eps)):
        return [Finding("C26", "n/a", note="beyond the budget trained at, where one step may well be too few")]
    once, whole = _one_step(e), e.white_box(iterative=True)
    if once is None or whole is None or e.clean is None:
        return [not_checked("C26", "needs clean, fgsm and an iterative gradient attack")]
    worst, single, clean = on_shared([whole, once, e.clean])
    gap = single.share - worst.share
    fallen = gap > OVERFIT and single.share >= HIGH * clean.share
    note = f"one step {_pp(single.share)}, iterative {_pp(worst.share)}, clean {_pp(clean.share)}"
    return [Finding("C26", "F" if fallen else "ok", gap, OVERFIT, note)]


SYMPTOMS: tuple[Callable[[Evidence], list[Finding]], ...] = (
    *(iterative_beats_one_step, black_box_does_not_win, transfer_does_not_win, losses_agree),
    *(certificate_holds, no_sudden_overfitting),
)


def not_checked(code: str, why: str) -> Finding:
    """The finding of a check that could not be asked."""
    return Finding(code, "not checked", note=why)


def _above(code: str, value: float, threshold: float, level: Level, note: str, attack: str | None = None) -> Finding:
    if value != value:
        return not_checked(code, "the two outcomes share no image")
    # 1 pp of 1000 images are 10, and 10 are not "more than": floating point must not decide that
    return Finding(code, level if value > threshold + 1e-9 else "ok", value, threshold, note, attack=attack)


def _one_step(e: Evidence) -> Column | None:
    """Right under every one-step attack of the row, or else under that of the audit; None without either."""
    found = [attack.right for attack in e.of_kind("gradients") if attack.one_step]
    if found:
        return worst_of(found)
    return e.audited.get(f"fgsm@{e.row.eps}")


def _loss(attack: Attacked) -> Any:
    return attack.settings.get("loss", "ce")


def _differences(a: Attacked, b: Attacked) -> int:
    names = {*a.settings, *b.settings} - {"loss"}
    return sum(a.settings.get(name) != b.settings.get(name) for name in names)


def _pp(share: float) -> str:
    return f"{100 * share:.1f} %"
