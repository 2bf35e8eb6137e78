"""`bench verify PACK --attack-again K`: K evaluations of a pack, drawn at random, repeated with the published weights.

A pack is made by whoever sends it: records, samples and checksums can all be written by hand. What cannot be is a net
that is as robust as they say. So the weights with the recorded SHA-256 are loaded, and on some images of each drawn
evaluation

- the clean predictions of a deterministic model are compared: at most one image in 100 may differ (rounding);
- the same attack is made again with other random numbers. For an honest record it is a fair coin whether an image that
  differs is one that only the record or only the repetition has correct: McNemar's exact test (1947), two-sided;
- PGD on the margin, with restarts, is made on the images that every evaluation of the pack at this budget has correct
  (deterministic models): with confidence, by Clopper and Pearson's bound (1934), at most `MAY_BREAK` of them break.

The two tests together accuse an honest pack with a probability of at most `ALPHA`, however many evaluations are drawn.
The draw depends on the bytes of the pack and on a number that whoever sends it cannot know beforehand.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import plugins
from bench.atomic import file_hash
from bench.core.rng import seed
from bench.core.stats import clopper_pearson_lower, mcnemar
from bench.jobs.verify import checked, print_problems
from bench.planning import catalog, checkpoints
from bench.planning.job import EvaluateJob, ModelJob
from bench.planning.job_fields import PluginChoice
from bench.planning.strict_yaml import read as read_yaml
from bench.records.evaluated_weights import weights_of
from bench.records.pack import unpack_records
from bench.records.packs import SUFFIX
from bench.records.record import evaluation_metrics, weights_file
from bench.records.store import IMAGES, Store
from bench.results.evaluations import correct_at
from bench.terminal import counted

if TYPE_CHECKING:
    from bench.core.classifier import Classifier
    from bench.data.images import Data

ALPHA = 0.001  # probability, at most, that an honest pack is accused
MAY_BREAK = 0.05  # share of the images that a whole row has correct and a strong attack may break
SHOWN = 10  # indices of images in a line
STRONG = {"steps": 100, "restarts": 5, "loss": "cw"}  # of pgd, on the images that a whole row has correct
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Sample:
    """What is repeated: `count` evaluations on `n` images each; `draw`: what, with the pack, chooses both."""

    count: int
    n: int
    draw: int

    def __post_init__(self) -> None:
        for option, value in (("--attack-again", self.count), ("--images", self.n)):
            if value < 1:
                raise ValueError(f"{option} is {value}; expected 1 or more")


def verify_pack(path: Path, sample: Sample | None, weights: list[str], root: Path) -> int:
    """Print what was verified in a pack and what is wrong. Returns the exit code: 4 if anything is.

    `sample`: None to compare checksums alone. `weights`: files, folders and names hf:OWNER/REPO/FILE (empty: those that
    a YAML file beside the pack names). Raises PackError, ValueError, OSError or LookupError in one line.
    """
    if not path.is_file() or path.suffix != SUFFIX:
        raise FileNotFoundError(f"no pack {path}; expected a file that `bench pack` wrote")
    if sample is None and weights:
        raise ValueError("--weights is for --attack-again K, which is not given")
    with tempfile.TemporaryDirectory() as place:
        store = Store(Path(place))
        digest = str(file_hash(path))
        unpack_records(store, [path])
        found = checked(Store(store.root))
        print(f"{path.name}: {counted(found.records, 'record')} and {counted(found.files, 'file')} looked at")
        problems = found.problems
        if sample is not None and not problems:
            named = weights or _beside(path)
            problems = _attack_again(store, digest, sample, named, root)
        return print_problems(problems)


def _beside(pack: Path) -> list[str]:
    """The weights that NAME.yaml beside NAME.zip names; paths in it are inside its folder."""
    path = pack.with_suffix(".yaml")
    if not path.is_file():
        raise FileNotFoundError(f"no weights named: add --weights FOLDER, or {path} with a list `weights:`")
    values, _ = read_yaml(path)
    named = values.get("weights")
    if set(values) != {"weights"} or not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise ValueError(f"{path} holds {', '.join(values) or 'nothing'}; expected one list `weights:` of names")
    inside = path.parent.resolve()
    found = []
    for name in named:
        local = name if name.startswith(checkpoints.HUB) else (inside / name).resolve()
        if isinstance(local, Path) and not local.is_relative_to(inside):
            raise ValueError(f"{path} names {name}, which is outside its folder; expected hf:OWNER/REPO/FILE or a path")
        found.append(str(local))
    return found


def _attack_again(store: Store, digest: str, sample: Sample, named: list[str], root: Path) -> list[str]:
    """What is wrong with the drawn evaluations, one line each."""
    pool = sorted(key for key, job in store.jobs().items() if isinstance(job, EvaluateJob) and _comparable(store, job))
    if not pool:
        return ["no evaluation in it can be repeated: none has verdicts of images and makes its own"]
    drawn = sorted(pool, key=lambda key: seed(digest, sample.draw, key))[: sample.count]
    given, problems = _given(store, named)
    again = _Again(store, sample, digest, root, ALPHA / (2 * len(drawn)))
    for key in drawn:
        job = store.evaluation(key)
        wanted = weights_of(store, job)
        try:
            if wanted is None:
                raise ValueError("not attacked again: the record of its training names no weights")
            if wanted not in given:
                raise ValueError(f"not attacked again: its weights, SHA-256 {wanted[:12]}, are not among --weights")
            place = store.folder(job.model_key) / weights_file(job.weights)
            if not place.exists():
                shutil.copyfile(given[wanted], place)
            assert isinstance(job, EvaluateJob)
            problems += [f"{key}: {line}" for line in again.repeat(job)]
        except Exception as error:  # job, settings and weights are those of whoever sent the pack, and raise anything
            problems.append(f"{key}: {_one_line(error)}")
    print(
        f"{len(drawn)} of {counted(len(pool), 'evaluation')} drawn; the same ones again: "
        f"--attack-again {sample.count} --images {sample.n} --draw {sample.draw}"
    )
    return problems


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"cannot be repeated: {type(error).__name__}: {text}"


def _comparable(store: Store, job: EvaluateJob) -> bool:
    """Has an evaluation a verdict on each image, and does it make its own adversarial images? A metric has no verdict,
    and packs hold no images of other evaluations."""
    record = store.record(job.key)
    if record is None or record.state != "done" or evaluation_metrics(record).metric or len(job.needs) > 1:
        return False
    return not {"correct", "broken_at"}.isdisjoint(store.samples(job.key))


def _given(store: Store, named: list[str]) -> tuple[dict[str, Path], list[str]]:
    """The named weights that some training of the store records, by SHA-256, and a line for each named file that none
    does. Of a folder, files with other content are left out."""
    trained = [store.record(key) for key, job in store.jobs().items() if isinstance(job, ModelJob)]
    recorded = {
        sha for record in trained if record for name, sha in record.files.items() if name.startswith("weights-")
    }
    given: dict[str, Path] = {}
    refused = []
    for name in named:
        folder = Path(name)
        if folder.is_dir():
            files = (each for each in sorted(folder.rglob("*.safetensors")) if each.name != IMAGES and each.is_file())
            hashes = ((each, str(file_hash(each))) for each in files)
            given |= {sha: each for each, sha in hashes if sha in recorded}
            continue
        path = checkpoints.find(name).path
        if (sha := str(file_hash(path))) in recorded:
            given[sha] = path
        else:
            refused.append(f"weights {name} refused: no training in the pack records their SHA-256, {sha[:12]}")
    return given, refused


@dataclass
class _Again:
    """Repeats evaluations of a store. `alpha`: the probability of each test to accuse an honest record."""

    store: Store
    sample: Sample
    digest: str
    root: Path
    alpha: float
    attacked: set[tuple[object, ...]] = field(default_factory=set)

    def repeat(self, job: EvaluateJob) -> list[str]:
        """Print the counts of one evaluation; returns what is wrong. Raises anything where it cannot be repeated."""
        import torch

        from bench.jobs.evaluate import evaluate
        from bench.jobs.model_files import evaluation_images, load_model

        trained, metrics = self.store.model_job(job.model_key), evaluation_metrics(self.store.record(job.key))
        revision = catalog.get("attacks", job.attack.name).revision
        if revision != job.attack.revision:
            made = f"it was made by revision {job.attack.revision} of {job.attack.name}, this is revision {revision}"
            raise ValueError(f"not attacked again: {made}; run it again")
        data = evaluation_images(job, trained, self.root, torch.device("cpu"), lambda values: None)
        if data.test_hash != metrics.test_hash:
            raise ValueError("not attacked again: its test images are not those of the data set here")
        model = load_model(self.store, trained, data, job.weights)
        chosen = self._images(job)
        some = replace(data, test=data.test._replace(x=data.test.x[chosen], y=data.test.y[chosen]))
        short = replace(job, n=len(chosen), parts=(), seed=seed(self.digest, self.sample.draw, "again"))
        new, _, _ = evaluate(short, model, some, lambda values: None)
        fresh, stored = {name: values.numpy() for name, values in new.items()}, self.store.samples(job.key)
        eps = float(plugins.threat_of(job.threat).eps) if job.threat else 0.0
        was, now = correct_at(stored, eps)[chosen], correct_at(fresh, eps)
        said = f"{job.describe(trained.label())}: {counted(len(chosen), 'image')}, correct {was.sum()}, now {now.sum()}"
        wrong = []
        if "label" in stored and (stored["label"][chosen] != some.test.y.numpy()).any():
            wrong.append("its labels are not those of the data set here")
        clean = "clean" if job.threat else "correct"
        other = stored[clean][chosen] != fresh[clean] if clean in stored and clean in fresh else was & ~was
        if not model.stochastic and other.sum() > max(1, len(chosen) // 100):
            wrong.append(f"clean predictions differ on {_named(chosen, other)} of {len(chosen)}")
        only_was, only_now = was & ~now, now & ~was
        if mcnemar(int(only_was.sum()), int(only_now.sum())) < self.alpha:
            wrong.append(
                f"correct in the record alone: {_named(chosen, only_was)}; only now: {only_now.sum()} "
                f"(an honest record: less than 1 in {1 / self.alpha:.0f})"
            )
        elif only_was.any():
            said += f"; broken now: {_named(chosen, only_was)}"
        print(f"{job.key} {said}")
        return wrong + self._strong(short, job, model, some, chosen)

    def _images(self, job: EvaluateJob) -> list[int]:
        """The drawn images of an evaluation, in order."""
        drawn = seed(self.digest, self.sample.draw, job.threat, job.model_key)  # equal for all that share a row
        order = np.random.default_rng(drawn).permutation(job.n)
        return sorted(order[: self.sample.n].tolist())

    def _strong(
        self, short: EvaluateJob, job: EvaluateJob, model: Classifier, some: Data, chosen: list[int]
    ) -> list[str]:
        """A strong attack on the images that every evaluation of a row has correct, once for each row."""
        from bench.data.images import content_hash
        from bench.jobs.evaluate import evaluate

        row = (job.model_key, job.weights, job.split, job.threat)
        if job.threat is None or plugins.threat_of(job.threat).radius == 0 or model.stochastic or row in self.attacked:
            return []
        self.attacked.add(row)
        eps = float(plugins.threat_of(job.threat).eps)
        robust = np.ones(len(chosen), bool)
        for each in self.store.jobs().values():
            if not isinstance(each, EvaluateJob) or (each.model_key, each.weights, each.split, each.threat) != row:
                continue
            if _comparable(self.store, each) and not catalog.get("attacks", each.attack.name).constant("proves", False):
                verdicts = correct_at(self.store.samples(each.key), eps)
                robust &= [verdicts[place] if place < len(verdicts) else True for place in chosen]
        if not robust.any():
            return []
        kept = np.flatnonzero(robust).tolist()
        images = some.test._replace(x=some.test.x[kept], y=some.test.y[kept])
        attack = PluginChoice("pgd", catalog.get("attacks", "pgd").resolve(STRONG, ""))
        new, _, _ = evaluate(
            replace(short, n=len(kept), attack=attack),
            model,
            replace(some, test=images, test_hash=content_hash(images)),
            lambda values: None,
        )
        broken = ~new["correct"].numpy()
        places = [chosen[place] for place in kept]
        said = (
            f"strong PGD breaks {_named(places, broken)} of {len(kept)} that all evaluations of this row have correct"
        )
        if clopper_pearson_lower(int(broken.sum()), len(kept), self.alpha) > MAY_BREAK:
            return [f"{said} (an honest row: at most {MAY_BREAK:.0%})"]
        print(f"{job.key} {said}")
        return []


def _named(places: list[int], mask: Bools) -> str:
    """The count of the marked images, and the first of their indices."""
    found = [place for place, marked in zip(places, mask.tolist(), strict=True) if marked]
    more = ", ..." if len(found) > SHOWN else ""
    listed = f" ({', '.join(map(str, found[:SHOWN]))}{more})" if found else ""
    return f"{counted(len(found), 'image')}{listed}"
