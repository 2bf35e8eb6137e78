"""Records and per-sample arrays -> evaluations. Accuracies are computed here and never stored."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.core.epsilon import Epsilon
from bench.core.stats import audited_interval, clopper_pearson_upper
from bench.planning.evaluations import RANDOMISED_REVISION
from bench.planning.job import EvaluateJob
from bench.records.record import Record, evaluation_metrics
from bench.records.store import JOB, Scope, Store
from bench.results.facts import TrainingFacts, float_or_nan

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One evaluation at one budget; its fields are the columns of `frame`, where each is explained.

    Text is None where it is unknown or does not apply, and so are counts; a float is then NaN.
    """

    key: str
    train_key: str
    config: str
    dataset: str
    split: str
    model: str
    defense: str
    defense_label: str
    attack: str
    attack_label: str
    attack_version: str
    norm: str | None
    eps: str | None
    eps_value: float
    train_norm: str | None
    train_eps: str | None
    train_images: int
    seed: int
    n: int
    state: str
    reason: str | None
    accuracy: float = math.nan
    low: float = math.nan
    high: float = math.nan
    median_distance: float = math.nan
    audited: int | None = None
    unjudged: float = 0.0
    measures: str | None
    measured: float = math.nan
    proves: bool
    test_hash: str | None = None
    attack_seconds: float = math.nan
    attack_joules: float = math.nan
    forwards: float = math.nan
    backwards: float = math.nan
    train_seconds: float
    seconds_per_epoch: float
    work_per_image_f: float
    inference_ms: float
    peak_memory_mb: float
    train_joules: float
    device: str | None = None
    train_device: str | None
    commit: str | None = None
    dirty: bool | None = None
    workers: int | None
    attack_workers: int | None = None
    recipe: str
    epochs: int
    deploys: str
    train_state: str


@dataclass(frozen=True)
class Unreadable:
    """A job folder that cannot be read, and the reason."""

    key: str
    reason: str
    state: str = "unreadable"


class Evaluations(NamedTuple):
    """What `evaluations` found, each part ordered by data set, defense, seed, attack and key."""

    readable: list[EvaluationResult]
    unreadable: list[Unreadable]

    def of_split(self, split: str | None) -> list[EvaluationResult]:
        """The readable evaluations on "test" or "validation" images; None gives both.

        Ranks use test images only, since settings may have been chosen on validation images.
        """
        return [e for e in self.readable if split in (None, e.split)]

    def at(self, scope: Scope | None) -> Evaluations:
        """Those at the budgets of a scope."""
        return self if scope is None else self._replace(readable=[e for e in self.readable if within(scope, e.eps)])

    @property
    def measuring(self) -> list[EvaluationResult]:
        """Those that measure something other than robustness, of every split."""
        return [e for e in self.readable if e.measures is not None]

    def lines(self) -> list[dict[str, object]]:
        """One dictionary per evaluation, unreadable ones first: None where there is no value."""
        nothing: dict[str, object] = dict.fromkeys(COLUMNS)
        return [nothing | vars(e) for e in self.unreadable] + [dict(vars(e)) for e in self.readable]


_DTYPES = {"float": "float64", "int": "Int64", "int | None": "Int64", "bool": "boolean", "bool | None": "boolean"}
# the columns of `frame`: object ones hold None where there is no value, float64 ones NaN
COLUMNS: dict[str, str] = {f.name: _DTYPES.get(str(f.type), "object") for f in fields(EvaluationResult)}


def evaluations(store: Store, keys: Iterable[str] | None = None) -> Evaluations:
    """The evaluations among `keys` (default: all of the store), done or not; seeds are never averaged here."""
    wanted = store.keys() if keys is None else dict.fromkeys(keys)
    readable: list[EvaluationResult] = []
    unreadable: list[Unreadable] = []
    facts = TrainingFacts(store)
    for key in wanted:
        if keys is None and not store.has(key, JOB):
            continue  # an empty folder
        try:
            readable += _evaluations(store, facts, key)
        except (LookupError, ValueError) as problem:
            unreadable.append(Unreadable(key, str(problem)))
    readable.sort(key=lambda e: (e.dataset, e.defense_label, e.seed, e.attack_label, e.key))
    return Evaluations(readable, sorted(unreadable, key=lambda e: e.key))


