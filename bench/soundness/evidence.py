"""The stored outcomes of one row and one seed, image by image, from which the checks on records are derived."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.core.epsilon import Epsilon
from bench.planning import catalog
from bench.planning.job import ModelJob
from bench.records.record import train_metrics
from bench.records.store import IMAGES, Store
from bench.results.evaluations import EvaluationResult, correct_at
from bench.results.per_image import draw_shares, in_order
from bench.results.rows import Row
from bench.soundness.stored_audits import StoredAudits

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

# the suites of pyautoattack in order; `custom` lists its own
_STAGES = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_COLUMNS = ("index", "correct", "broken_at", "select", "share", "select_at", "share_at", "stage", "radius")
_ONE_STEP = ("fgsm", "FGSM")
# methods of the adapter `torchattacks` that see outputs only
_SCORES_ONLY = ("Square", "SPSA", "OnePixel", "Pixle")


class Column(NamedTuple):
    """Outcomes of an evaluation: `images` are sorted test-set indices, `correct` holds a bool for each.

    `select`: of a stochastic model, the share of correct draws by which a worst case chooses between attacks.
    """

    images: Array
    correct: Array
    select: Array | None = None

    def at(self, rows: Any) -> Column:
        """The outcomes at these positions only."""
        return Column(self.images[rows], self.correct[rows], None if self.select is None else self.select[rows])

    @property
    def share(self) -> float:
        """Share in [0,1] of the images that are correct; NaN without any image."""
        return int(self.correct.sum()) / len(self.correct) if len(self.correct) else math.nan


def on_shared(*columns: Column) -> list[Column]:
    """The columns on the images that all of them have (maybe none)."""
    import numpy as np

    if all(len(c.images) == 0 or int(c.images[-1]) == len(c.images) - 1 for c in columns):  # prefixes of the test set
        n = min(len(column.images) for column in columns)
        return [column.at(slice(n)) for column in columns]
    shared = functools.reduce(np.intersect1d, [column.images for column in columns])
    return [column.at(np.searchsorted(column.images, shared)) for column in columns]


def pairs(a: Column, b: Column) -> tuple[list[bool], list[bool]]:
    """Outcomes of both on the images that both have."""
    a, b = on_shared(a, b)
    return a.correct.tolist(), b.correct.tolist()


def worst_of(*columns: Column) -> Column:
    """Correct under every one of the columns, on the images that all of them have.

    For a stochastic model the column with the fewest correct draws counts for an image, as in
    `bench.results.worst_case`.
    """
    import numpy as np

    found = on_shared(*columns)
    choosing = [column.select for column in found if column.select is not None]
    correct = np.stack([column.correct for column in found])
    if len(choosing) < len(found):
        return Column(found[0].images, np.logical_and.reduce(correct))
    image, select = np.arange(correct.shape[1]), np.stack(choosing)
    chosen = select.argmin(axis=0)
    return Column(found[0].images, correct[chosen, image], select[chosen, image])


@dataclass(frozen=True)
class Attacked:
    """One attack that was carried out.

    - `access`: "gradients", "scores" or "images" (adversarial images of other models).
    - `correct`: under the whole attack; of a stochastic model in most of many draws, if there are any (`voted`).
    - `white`: the same without the stage of a suite that sees scores only, None if the records do not separate it.
    - `deployed`: by the deployed prediction rule.
    - `suite`: the stages of AutoAttack that ran.
    """

    label: str
    name: str
    settings: dict[str, Any]
    entry: EvaluationResult
    access: str
    correct: Column
    white: Column | None
    deployed: Column
    voted: bool
    suite: tuple[str, ...] = ()

    @property
    def one_step(self) -> bool:
        """A single gradient step of full length."""
        return self.name in _ONE_STEP or self.settings.get("method") in _ONE_STEP

    @property
    def scores_stage(self) -> bool:
        """Does it, or one of its stages, search without gradients?"""
        return self.access == "scores" or "square" in self.suite


def stages(name: str, settings: dict[str, Any], deploys: str) -> tuple[str, ...]:
    """The attacks of an AutoAttack suite in order, as they ran: for a stochastic model the suite is `rand`, unless the
    stages were named. Empty for any other attack."""
    if name == "autoattack_fast":
        return _STAGES["standard"]
    if name != "autoattack":
        return ()
    version = settings.get("version", "standard")
    if version != "custom" and deploys != "deterministic":
        version = "rand"
    return _STAGES.get(version) or tuple(settings.get("attacks_to_run", ()))


def access(name: str, settings: dict[str, Any]) -> str:
    """What an attack uses of the model: class constants `access` and `needs_images` of its plug-in."""
    if name == "torchattacks":
        return "scores" if settings.get("method") in _SCORES_ONLY else "gradients"
    plugin = catalog.find("attacks", name)
    if plugin is None:
        return "gradients"
    return "images" if plugin.needs_images else str(plugin.constant("access", "gradients"))


class Evidence:
    """All outcomes of one row and one seed; what was not evaluated is None or empty.

    - `attacks`, `clean`, `certified`, `proofs`: the evaluations that are done; `certified` with the radius of each
      image, `proofs` at the budget of the row.
    - `audit`: that of the model, or why there is none in `no_audit`; `audited`: its outcomes by name.
    - `images`: findings about stored adversarial images, by the key of their evaluation.
    - `smaller`: the same model at smaller budgets of the same norm.
    """

    def __init__(self, store: Store, row: Row, seed: int, audits: StoredAudits) -> None:
        self.row, self.seed, self.images, self._store = row, seed, audits.images, store
        self.smaller: list[Evidence] = []
        found = [by[seed] for by in row.provenance.entries.values() if seed in by]
        evaluation = store.evaluation(found[0].key)
        self.weights = evaluation.weights
        self.train: ModelJob = store.model_job(found[0].train_key)
        self.trained = train_metrics(store.record(self.train.key))
        about = self.train.key, self.weights, evaluation.split
        self.audit, self.no_audit = audits.of(about, row.norm, row.eps)
        self._worst: dict[str, Column | None] = {}  # many checks use the same worst cases
        self.attacks: list[Attacked] = []
        self.clean: Column | None = None
        self.certified: tuple[Column, Array] | None = None
        self.proofs: list[Column] = []
        done = [entry for entry in found if entry.state == "done"]
        for entry in sorted(done, key=lambda entry: str(entry.attack_label)):
            self._add(store, entry)
        self.audited = self._columns(store, self.audit.job.key, done) if self.audit else {}

    def _add(self, store: Store, entry: EvaluationResult) -> None:
        samples, eps = in_order(store.samples(entry.key, _COLUMNS)), self.row.eps_value if self.row.norm else 0.0
        select, share = (draw_shares(store, entry.key, samples, name, eps) for name in ("select", "share"))
        deployed = Column(samples["index"], correct_at(samples, eps), select)
        voted = self.row.deploys != "deterministic" and share is not None
        correct = deployed._replace(correct=share > 0.5) if voted and share is not None else deployed
        if entry.attack == "clean":
            self.clean = correct
        elif "radius" in samples:
            self.certified = deployed, samples["radius"]
        elif entry.proves:
            self.proofs.append(deployed)
        elif entry.norm:
            name, settings = entry.attack, store.evaluation(entry.key).attack.settings
            suite = stages(name, settings, self.row.deploys)
            white = _without_scores(correct, suite, samples.get("stage"))
            about = (entry.attack_label, name, settings, entry, access(name, settings))
            self.attacks.append(Attacked(*about, correct, white, deployed, voted, suite))

    def _columns(self, store: Store, key: str, done: list[EvaluationResult]) -> dict[str, Column]:
        """Outcomes of the audit by name; none where an evaluation has other labels at the same index."""
        try:
            samples = in_order(store.samples(key))
        except (LookupError, ValueError):
            return {}
        for entry in done if "label" in samples else []:
            given = in_order(store.samples(entry.key, ("index", "label")))
            if "label" in given:
                own, audited = (Column(each["index"], each["label"]) for each in (given, samples))
                own, audited = on_shared(own, audited)
                if not bool((own.correct == audited.correct).all()):
                    return {}
        return {name: Column(samples["index"], v) for name, v in samples.items() if v.dtype == bool}

    def sizes_of_absent_images(self, attack: Attacked) -> tuple[float, float] | None:
        """Of adversarial images that were made and are not in the folder, as in a clone: the largest size (norm of the
        perturbation, by the attack's own check in float64) and the eps of the evaluation. None where the images are
        there, or were never stored, or no size is."""
        key, record = attack.entry.key, self._store.record(attack.entry.key)
        threat = self._store.evaluation(key).threat
        if record is None or IMAGES not in record.files or self._store.has(key, IMAGES) or threat is None:
            return None
        sizes = self._store.samples(key, ("size",)).get("size", ())
        return (float(sizes.max()), float(Epsilon(threat.eps))) if len(sizes) else None

    def of_kind(self, kind: str) -> list[Attacked]:
        """Attacks with this access to the model."""
        return [attack for attack in self.attacks if attack.access == kind]

    @property
    def in_headline(self) -> bool:
        """Does the row's worst case include this seed? A row without a worst case includes all."""
        return self.seed in self.row.provenance.keys or not self.row.provenance.keys

    @property
    def single_draws(self) -> bool:
        """Is an outcome that of a few draws of a stochastic model, which proves little?"""
        return self.row.deploys != "deterministic" and not all(attack.voted for attack in self.attacks)

    def white_box(self, *, iterative: bool = False) -> Column | None:
        """Worst case of clean and the gradient attacks alone (or of those with more than one step); None without."""
        found = [a.white for a in self.of_kind("gradients") if a.white is not None and not (iterative and a.one_step)]
        return self._worst_case(f"white {iterative}", found)

    def worst(self, *, deployed: bool = False) -> Column | None:
        """Correct under clean and every attack of the row, or by the deployed rule; None without an attack."""
        found = [attack.deployed if deployed else attack.correct for attack in self.attacks]
        return self._worst_case(f"worst {deployed}", found)

    def _worst_case(self, name: str, attacks: list[Column]) -> Column | None:
        if name not in self._worst:
            clean = [self.clean] if self.clean is not None else []
            self._worst[name] = worst_of(*clean, *attacks) if attacks else None
        return self._worst[name]


def _without_scores(correct: Column, suite: tuple[str, ...], stage: Array | None) -> Column | None:
    """A suite's outcome without its stage that sees scores only; None where a later stage hides that."""
    if "square" not in suite:
        return correct
    place = suite.index("square")
    if stage is None or place < len(suite) - 1:
        return None
    return correct._replace(correct=correct.correct | (stage == place + 1))
