"""Rows and audits -> rows with findings and a verdict. Nothing is measured here.

A finding of an audit concerns the audit's own attacks. Where the row was attacked too, C4, C7 and C12 are decided by
all of its attacks: one that fails is noise (F), a set that fails is not (U).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bench.core.epsilon import reach
from bench.records.store import Store
from bench.results.certificates import RADII
from bench.results.cost import Cost
from bench.results.evaluations import Evaluations, evaluations, within
from bench.results.grouping import grouped
from bench.results.rows import Accuracy, Row
from bench.results.rows import rows as rows_of
from bench.results.seed_values import MIXED, SeedValues
from bench.soundness.catalog import CHECKS
from bench.soundness.checks import GRAVE, Finding, Level, Verdict, verdict
from bench.soundness.evidence import Evidence, on_shared, pairs
from bench.soundness.protocol import PROTOCOL
from bench.soundness.stored_audits import StoredAudits
from bench.soundness.symptoms import SYMPTOMS
from bench.terminal import counted

GRAVITY: tuple[Level, ...] = ("n/a", "ok", "I", "not checked", "F", "U", "X")
# measured at each budget; what an audit measures at one budget only (C9, C10, C19) holds for the model at all of them
_OF_A_BUDGET = frozenset({"C7", "C11", "C12", "C18", "C30"})
VERDICTS: tuple[Verdict, ...] = ("OK", "FLAG", "NOT CHECKED", "DID NOT LEARN", "UNSOUND", "INVALID")
NOT_KEPT = "images not kept"


def judged_rows(
    store: Store,
    keys: Iterable[str] | None = None,
    split: str | None = "test",
    radii: Iterable[float] = RADII,
    known: Evaluations | None = None,
) -> list[Row]:
    """Rows with findings and verdicts: the one path from records to what every table and figure shows.

    Args:
        store: Where the records are; give a `snapshot()` of it where more is read afterwards.
        keys: Jobs to read, evaluations and audits (default: all of the store).
        split: Evaluations on this split only, "test" or "validation"; None takes both.
        radii: L2 radii at which certified accuracy is computed.
        known: `evaluations(store, keys)`, from callers that need it themselves.

    Returns:
        One `Row` for each trained configuration and budget, ordered by method (`bench.results.rows.rows`), with the
        most severe finding of each check over its seeds. An INVALID row has no numbers.
    """
    asked = None if keys is None else list(keys)
    found = evaluations(store, asked) if known is None else known
    judged = with_verdicts(store, rows_of(store, found.of_split(split), radii), asked)
    # not before: checks compare budgets
    return [row for row in judged if store.scope is None or within(store.scope, row.eps)]


def with_verdicts(store: Store, rows: list[Row], keys: Iterable[str] | None = None) -> list[Row]:
    """The same rows with findings and verdicts; audits are searched among `keys` (default: all of the store)."""
    evaluated = {entry.key for row in rows for entry in row.evaluations}
    audits = StoredAudits(store, [key for key in (store.keys() if keys is None else keys) if key not in evaluated])
    done: dict[int, Row] = {}
    for group in grouped(
        rows, lambda row: row.config
    ).values():  # one configuration at a time, so that its outcomes leave the memory
        evidence = {(id(row), seed): Evidence(store, row, seed, audits) for row in group for seed in row.seeds}
        for row in group:
            for seed in row.seeds:
                smaller = [r for r in group if r.norm == row.norm and r.eps_value < row.eps_value and seed in r.seeds]
                evidence[id(row), seed].smaller = [evidence[id(other), seed] for other in smaller]
            done[id(row)] = _with_verdict(row, {seed: findings(evidence[id(row), seed]) for seed in row.seeds})
    return [done[id(row)] for row in rows]


def required(row: Row) -> frozenset[str]:
    """The checks without whose answer a row is NOT CHECKED: those of an audit that could make it unsound or invalid,
    and of a row without a budget those that could make it invalid."""
    if row.norm is None or row.eps_value == 0:
        return frozenset(check.code for check in CHECKS.values() if check.source == "model" and check.worst == "X")
    of_audits = [check for check in CHECKS.values() if check.source in ("model", "images")]
    return frozenset(check.code for check in of_audits if check.worst in ("U", "X"))


def findings(e: Evidence) -> list[Finding]:
    """Every check of one row and seed that has an answer, and "not checked" for each of the others."""
    records = [f for code, measure in PROTOCOL.items() for f in CHECKS[code].findings(measure, e)]
    if reason := _incomparable(e):
        records += [CHECKS[code].not_checked(reason) for code in SYMPTOMS]
    else:
        records += [f for code, measure in SYMPTOMS.items() for f in CHECKS[code].findings(measure, e)]
    found = [*records, *_of_audit(e, records), *_of_images(e)]
    answered = {finding.code for finding in found if finding.level != "not checked"}
    found = [f for f in found if f.level != "not checked" or f.code not in answered]
    absent = [c for c in CHECKS.values() if c.source != "harness" and c.code not in {f.code for f in found}]
    return [*found, *(check.not_checked(e.no_audit or "no audit at this budget") for check in absent)]


def _incomparable(e: Evidence) -> str:
    """Why outcomes of this row must not be compared with each other; empty where they can be."""
    if e.single_draws:
        return "a few draws of a stochastic model, where majorities of 100 are needed"
    return next((state for state, _ in e.row.accuracy.worst.absent.values() if state in MIXED), "")


def _of_audit(e: Evidence, records: list[Finding]) -> list[Finding]:
    """The audit's findings at this budget; C4, C7 and C12 by all attacks of the row where these give an answer."""
    found = []
    # an audit at other budgets or in another norm confirms nothing here, but its failures about the model itself hold
    here = e.audit is not None and e.audit.covers(e.row.norm, e.row.eps)
    for finding in e.audit.findings if e.audit else ():
        elsewhere = finding.code in _OF_A_BUDGET and finding.eps not in (None, e.row.eps)
        if elsewhere or not (here or (finding.eps is None and finding.level in GRAVE)):
            continue
        whole_set = finding.attack is None and finding.level == "U"
        if finding.code == "C1" and e.row.deploys != "deterministic":
            continue  # declared noise: bench.soundness.protocol checks how it was attacked
        if finding.code == "C4" and whole_set and any(attack.scores_stage for attack in e.attacks):
            finding = _flagged(finding, "the row has a gradient-free attack")
        if finding.code == "C7" and whole_set and any(f.code == "C7" and f.level == "ok" for f in records):
            finding = _flagged(finding, "not so for all attacks of the row")
        if finding.code == "C12" and finding.level in ("ok", "U") and finding.attack is None:
            finding = _noise(e, finding)
        found.append(finding)
    return found


