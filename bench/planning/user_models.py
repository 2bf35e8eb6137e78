"""Plans the evaluation of a user's model: an import job in the place of a training, and its evaluations.

The job holds hashes, base names and settings, never a path. A checkpoint is copied into its job's folder before the
import, so that every worker finds it, also on another machine; the import then stores its weights like those of any
training. A model file is not copied, since it may import its neighbors: BENCH_MODEL_FILE names it to workers.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.atomic import file_hash
from bench.data import datasets
from bench.planning import catalog, checkpoints
from bench.planning.checkpoints import Checkpoint
from bench.planning.evaluations import PlannedAttack, audits, predictor_of
from bench.planning.job import ImportJob, Job
from bench.planning.job_fields import Normalization, PluginChoice
from bench.planning.labels import label
from bench.planning.options import value
from bench.planning.spec import Spec
from bench.planning.trainings import images
from bench.planning.typed import ModelOptions
from bench.terminal import counted

IMPORT_REVISION = 1
MODEL_FILE = "BENCH_MODEL_FILE"  # the environment variable that names the model file to every worker
SOURCE = "blocks/source"  # where a checkpoint lies in its job's folder until its weights are stored
ORIGIN = "blocks/origin"  # beside it, of one from a hub: repository, file and commit
ROBUSTBENCH = "robustbench:"
CLEAN_N = 1000  # the first images of the test set, on which the clean accuracy of an import is measured
_NAME = re.compile(r"[\w][\w .,+=()@-]{0,79}")


def import_job(options: ModelOptions, facts: datasets.Facts) -> tuple[ImportJob, Checkpoint | None]:
    """The job that takes the place of a training, and the checkpoint of the model if it has one.

    BENCH_MODEL_FILE then names the model file to every worker. Raises ValueError or LookupError in one line.
    """
    if (options.model or "").startswith(ROBUSTBENCH):
        options = _of_robustbench(options, facts)
    named, file, function = _files(options)
    if file is not None:
        if options.arch is not None or options.arch_set:
            raise ValueError(f"--arch and --arch-set choose an architecture of bench, but {file.name} brings its own")
        architecture = PluginChoice(f"{file.name}:{function}", {}, 1, file_hash(file))
    elif options.arch is None:
        assert named is not None  # `_files` gives one of the two
        if not named.startswith(checkpoints.HUB):
            checkpoints.find(named)  # a file that is missing is told first
        raise ValueError(
            f"which architecture is {named}? Add --arch, one of {', '.join(catalog.names('models'))}; or give "
            f"your own: FILE.py:FUNCTION --checkpoint {named}, or FILE.py:FUNCTION alone where {named} is a whole "
            "model or TorchScript, which your function loads"
        )
    else:
        family, own = catalog.family(options.arch)
        plugin = catalog.get("models", family)
        settings = plugin.resolve({**own, **_settings(options.arch_set)}, "models ")
        architecture = PluginChoice(plugin.name, settings, plugin.revision)
    checkpoint = None if named is None else checkpoints.find(named)
    own_name = checkpoint.row if checkpoint else architecture.name.partition(".py:")[0]
    job = ImportJob(
        engine=IMPORT_REVISION,
        data=images(facts, None, 0),
        model=architecture,
        defense=PluginChoice(_name(options.name, own_name), {}),
        checkpoint=None if checkpoint is None else file_hash(checkpoint.path),
        normalization=normalization(options.normalise, facts),
        randomized=options.randomised,
        seed=0,
    )
    os.environ.pop(MODEL_FILE, None)
    if file is not None:
        os.environ[MODEL_FILE] = str(file.resolve())
    return job, checkpoint


def _of_robustbench(options: ModelOptions, facts: datasets.Facts) -> ModelOptions:
    """The architecture and the checkpoint that `robustbench:NAME` stands for, the latter where robustbench has it."""
    named = str(options.model)
    if options.arch or options.model_file or options.normalise:
        raise ValueError(f"{named} brings architecture and normalization; leave out --arch, --model-file, --normalize")
    name = named.removeprefix(ROBUSTBENCH)
    keys = {"dataset": facts.name if facts.name in ("cifar10", "cifar100") else "imagenet", "threat": "Linf"}
    keys |= _settings(options.arch_set)
    path = Path(options.checkpoint or Path("models", keys["dataset"], keys["threat"], f"{name}.pt"))
    if options.checkpoint is None and not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint of {named}: put it at {path}, as robustbench.load_model('{name}', dataset="
            f"'{keys['dataset']}', threat_model='{keys['threat']}') does where its site can be reached, or name it "
            "by --checkpoint (a model of another threat: --arch-set threat=L2)"
        )
    assignments = [f"{key}={value}" for key, value in keys.items()]
    return replace(options, model=None, checkpoint=str(path), arch=named, arch_set=assignments)


def _files(options: ModelOptions) -> tuple[str | None, Path | None, str]:
    """The checkpoint as named, the model file and its function; the positional MODEL is one of the two."""
    word, checkpoint, model_file = options.model, options.checkpoint, options.model_file
    if word is not None and (".py:" in word or word.endswith(".py")):
        if model_file is not None:
            raise ValueError(f"two model files, {word} and {model_file}; expected one")
        model_file = word
    elif word is not None:
        if not word.startswith(checkpoints.HUB) and not word.endswith(checkpoints.ENDINGS):
            others = "hf:OWNER/REPO, robustbench:NAME or FILE.py:build"
            expected = f"a checkpoint ({', '.join(checkpoints.ENDINGS)}), {others}"
            raise ValueError(f"MODEL is '{word}'; expected {expected}")
        if checkpoint is not None:
            raise ValueError(f"two checkpoints, {word} and {checkpoint}; expected one")
        checkpoint = word
    if model_file is None:
        if checkpoint is None:
            expected = "a checkpoint (FILE.safetensors or FILE.pt with --arch) or FILE.py:build"
            raise ValueError(f"no model named; give {expected}")
        return checkpoint, None, ""
    place, colon, function = model_file.rpartition(":")
    if not (colon and place.endswith(".py") and function.isidentifier()):
        raise ValueError(f"model file '{model_file}'; expected FILE.py:FUNCTION, such as my.py:build")
    checkpoints.check_file(Path(place), "model file")
    return checkpoint, Path(place), function


def _name(given: str | None, of_file: str) -> str:
    """The name of the model in tables: the one given, else that of its file."""
    name = of_file if given is None else given
    if not _NAME.fullmatch(name):
        raise ValueError(f"--name is {name!r}; expected up to 80 letters, digits, spaces and .,+=()@-")
    if name in catalog.names("defenses"):
        raise ValueError(f"--name is '{name}', which is a defense of bench; choose another, such as '{name} (mine)'")
    return name


def _settings(assignments: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals and text):
            raise ValueError(f"--arch-set takes SETTING=VALUE such as width=32, got '{assignment}'")
        found[name] = value(text)
    return found


def normalization(text: str | None, facts: datasets.Facts) -> Normalization | None:
    """`none`, `dataset` or `MEAN/STD`, each one number or one for each channel. Raises ValueError in one line."""
    if text is None:
        return None
    if text == "none":
        return Normalization((0.0,) * facts.channels, (1.0,) * facts.channels)
    if text == "dataset":
        return Normalization(tuple(facts.mean), tuple(facts.std))
    hint = f"--normalize is '{text}'; expected none, dataset or MEAN/STD such as 0.5/0.25 or 0.5,0.5,0.5/0.2,0.2,0.2"
    parts = text.split("/")
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in parts)
    except ValueError:
        raise ValueError(hint) from None
    mean, std = (part * facts.channels if len(part) == 1 else part for part in (mean, std))
    if not len(mean) == len(std) == facts.channels:
        raise ValueError(f"{hint}; {facts.name} has {counted(facts.channels, 'channel')}")
    if not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
        raise ValueError(f"{hint}; finite numbers, STD above 0")
    return Normalization(tuple(mean), tuple(std))


def jobs(imported: ImportJob, spec: Spec, facts: datasets.Facts) -> list[Job]:
    """The import and the evaluations of a spec on it. Raises LookupError or ValueError in one line."""
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


def describe(imported: ImportJob) -> str:
    """Name, architecture, checkpoint and kind of a model, as one line."""
    from_file = f", checkpoint {imported.checkpoint[:12]}" if imported.checkpoint else ""
    architecture = label("models", imported.model.name, imported.model.settings)
    return f"{imported.defense.name}: {architecture}{from_file}, {predictor_of(imported)}"