def within(scope: Scope, eps: str | None) -> bool:
    """Does a scope include this budget? It includes what depends on none."""
    return eps is None or not scope.budgets or Epsilon(eps) in scope.budgets


def frame(store: Store, keys: Iterable[str] | None = None) -> pd.DataFrame:
    """One row an evaluation among `keys` (default: all of the store), done or not; seeds are never averaged here.

    key, train_key; config: hash of the training job without its seed, of the attacked weights and of the split they
    are evaluated on; dataset; split: test or validation; model, defense, defense_label, attack, attack_label,
    attack_version (engine.revision); norm, eps (text), eps_value: the budget attacked, None where none is;
    train_norm, train_eps: the budget trained at, None for a defense that uses none; train_images, n: number of images
    asked for; seed; state: done, error, timeout, oom, diverged, unsupported, missing (no record), blocked (its
    training failed), stale (a stochastic model, evaluated by an older rule) or unreadable (damaged job or samples), and
    its reason; accuracy, low, high: share in [0,1] and its 95 % Wilson interval, NaN unless done; median_distance:
    over the images that are correct without an attack, to what a minimal-norm attack found; inf if it found nothing
    for half of them;
    audited: how many survivors of a screen the full suite judged, and unjudged: bound on the share that it would break
    of the others; measures, measured: for an evaluation that does not measure robustness, the measured column and its
    mean, which appear in no table of accuracies; proves: its accuracy is certified, a lower bound; test_hash;
    attack_seconds; attack_joules, train_joules: that the GPU used for the whole job, where NVML tells it; forwards,
    backwards: passes per image;
    train_seconds, seconds_per_epoch; work_per_image_f: of a training step, in forward passes F of the net;
    inference_ms: per image; peak_memory_mb: of the training, on the GPU or else resident; device: of the attack;
    train_device, commit, dirty; workers, attack_workers: above 1 the times of the training, or of the attack, shared
    the machine; recipe, epochs, deploys, train_state.
    """
    import pandas as pd

    lines = evaluations(store, keys).lines()
    return pd.DataFrame({c: pd.Series([line[c] for line in lines], dtype=d) for c, d in COLUMNS.items()})  # type: ignore[call-overload]


def _evaluations(store: Store, facts: TrainingFacts, key: str) -> list[EvaluationResult]:
    """The evaluation of this key: one for each budget of a security curve, none if the job is not an evaluation."""
    job = store.job(key)
    if not isinstance(job, EvaluateJob):
        return []
    budgets = job.attack.settings.get("budgets") or [job.threat.eps if job.threat else None]
    return [_evaluation(store, facts, job, eps) for eps in budgets]


def correct_at(samples: dict[str, Any], eps: float) -> np.ndarray[Any, Any]:
    """Which images (bool) are correct at a budget; of a security curve those that only a larger budget breaks."""
    if "broken_at" in samples:
        found: np.ndarray[Any, Any] = samples["broken_at"] > eps
        return found
    return samples["correct"].astype(bool)  # type: ignore[no-any-return]


