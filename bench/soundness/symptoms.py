"""Symptoms of false robustness in stored outcomes: each function compares attacks on one row and seed.

Outcomes are compared on the images that both have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from bench.core.epsilon import Epsilon
from bench.core.stats import wilson
from bench.soundness.catalog import WITHSTANDS_ONE_STEP
from bench.soundness.checks import Check, Finding, NotApplicable, NotMeasured
from bench.soundness.evidence import Attacked, Column, Evidence, on_shared, pairs, worst_of
from bench.terminal import counted


def iterative_beats_one_step(check: Check, e: Evidence) -> Iterator[Finding]:
    """C7: several steps never leave more images correct than one step does."""
    once, worst = _one_step(e), e.white_box(iterative=True)
    if once is None or worst is None:
        raise NotMeasured("needs a one-step and an iterative gradient attack")
    yield check.difference(*pairs(worst, once), _percent("one step {}, iterative {}", once, worst))
    for attack in e.attacks:
        if attack.name == "pgd" and not attack.one_step:
            own = check.difference(*pairs(attack.correct, once), "weaker than one step", attack=attack.label)
            if own.level == "F":
                yield own


def success_grows(check: Check, e: Evidence) -> Iterator[Finding]:
    """C8: accuracy never rises with the budget, compared with smaller budgets of the same norm."""
    if not e.smaller:
        raise NotMeasured("one budget, or none smaller than this one")
    whole_sets = []
    for other in e.smaller:
        matching = [(a, b) for a in e.attacks for b in other.attacks if a.label == b.label]
        for attack, before in matching:
            note = f"above its own accuracy at eps {other.row.eps}"
            own = check.difference(*pairs(attack.correct, before.correct), note, attack=attack.label)
            if own.level == "F":
                yield own
        here, there = e.worst(), other.worst()
        # only equal attack sets: with fewer attacks the accuracy at a smaller budget may be higher
        if matching and len(matching) == len(e.attacks) == len(other.attacks) and here and there:
            note = _percent(f"worst case {{}} here, {{}} at eps {other.row.eps}", here, there)
            whole_sets.append(check.difference(*pairs(here, there), note))
    absent = check.not_checked("no smaller budget has the same attacks")
    yield max(whole_sets, key=lambda finding: (finding.level != "ok", finding.value or 0.0), default=absent)


def black_box_does_not_win(check: Check, e: Evidence) -> Iterator[Finding]:
    """C13: a search without gradients lowers the worst case of the gradient attacks by next to nothing."""
    searches = [a.correct for a in e.attacks if a.scores_stage and (a.access == "scores" or a.white is not None)]
    return _add_nothing(check, e, searches, "search", "Square or AutoAttack standard")


def transfer_does_not_win(check: Check, e: Evidence) -> Iterator[Finding]:
    """C14: images made on other models lower the worst case of the gradient attacks by next to nothing."""
    return _add_nothing(check, e, [a.correct for a in e.of_kind("images")], "transferred images", "the attack transfer")


def _add_nothing(check: Check, e: Evidence, others: list[Column], name: str, needed: str) -> Iterator[Finding]:
    white = e.white_box()
    if white is None or not others:
        raise NotMeasured(f"needs a gradient attack, and {needed}")
    both = worst_of(white, *others)
    note = _percent(f"gradient attacks leave {{}}, with {name} {{}}", white, both)
    yield check.difference(*pairs(white, both), note)


def losses_agree(check: Check, e: Evidence) -> Iterator[Finding]:
    """C15: PGD on cross-entropy and on a margin are about equally successful.

    Preferred are two evaluations with equal settings, then the audit's two, then the two most alike.
    """
    pgd = [a for a in e.attacks if a.name == "pgd"]
    found = [(a, b) for a in pgd for b in pgd if _loss(a) == "ce" and _loss(b) in ("cw", "dlr")]
    pair = min(found, key=lambda pair: (_differences(*pair), pair[0].label, pair[1].label), default=None)
    audited = {f"PGD of the audit on {loss}": e.audited.get(f"pgd-{loss}@{e.row.eps}") for loss in ("ce", "cw")}
    compared = {name: column for name, column in audited.items() if column is not None}
    unequal = ""
    if pair is not None and (_differences(*pair) == 0 or len(compared) < 2):
        compared = {attack.label: attack.correct for attack in pair}
        unequal = ", not at equal settings" if _differences(*pair) else ""
    if len(compared) < 2:
        raise NotMeasured("needs pgd with loss=ce and with loss=cw")
    note = f"{', '.join(compared)}{unequal}: {_percent('{}, {}', *compared.values())}"
    first, second = pairs(*compared.values())
    yield check.difference(max(first, second, key=sum), min(second, first, key=sum), note)


def certificate_holds(check: Check, e: Evidence) -> Iterator[Finding]:
    """C25: no attack breaks an image with a proof at its budget; certified accuracy at r is never above attacked
    accuracy at the same L2 r, beyond the intervals."""
    worst = e.worst(deployed=True)
    if e.proofs and worst is not None:
        broken, n = _broken_proofs(e.proofs, worst)
        note = f"{counted(broken, 'image')} of {n} broken in spite of a proof"
        yield Finding(check.code, "X" if broken else "ok", broken / n if n else None, 0.0, note)
        return
    if e.certified is None or worst is None or e.row.norm != "L2":
        raise NotApplicable("needs a proof or an L2 certificate beside an attack")
    column, radius = e.certified
    covered = column._replace(correct=column.correct & (radius >= e.row.eps_value))
    certified, attacked = on_shared(covered, worst)
    n = len(certified.images)
    if n == 0:
        raise NotMeasured("certificate and attack share no image")
    low, high = wilson(int(certified.correct.sum()), n)[0], wilson(int(attacked.correct.sum()), n)[1]
    note = _percent(f"certified {{}}, attacked {{}} on {counted(n, 'image')}", certified, attacked)
    yield Finding(check.code, "X" if low > high else "ok", certified.share - attacked.share, high - low, note)


def _broken_proofs(proofs: list[Column], worst: Column) -> tuple[int, int]:
    """How many images are proved and broken, and of how many; each proof on the images that it shares with attacks."""
    shared = [on_shared(proof, worst) for proof in proofs]
    counts = [int((proof.correct & ~attacked.correct).sum()) for proof, attacked in shared]
    return sum(counts), sum(len(proof.images) for proof, _ in shared)


def no_sudden_overfitting(check: Check, e: Evidence) -> Iterator[Finding]:
    """C26: a net trained against a threat that resists one step and not several."""
    threat, dropped = e.train.threat, e.trained.sudden_drop_epoch
    if threat is None:
        raise NotApplicable("not trained against a threat")
    if dropped is not None and e.weights == "last":
        fall = 100 * check.limits["F"]
        yield check.failed(f"accuracy under PGD on validation images fell by {fall:g} pp in epoch {dropped}")
        return
    if e.row.norm != threat.norm or e.row.eps_value > float(Epsilon(threat.eps)):
        raise NotApplicable("beyond the budget trained at, where one step may well be too few")
    once, whole = _one_step(e), e.white_box(iterative=True)
    if once is None or whole is None or e.clean is None:
        raise NotMeasured("needs clean, fgsm and an iterative gradient attack")
    worst, single, clean = on_shared(whole, once, e.clean)
    note = _percent("one step {}, iterative {}, clean {}", single, worst, clean)
    found = check.difference(*pairs(single, worst), note)
    withstands = single.share >= WITHSTANDS_ONE_STEP * clean.share
    yield found if withstands else Finding(check.code, "ok", found.value, found.threshold, note)


SYMPTOMS: dict[str, Callable[[Check, Evidence], Iterator[Finding]]] = {
    "C7": iterative_beats_one_step,
    "C8": success_grows,
    "C13": black_box_does_not_win,
    "C14": transfer_does_not_win,
    "C15": losses_agree,
    "C25": certificate_holds,
    "C26": no_sudden_overfitting,
}


def _one_step(e: Evidence) -> Column | None:
    """Correct under every one-step attack of the row, or under that of the audit; None without either."""
    found = [attack.correct for attack in e.of_kind("gradients") if attack.one_step]
    return worst_of(*found) if found else e.audited.get(f"fgsm@{e.row.eps}")


def _loss(attack: Attacked) -> str:
    return str(attack.settings.get("loss", "ce"))


def _differences(a: Attacked, b: Attacked) -> int:
    names = {*a.settings, *b.settings} - {"loss"}
    return sum(a.settings.get(name) != b.settings.get(name) for name in names)


def _percent(template: str, *columns: Column) -> str:
    """The template with the accuracies on the images that all columns have."""
    return template.format(*(f"{100 * column.share:.1f} %" for column in on_shared(*columns)))
