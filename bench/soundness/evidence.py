"""What the records say of one row and one seed, image by image: what the checks in `symptoms` look at."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bench.planning import catalog
from bench.records.store import Store
from bench.results.evaluations import Evaluation, right_at
from bench.results.rows import Row
from bench.results.worst_case import draw_shares, in_order
from bench.soundness.stored_audits import Audits

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
    """Which test images are right under something: `images` are sorted test-set indices, with a bool for each.

    `select`: of a model with noise, the share of draws by which a worst case chooses between attacks.
    """

    images: Array
    right: Array
    select: Array | None = None

    @property
    def is_prefix(self) -> bool:
        """Are these the first images of the test set?"""
        return len(self.images) == 0 or int(self.images[-1]) == len(self.images) - 1

    def at(self, places: Any) -> Column:
        """The images at these places alone."""
        return Column(self.images[places], self.right[places], None if self.select is None else self.select[places])

    @property
    def share(self) -> float:
        """Share in [0,1] of the images that are right; NaN without any image."""
        import numpy as np

        return int(np.count_nonzero(self.right)) / len(self.right) if len(self.right) else math.nan


def on_shared(columns: Iterable[Column]) -> list[Column]:
    """The columns on the images that all of them have (maybe none)."""
    import numpy as np

    found = list(columns)
    if all(column.is_prefix for column in found):
        n = min(len(column.images) for column in found)
        return [column.at(slice(n)) for column in found]
    shared = functools.reduce(np.intersect1d, [column.images for column in found])
    return [column.at(np.searchsorted(column.images, shared)) for column in found]


def worst_of(columns: Iterable[Column]) -> Column:
    """Right under every one of the columns, on the images that all of them have.

    Where a model draws, the column with the fewest right draws counts for an image, as in `bench.results.worst_case`.
    """
    import numpy as np

    found = on_shared(columns)
    choosing = [column.select for column in found if column.select is not None]
    right = np.stack([column.right for column in found])
    if len(choosing) < len(found):
        return Column(found[0].images, np.logical_and.reduce(right))
    place = np.arange(right.shape[1])
    chosen = np.argmin(np.stack(choosing), axis=0)
    return Column(found[0].images, right[chosen, place], np.stack(choosing)[chosen, place])


@dataclass(frozen=True)
class Attacked:
    """One attack that was carried out: `access` is "gradients", "scores" or "images" (made on other models).

    `right`: under the whole attack, of a model with noise in most of many draws (then `voted`) where there are any;
    `white`: the same without a stage of a suite that sees scores only, None where the suite does not tell that apart;
    `deployed`: by the model's own rule; `suite`: the stages of AutoAttack that ran.
    """

    label: str
    name: str
    settings: dict[str, Any]
    entry: Evaluation
    access: str
    right: Column
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
        """Does it search without gradients, in whole or in a stage?"""
        return self.access == "scores" or "square" in self.suite


def stages(name: str, settings: dict[str, Any], deploys: str) -> tuple[str, ...]:
    """The attacks of an AutoAttack suite in order, as they ran: against a model that draws the suite is `rand`, unless
    the stages were named. Empty for any other attack."""
    if name != "autoattack":
        return ()
    version = settings.get("version", "standard")
    if version != "custom" and deploys != "deterministic":
        version = "rand"
    return _STAGES.get(version) or tuple(settings.get("attacks_to_run", ()))


def access(name: str, settings: dict[str, Any]) -> str:
    """What an attack sees of the model, as its file says (class constants `access` and `needs_images`)."""
    if name == "torchattacks":
        return "scores" if settings.get("method") in _SCORES_ONLY else "gradients"
    try:
        plugin = catalog.get("attacks", name)
    except (LookupError, ValueError):  # records outlive plug-ins
        return "gradients"
    return "images" if plugin.constant("needs_images", False) else str(plugin.constant("access", "gradients"))


class Evidence:
    """Row and seed with all that was measured of them. Columns are empty for what was not."""

    def __init__(self, store: Store, row: Row, seed: int, audits: Audits) -> None:
        """`audit`: that of the model, or why there is none in `no_audit`; its per-sample columns stand in `audited`,
        where they are of the same images. `images`: findings about stored images by evaluation."""
        self.row, self.seed, self.images = row, seed, audits.images
        entries = [by[seed] for by in row.entries.values() if seed in by and by[seed].state == "done"]
        some = next(by[seed] for by in row.entries.values() if seed in by)
        evaluated = store.evaluation(some.key)
        self.weights = evaluated.weights
        self.train = store.model_job(some.train_key)
        self.trained: dict[str, Any] = (store.record(self.train.key) or {}).get("metrics", {})
        about = self.train.key, self.weights, evaluated.split
        self.audit, self.no_audit = audits.of(about, row.norm, row.eps)
        self._worst: dict[str, Column | None] = {}  # many checks ask for the same worst cases
        self.attacks: list[Attacked] = []
        self.clean: Column | None = None
        self.certified: tuple[Column, Array] | None = None
        for entry in sorted(entries, key=lambda entry: str(entry.attack_label)):
            self._take(store, entry)
        self.audited = self._columns(store, self.audit.job.key, entries) if self.audit else {}

    def _take(self, store: Store, entry: Evaluation) -> None:
        samples, job = store.samples(entry.key, _COLUMNS), store.evaluation(entry.key)
        samples = in_order(samples)
        index, eps = samples["index"], self.row.eps_value if self.row.norm else 0.0
        select, share = (draw_shares(store, entry.key, samples, name, eps) for name in ("select", "share"))
        deployed = Column(index, right_at(samples, eps), select)
        voted = self.row.deploys != "deterministic" and share is not None
        right = deployed._replace(right=share > 0.5) if voted and share is not None else deployed
        if entry.attack == "clean":
            self.clean = right
        elif "radius" in samples:
            self.certified = deployed, samples["radius"]
        elif entry.norm:
            name, settings = entry.attack, job.attack.settings
            suite = stages(name, settings, self.row.deploys)
            white = _without_scores(right, suite, samples.get("stage"))
            facts = (entry.attack_label, name, settings, entry, access(name, settings))
            self.attacks.append(Attacked(*facts, right, white, deployed, voted, suite))

    def _columns(self, store: Store, key: str, entries: list[Evaluation]) -> dict[str, Column]:
        """Per-sample columns of the audit by name; none where an evaluation has other labels at the same index."""
        try:
            samples = store.samples(key)
        except ValueError:
            return {}
        order = samples["index"].argsort(kind="stable")
        index = samples["index"][order]
        for entry in entries if "label" in samples else []:
            given = in_order(store.samples(entry.key, ("index", "label")))
            if "label" in given:
                own = Column(given["index"], given["label"])
                own, theirs = on_shared([own, Column(index, samples["label"][order])])
                if not bool((own.right == theirs.right).all()):
                    return {}
        return {n: Column(index, v[order]) for n, v in samples.items() if v.dtype == bool}

    def of_kind(self, kind: str) -> list[Attacked]:
        """Attacks with this access to the model."""
        return [attack for attack in self.attacks if attack.access == kind]

    @property
    def in_headline(self) -> bool:
        """Does the row's worst case rest on this seed too? A row without one rests on all."""
        return self.seed in self.row.keys or not self.row.keys

    @property
    def single_draws(self) -> bool:
        """Is anything here the outcome of a few draws of a model with noise, of which little follows?"""
        return self.row.deploys != "deterministic" and not all(attack.voted for attack in self.attacks)

    def white_box(self, *, iterative: bool = False) -> Column | None:
        """Worst case of clean and the gradient attacks alone (or of those with more than one step); None without."""
        found = [a.white for a in self.of_kind("gradients") if a.white is not None and not (iterative and a.one_step)]
        return self._worst_case(f"white {iterative}", found)

    def worst(self, *, deployed: bool = False) -> Column | None:
        """Right under clean and every attack of the row, or by the model's own rule; None without an attack."""
        found = [attack.deployed if deployed else attack.right for attack in self.attacks]
        return self._worst_case(f"worst {deployed}", found)

    def _worst_case(self, name: str, attacks: list[Column]) -> Column | None:
        if name not in self._worst:
            clean = [self.clean] if self.clean is not None else []
            self._worst[name] = worst_of([*clean, *attacks]) if attacks else None
        return self._worst[name]


def _without_scores(right: Column, suite: tuple[str, ...], stage: Array | None) -> Column | None:
    """A suite's outcome had its stage without gradients not been run; None where a later stage hides that."""
    if "square" not in suite:
        return right
    place = suite.index("square")
    if stage is None or place < len(suite) - 1:
        return None
    return right._replace(right=right.right | (stage == place + 1))