def _evaluation(store: Store, facts: TrainingFacts, job: EvaluateJob, eps: str | None) -> EvaluationResult:
    record = store.record(job.key)
    planned = _planned(facts, job, record, eps)
    if planned.state in ("missing", "error") and planned.train_state not in ("done", "missing"):
        training = store.record(planned.train_key)
        reason = f"training {planned.train_state}: {training.problem if training else None}"
        planned = replace(planned, state="blocked", reason=reason)
    if planned.deploys != "deterministic" and job.engine < RANDOMISED_REVISION and planned.state == "done":
        # such samples cannot be combined with newer ones: the draws that evaluate also chose the attack
        why = "evaluated before choosing and evaluating draws were separate; `bench run` does it again"
        return replace(planned, state="stale", reason=why)
    if record is None:
        return planned
    metrics, origin = evaluation_metrics(record), record.provenance
    ran = replace(
        planned,
        test_hash=metrics.test_hash,
        attack_seconds=float_or_nan(metrics.attack_seconds),
        attack_joules=float_or_nan(record.energy_joules),
        forwards=float_or_nan(metrics.forwards_per_image),
        backwards=float_or_nan(metrics.backwards_per_image),
        device=origin.device,
        commit=origin.commit,
        dirty=origin.dirty,
        attack_workers=origin.workers,
    )
    return ran if ran.state != "done" else _with_result(store, ran)


def _planned(facts: TrainingFacts, job: EvaluateJob, record: Record | None, eps: str | None) -> EvaluationResult:
    """What is known before an evaluation has run, with its state and reason."""
    weights = (job.weights, *([job.split] if job.split != "test" else []))
    return EvaluationResult(
        **facts.of_training(job.model_key, *weights),
        key=job.key,
        split=job.split,
        attack=job.attack.name,
        attack_label=facts.label("attacks", job.attack.name, job.attack.settings),
        attack_version=f"{job.engine}.{job.attack.revision}",
        norm=job.threat.norm if job.threat else None,
        eps=eps,
        eps_value=facts.value(eps) if eps is not None else math.nan,
        n=job.n,
        measures=facts.measures(job.attack.name, record),
        proves=facts.proves(job.attack.name),
        state=record.state if record else "missing",
        reason=record.problem if record else None,
    )


def _with_result(store: Store, e: EvaluationResult) -> EvaluationResult:
    """With the accuracy or the measured mean; unreadable where the samples are damaged."""
    try:
        if e.measures:
            return replace(e, measured=float(store.samples(e.key)[e.measures].mean()))
        samples = store.samples(e.key, ("index", "correct", "broken_at", "distance", "audited", "screened"))
        if "index" not in samples:
            raise ValueError(f"the samples of {e.key} have no column index; run the job again")
        correct = correct_at(samples, 0.0 if math.isnan(e.eps_value) else e.eps_value)
        hits, n = int(correct.sum()), len(correct)
        audited, unjudged = _audit(samples, correct)
        low, high = audited_interval(hits, n, unjudged)
        distance = _median_distance(store, e.key, samples)
        return replace(
            e, accuracy=hits / n, low=low, high=high, median_distance=distance, audited=audited, unjudged=unjudged
        )
    except (LookupError, OSError, ValueError) as problem:
        return replace(e, state="unreadable", reason=str(problem))


def _median_distance(store: Store, key: str, samples: dict[str, Any]) -> float:
    """Over the images that are correct without an attack; one that a minimal-norm attack never broke counts as inf."""
    import numpy as np

    if "distance" not in samples:
        return math.nan
    clean = store.samples(key, ("clean",))["clean"]
    asked = clean.astype(bool) & ~np.isnan(samples["distance"])
    return float(np.median(samples["distance"][asked])) if asked.any() else math.nan


def _audit(samples: dict[str, Any], correct: np.ndarray[Any, Any]) -> tuple[int | None, float]:
    """Of a suite that judged `audited` survivors of a screen: their number, and a bound on the share of all images that
    are `screened` only and that it would break (one-sided, 97.5 %, exact whatever the screen is)."""
    if "audited" not in samples:
        return None, 0.0
    audited, screened = int(samples["audited"].sum()), int(samples["screened"].sum())
    if not screened:
        return audited, 0.0
    broken = int((samples["audited"] & ~correct).sum())
    share = clopper_pearson_upper(broken, audited, 0.025) if audited else 1.0
    return audited, screened / len(correct) * share