def _flagged(finding: Finding, reason: str) -> Finding:
    return replace(finding, level="F", note=f"{finding.note}; {reason}".lstrip("; "))


def _noise(e: Evidence, finding: Finding) -> Finding:
    """C12 for the headline: do uniform draws leave fewer images correct than all attacks of the row together?"""
    worst, noise = e.worst(), e.audited.get(f"noise@{e.row.eps}")
    if worst is None or noise is None:
        return finding
    whole, drawn = on_shared(worst, noise)
    note = f"uniform noise leaves {100 * drawn.share:.1f} %, all attacks {100 * whole.share:.1f} %"
    found = replace(CHECKS["C12"].difference(*pairs(worst, noise), note), eps=finding.eps)
    if found.level == "U":
        return found
    return replace(found, level="F") if finding.level == "U" else finding


def _of_images(e: Evidence) -> list[Finding]:
    """C16: the re-checks of the stored images; "not checked" unless there is one of every attack's images.

    Images that are no longer there were measured when they were made: their sizes are in the records.
    """
    found, unknown, absent = list[Finding](), list[str](), 0
    for attack in e.attacks:
        own = [replace(f, attack=attack.label) for f in e.images.get(attack.entry.key, ())]
        if own and any(finding.level != "not checked" for finding in own):
            found += own
        elif sizes := e.sizes_of_absent_images(attack):
            found.append(_of_sizes(attack.label, *sizes))
            absent += 1
        else:
            unknown.append(": ".join([attack.label, *(finding.note for finding in own)]))
    failed = [finding for finding in found if finding.level in GRAVE]
    if failed:
        return failed
    if unknown:
        return [CHECKS["C16"].not_checked(f"images not checked again: {', '.join(unknown)}")]
    if not found:
        return [CHECKS["C16"].not_checked("no images")]
    again = f"images of {counted(len(e.attacks) - absent, 'attack')} checked again" if absent < len(e.attacks) else ""
    past = f"{NOT_KEPT} of {counted(absent, 'attack')}, whose sizes were measured when they were made" if absent else ""
    return [Finding("C16", "ok", 0.0, note="; ".join(filter(None, (again, past))))]


