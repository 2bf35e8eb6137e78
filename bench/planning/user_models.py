"""A user's model in the place of a training: the options that name it -> an import job and its evaluations.

The job holds hashes, base names and settings, never a path. A checkpoint is copied into its job's folder while the
import runs (from then on its weights lie there as those of any training), so that every worker finds it, also on
another machine. A model file is not copied, since it may import its neighbors: BENCH_MODEL_FILE names it to workers.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.atomic import file_hash
from bench.data import datasets
from bench.planning import catalog
from bench.planning.evaluations import PlannedAttack, audits, predictor_of
from bench.planning.job import EvaluateJob, ImportJob, Job
from bench.planning.job_fields import Normalization, PluginChoice
from bench.planning.labels import label
from bench.planning.plan import images
from bench.planning.spec import Spec
from bench.planning.typed import ModelOptions

IMPORT_REVISION = 1
MODEL_FILE = "BENCH_MODEL_FILE"  # the environment variable that names the model file to every worker
SOURCE = "blocks/source"  # where a checkpoint lies in its job's folder until its weights are stored
CLEAN_N = 1000  # the first images of the test set, on which the clean accuracy of an import is measured
CHECKPOINTS = (".safetensors", ".pt", ".pth", ".pth.tar", ".ckpt", ".bin")
_NAME = re.compile(r"[\w][\w .,+=()@-]{0,79}")


@dataclass(frozen=True)
class Model:
    """The model that the user named. `normalise`: mean and std of each channel, None where the option is not given."""

    checkpoint: Path | None
    arch: str | None
    settings: dict[str, Any]
    file: Path | None
    function: str
    normalise: Normalization | None
    randomised: bool
    name: str


def named(options: ModelOptions, facts: datasets.Facts) -> Model:
    """The model that the options name; BENCH_MODEL_FILE then names its file to every worker. Raises ValueError or
    LookupError in one line."""
    checkpoint, model_file = _placed(options.model, options.checkpoint, options.model_file)
    if checkpoint is None and model_file is None:
        raise ValueError("no model named; give a checkpoint (FILE.safetensors or FILE.pt with --arch) or FILE.py:build")
    file, function = _function(model_file) if model_file is not None else (None, "")
    if checkpoint is not None:
        _readable(checkpoint, "checkpoint")
    if file is not None and (options.arch is not None or options.arch_set):
        raise ValueError(f"--arch and --arch-set choose an architecture of bench, but {file.name} brings its own")
    if file is None and options.arch is None:
        raise ValueError(
            f"which architecture is {checkpoint}? Add --arch, one of {', '.join(catalog.names('models'))}; or give "
            f"your own: FILE.py:FUNCTION --checkpoint {checkpoint}"
        )
    arch, row = options.arch, options.name
    settings = catalog.get("models", arch).resolve(_settings(options.arch_set), "models ") if arch else {}
    if row is None:
        row = checkpoint.stem if checkpoint else file.stem if file else ""
    if not _NAME.fullmatch(row):
        raise ValueError(f"--name is {row!r}; expected up to 80 letters, digits, spaces and .,+=()@-")
    if row in catalog.names("defenses"):
        raise ValueError(f"--name is '{row}', which is a defense of bench; choose another, such as '{row} (mine)'")
    os.environ.pop(MODEL_FILE, None)
    if file is not None:
        os.environ[MODEL_FILE] = str(file.resolve())
    mean_std = normalisation(options.normalise, facts)
    return Model(checkpoint, arch, settings, file, function, mean_std, options.randomised, row)


def _placed(word: str | None, checkpoint: Path | None, model_file: str | None) -> tuple[Path | None, str | None]:
    """Checkpoint and model file, with the positional MODEL taken as one of them."""
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


def normalisation(text: str | None, facts: datasets.Facts) -> Normalization | None:
    """`none`, `dataset` or `MEAN/STD`, each one number or one for each channel. Raises ValueError in one line."""
    if text is None:
        return None
    if text == "none":
        return Normalization((0.0,) * facts.channels, (1.0,) * facts.channels)
    if text == "dataset":
        return Normalization(tuple(facts.mean), tuple(facts.std))
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
    return Normalization(tuple(mean), tuple(std))


def job(model: Model, facts: datasets.Facts) -> ImportJob:
    """The job that takes the place of a training."""
    if model.file is not None:
        architecture = PluginChoice(f"{model.file.name}:{model.function}", {}, 1, file_hash(model.file))
    else:
        plugin = catalog.get("models", model.arch or "")
        architecture = PluginChoice(plugin.name, model.settings, plugin.constant("revision", 1))
    return ImportJob(
        engine=IMPORT_REVISION,
        data=images(facts, None, 0),
        model=architecture,
        defense=PluginChoice(model.name, {}),
        checkpoint=None if model.checkpoint is None else file_hash(model.checkpoint),
        normalization=model.normalise,
        randomized=model.randomised,
        seed=0,
    )


def jobs(model: Model, spec: Spec, facts: datasets.Facts) -> list[Job]:
    """The import and the evaluations of a spec on it. Raises LookupError or ValueError in one line."""
    imported = job(model, facts)
    planned: list[Job] = []
    for entry in spec.attacks:
        attack = PlannedAttack(spec, facts, entry)
        if attack.plugin.needs_images:
            raise ValueError(f"attack {entry.name} uses images made against other rows; `bench eval` has one model")
        made = attack.evaluations(imported)
        if not made:
            raise ValueError(
                f"attack {entry.name} is for {' or '.join(attack.plugin.predictors)} models, and this one is "
                f"{predictor_of(imported)}; leave it out"
            )
        planned += made
    return [imported, *planned, *audits(spec, facts, imported, planned)]


def describe(spec: Spec, planned: list[Job], notes: list[str]) -> list[str]:
    """Lines that describe the evaluation of an imported model before it starts."""
    imported = planned[0]
    assert isinstance(imported, ImportJob)
    from_file = f", checkpoint {imported.checkpoint[:12]}" if imported.checkpoint else ""
    budgets = ", ".join(f"{eps} ({float(eps):.4f})" for eps in spec.threat.eps)
    attacks = dict.fromkeys(f"{each.label()} n={each.n}" for each in planned if isinstance(each, EvaluateJob))
    return [
        f"model     {imported.defense.name}: {label('models', imported.model.name, imported.model.settings)}"
        f"{from_file}, {'randomised' if imported.randomized else 'deterministic'}",
        f"data      {spec.data.name}",
        f"threat    {spec.threat.norm} eps {budgets}",
        f"attacks   {'; '.join(attacks)}",
        *(f"chosen    {note}" for note in notes),
    ]
