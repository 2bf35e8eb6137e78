"""A model of the user's in the place of a training: what was named -> a job of kind `import` and its evaluations.

The job holds hashes, base names and settings, never a path. A checkpoint is copied into its job's folder while the
import runs (from then on its weights lie there as those of any training), so that every worker finds it, also on
another machine. A model file is not copied, since it may import its neighbours: BENCH_MODEL_FILE names it to workers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.atomic import file_hash
from bench.data import datasets
from bench.planning import catalog
from bench.planning import evaluations as cells
from bench.planning.job import IMPORTED, Job
from bench.planning.labels import label
from bench.planning.plan import images
from bench.planning.spec import Spec

IMPORT_REVISION = 1
MODEL_FILE = "BENCH_MODEL_FILE"  # the environment variable that names the model file to every worker
SOURCE = "blocks/source"  # where a checkpoint lies in its job's folder until its weights are stored
CLEAN_N = 1000  # the first images of the test set, on which the clean accuracy of an import is measured
CHECKPOINTS = (".safetensors", ".pt", ".pth")
_NAME = re.compile(r"[\w][\w .,+=()@-]{0,79}")


@dataclass(frozen=True)
class Model:
    """What the user named. `normalise`: mean and std a channel, None where nothing was typed."""

    checkpoint: Path | None
    arch: str | None
    settings: dict[str, Any]
    file: Path | None
    function: str
    normalise: dict[str, list[float]] | None
    randomised: bool
    name: str


def named(
    word: str | None,
    checkpoint: Path | None,
    arch: str | None,
    arch_set: list[str],
    model_file: str | None,
    normalise: str | None,
    randomised: bool,
    name: str | None,
    facts: datasets.Facts,
) -> Model:
    """The model that options name; `word` is the positional MODEL. Raises ValueError or LookupError in one line."""
    checkpoint, model_file = _placed(word, checkpoint, model_file)
    if checkpoint is None and model_file is None:
        raise ValueError("no model named; give a checkpoint (FILE.safetensors or FILE.pt with --arch) or FILE.py:build")
    file, function = _function(model_file) if model_file is not None else (None, "")
    if checkpoint is not None:
        _readable(checkpoint, "checkpoint")
    if file is not None and (arch is not None or arch_set):
        raise ValueError(f"--arch and --arch-set choose an architecture of bench, but {file.name} brings its own")
    if file is None and arch is None:
        raise ValueError(f"which architecture is {checkpoint}? Add --arch, one of {', '.join(catalog.names('models'))}")
    settings = catalog.get("models", arch).resolve(_settings(arch_set), "models ") if arch else {}
    row = name if name is not None else (checkpoint.stem if checkpoint else file.stem if file else "")
    if not _NAME.fullmatch(row):
        raise ValueError(f"--name is {row!r}; expected up to 80 letters, digits, spaces and .,+=()@-")
    if row in catalog.names("defenses"):
        raise ValueError(f"--name is '{row}', which is a defense of bench; choose another, such as '{row} (mine)'")
    return Model(checkpoint, arch, settings, file, function, normalisation(normalise, facts), randomised, row)


def _placed(word: str | None, checkpoint: Path | None, model_file: str | None) -> tuple[Path | None, str | None]:
    """The positional MODEL goes where an option would have put it."""
    if word is None:
        return checkpoint, model_file
    if ".py:" in word or word.endswith(".py"):
        if model_file is not None:
            raise ValueError(f"two model files, {word} and {model_file}; expected one")
        return checkpoint, word
    if not word.endswith(CHECKPOINTS):
        raise ValueError(f"MODEL is '{word}'; expected a checkpoint ({', '.join(CHECKPOINTS)}) or FILE.py:build")
    if checkpoint is not None:
        raise ValueError(f"two checkpoints, {word} and {checkpoint}; expected one")
    return Path(word), model_file


def _function(text: str) -> tuple[Path, str]:
    place, colon, function = text.rpartition(":")
    if not (colon and place.endswith(".py") and function.isidentifier()):
        raise ValueError(f"model file '{text}'; expected FILE.py:FUNCTION, such as my.py:build")
    _readable(Path(place), "model file")
    return Path(place), function


def _readable(path: Path, what: str) -> None:
    if path.is_dir():
        raise ValueError(f"{what} {path} is a folder; expected a file")
    if not path.is_file():
        raise FileNotFoundError(f"no {what} {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{what} {path} is empty")


def _settings(assignments: list[str]) -> dict[str, Any]:
    from bench.planning.options import value

    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals and text):
            raise ValueError(f"--arch-set takes SETTING=VALUE such as width=32, got '{assignment}'")
        found[name] = value(text)
    return found


def normalisation(text: str | None, facts: datasets.Facts) -> dict[str, list[float]] | None:
    """`none`, `dataset` or `MEAN/STD`, each a number or one a channel. Raises ValueError in one line."""
    if text is None:
        return None
    if text == "none":
        return {"mean": [0.0] * facts.channels, "std": [1.0] * facts.channels}
    if text == "dataset":
        return {"mean": list(facts.mean), "std": list(facts.std)}
    hint = f"--normalise is '{text}'; expected none, dataset or MEAN/STD such as 0.5/0.25 or 0.5,0.5,0.5/0.2,0.2,0.2"
    parts = text.split("/")
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in parts)
    except ValueError:
        raise ValueError(hint) from None
    mean, std = (part * facts.channels if len(part) == 1 else part for part in (mean, std))
    if not len(mean) == len(std) == facts.channels:
        raise ValueError(f"{hint}; {facts.name} has {facts.channels} channels")
    if not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
        raise ValueError(f"{hint}; finite numbers, STD above 0")
    return {"mean": mean, "std": std}


def job(model: Model, facts: datasets.Facts) -> Job:
    """The job that takes the place of a training: `what` has the shape of one where tables read it."""
    if model.file is not None:
        about = {"name": f"{model.file.name}:{model.function}", "set": {}, "revision": 1}
        about["sha256"] = file_hash(model.file)
    else:
        architecture = catalog.get("models", model.arch or "")
        revision = architecture.constant("revision", 1)
        about = {"name": architecture.name, "set": model.settings, "revision": revision}
    what = {
        "engine": IMPORT_REVISION,
        "data": images(facts, None, 0),
        "model": about,
        "checkpoint": None if model.checkpoint is None else {"sha256": file_hash(model.checkpoint)},
        "normalise": model.normalise,
        "randomised": model.randomised,
        "defense": {"name": model.name, "set": {}, "revision": 1},
        "threat": None,
        "recipe": IMPORTED,
        "train": {"epochs": 0},
        "seed": 0,
    }
    return Job("import", what)


def jobs(model: Model, spec: Spec, facts: datasets.Facts) -> list[Job]:
    """The import and the evaluations of a spec on it. Raises LookupError or ValueError in one line."""
    imported = job(model, facts)
    evaluations: list[Job] = []
    for entry in spec.attacks:
        if cells.needs_images(entry.name):
            raise ValueError(f"attack {entry.name} takes images made against other rows; `bench eval` has one model")
        made = cells.evaluations(spec, facts, entry, imported)
        if not made:
            raise ValueError(
                f"attack {entry.name} is for {' or '.join(cells.wants(entry.name))} models, and this one is "
                f"{cells.deploys(imported)}; leave it out"
            )
        evaluations += made
    return [imported, *evaluations, *cells.audits(spec, facts, imported, evaluations)]


def describe(spec: Spec, planned: list[Job], notes: list[str]) -> list[str]:
    """What an evaluation of an imported model is about to do, in words."""
    what = planned[0].what
    from_file = what["checkpoint"] and f", checkpoint {what['checkpoint']['sha256'][:12]}"
    budgets = ", ".join(f"{eps} ({float(eps):.4f})" for eps in spec.threat.eps)
    attacks = dict.fromkeys(
        f"{label('attacks', each.what['attack']['name'], each.what['attack']['set'])} n={each.what['n']}"
        for each in planned
        if each.kind == "evaluate"
    )
    return [
        f"model     {what['defense']['name']}: {label('models', what['model']['name'], what['model']['set'])}"
        f"{from_file or ''}, {'randomised' if what['randomised'] else 'deterministic'}",
        f"data      {spec.data.name}",
        f"threat    {spec.threat.norm} eps {budgets}",
        f"attacks   {'; '.join(attacks)}",
        *(f"chosen    {note}" for note in notes),
    ]