def _of_sizes(attack: str, largest: float, eps: float) -> Finding:
    """C16 by the largest stored size of a perturbation; nothing is wrong up to the tolerance of `Threat.check`."""
    inside = largest <= reach(eps)
    note = f"images not kept; largest stored size {largest:.6g}, eps {eps:.6g}"
    return Finding("C16", "ok" if inside else "X", float(not inside), 0.0, note, attack=attack)


def _with_verdict(row: Row, by_seed: dict[int, list[Finding]]) -> Row:
    """The most severe verdict over the seeds; a seed outside the headline need not have been audited.

    A seed that learned nothing shows no false robustness, whatever its checks find: such a row did not learn, or is
    flagged where other seeds learned.
    """
    needed, unlearned = required(row), row.accuracy.unlearned
    counted = row.provenance.keys or dict.fromkeys(by_seed)
    by_seed = {seed: _excused(found) if seed in unlearned else found for seed, found in by_seed.items()}
    verdicts: dict[int, Verdict] = {}
    for seed, found in by_seed.items():
        own = verdict(found, needed if seed in counted else frozenset())
        partly: Verdict = "FLAG" if by_seed.keys() - unlearned.keys() else "DID NOT LEARN"
        verdicts[seed] = partly if seed in unlearned and own != "INVALID" else own
    done = replace(row, findings=_most_severe(by_seed), verdict=max(verdicts.values(), key=VERDICTS.index))
    if any(finding.code == "C24" and finding.level in GRAVE for finding in done.findings):
        done = replace(done, provisional=(*done.provisional, "too little attack (C24)"))
    return _without_numbers(done) if done.verdict == "INVALID" else done


def _excused(found: list[Finding]) -> list[Finding]:
    """The findings of a model that predicts by chance, in which what looks like false robustness says nothing."""
    note = "the seed did not learn"
    grave = ("F", "U")
    return [replace(f, level="I", note=f"{f.note}; {note}".lstrip("; ")) if f.level in grave else f for f in found]


def _most_severe(by_seed: dict[int, list[Finding]]) -> tuple[Finding, ...]:
    """One finding for each check and attack; where seeds differ the note names the seed."""
    groups: dict[tuple[int, str], list[tuple[int, Finding]]] = {}
    for seed, found in by_seed.items():
        for finding in found:
            place = (int(finding.code[1:]), finding.attack or "")
            groups.setdefault(place, []).append((seed, finding))
    merged = []
    for _, group in sorted(groups.items()):
        seed, finding = max(group, key=lambda pair: (GRAVITY.index(pair[1].level), pair[1].value or 0.0, -pair[0]))
        alike = len(by_seed) == 1 or (len({f for _, f in group}) == 1 and len(group) == len(by_seed))
        merged.append(finding if alike else replace(finding, note=f"seed {seed}: {finding.note}".rstrip(": ")))
    return tuple(merged)


def _without_numbers(row: Row) -> Row:
    """The row without any result, so that no table can show one; notes remain only where they say why it is invalid."""
    accuracy = row.accuracy
    nothing = SeedValues(absent=dict.fromkeys(row.seeds, ("invalid", "")))
    # each attack has its own, since the tables recognize by identity which of them is AutoAttack
    attacks = {name: replace(nothing) for name in accuracy.attacks}
    suite = (attacks[name] for name, values in accuracy.attacks.items() if values is accuracy.autoattack)
    hidden = Accuracy(
        clean=nothing,
        autoattack=next(suite, nothing),
        attacks=attacks,
        worst=nothing,
        single=nothing,
        proved=dict.fromkeys(accuracy.proved, nothing),
        measured=dict.fromkeys(accuracy.measured, nothing),
        certified=dict.fromkeys(accuracy.certified, nothing),
        acr=nothing,
        collapsed=(),
        unlearned={},
        robust=accuracy.robust,
        share=accuracy.share,
    )
    shown = tuple(f if f.level == "X" else replace(f, value=None, note="") for f in row.findings)
    return replace(row, accuracy=hidden, cost=Cost(), provisional=(), findings=shown)
