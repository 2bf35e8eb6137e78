"""Time of a job without a similar past record: declared passes x images x (epochs x) seconds of one forward pass F.

Each defense and attack declares its passes per image in the constant `cost`. One pass of the model is timed once on
this device in a child process and stored in the user's cache folder. Torch-free.
"""

from __future__ import annotations

import ast
import json
import math
import re
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from bench.atomic import write_json
from bench.data import datasets, folders
from bench.executors import devices, processes
from bench.planning import catalog
from bench.planning.job import AuditJob, ImportJob, Job, ModelJob, TrainJob
from bench.records.runtime_estimate import Estimate, cpu_name

SPREAD = 2.0  # the range of an estimate: from half of it to twice
START = 0.2  # seconds of a job besides its passes: start of the worker, data, files
# passes per image of a stochastic model besides the attack: 200 single draws, and for a vote two predictions of 100
DRAWS = {"deterministic": 0.0, "randomised": 200.0, "smoothed": 400.0}
PREDICTION = ("n_draws", "n_vote")  # settings of a defense that say how many passes its deployed prediction takes
AUDITS = {("model", "quick"): 1000.0, ("model", "full"): 4000.0, ("images", "quick"): 30.0, ("images", "full"): 60.0}
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[A-Za-z_]\w*|[()+]")


class PassTime(NamedTuple):
    """Seconds: `call` + `image` * b of a forward pass of b images, and `update` of a step of the optimizer."""

    call: float
    image: float
    update: float

    def seconds(self, images: float) -> float:
        """Seconds of a forward pass of so many images."""
        return self.call + self.image * images


class CostModel:
    """Estimates for jobs on one device.

    `root`: the data folder; `measure`: time a model that is not in the cache (about a second, and the start of a
    process) instead of leaving it unknown.
    """

    def __init__(self, root: Path, slot: devices.Slot, measure: bool = True) -> None:
        self.root, self.slot, self.measure = root, slot, measure
        self.problems: list[str] = []
        self._times: dict[str, PassTime | None] = {}

    def __call__(self, job: Job, trained: ModelJob) -> Estimate | None:
        """Seconds with their range; None if the plug-in declares no cost or the model cannot be timed.

        `trained`: the training or import whose model an evaluation uses; the job itself if it is one.
        """
        with suppress(LookupError, ValueError):  # the plug-in or the data set is not on this machine
            passes = _passes(job, trained, datasets.facts(trained.data.name, self.root).classes)
            times = None if passes is None else self._time(trained)
            if passes is not None and times is not None:
                low, high = (_seconds(job, count, times) for count in passes)
                likely = math.sqrt(low * high)
                return Estimate(START + likely, START / SPREAD + low / SPREAD, (START + high) * SPREAD, (), 0)
        return None

    def _time(self, trained: ModelJob) -> PassTime | None:
        """Time of a pass of the model, from the cache or measured now."""
        facts = datasets.facts(trained.data.name, self.root, trained.data.size)
        arguments: tuple[Any, ...]
        settings: dict[str, Any]
        if isinstance(trained, ImportJob) and trained.model.sha256 is not None:
            settings, digest = {}, trained.model.sha256
            function, arguments = "measure_user_model", (trained, facts)
        else:
            settings, digest = trained.model.settings, catalog.get("models", trained.model.name).sha256
            function, arguments = "measure", (trained.model.name, settings, facts)
        about = [trained.model.name, settings, digest[:12], facts.channels, facts.size, facts.classes]
        key = json.dumps([*about, *self._where], sort_keys=True)
        if key not in self._times:
            where = self.slot.device, dict(self.slot.environment)
            self._times[key] = _cached(key) or (
                self._measured(key, function, *arguments, *where) if self.measure else None
            )
        return self._times[key]

    def _measured(self, key: str, function: str, *arguments: Any) -> PassTime | None:
        try:
            found = PassTime(**processes.ask("bench.progress.forward_pass", function, *arguments))
        except (ValueError, LookupError, OSError) as error:
            self.problems.append(f"the model could not be timed: {error}")
            return None
        with suppress(OSError):  # a cache folder that cannot be written costs a second each time
            _file().parent.mkdir(parents=True, exist_ok=True)
            write_json(_file(), {**_stored(), key: found._asdict()})
        return found

    @cached_property
    def _where(self) -> tuple[str, str]:
        """The device and the version of torch that a time was measured with; read once, as both take milliseconds."""
        if self.slot.device != "cuda":
            return cpu_name(), version("torch")
        names = []
        with suppress(devices.NoAnswer):  # a slot without a number is any GPU of this machine
            names = [gpu.name for gpu in devices.query() if self.slot.place in (gpu.index, gpu.uuid, "cuda")]
        return names[0] if names else "a GPU of unknown name", version("torch")


def declared(
    plugin: catalog.Plugin, settings: dict[str, Any], classes: int, prediction: float = 1.0
) -> tuple[float, float] | None:
    """Passes F per image that a plug-in's `cost` amounts to under `settings`, as a range; None where it declares none.

    In `(2 steps + 3) F = 23F` a name is a setting: a number, the sum of a list of whole numbers, the length of another
    list, or the passes of the plug-in that it names; `len(NAME)` is the length of any list, K the number of classes
    and P the passes of one deployed prediction. A formula that cannot be read so counts as the number behind its `=`.
    `A to B` is a range.
    """
    formula, _, example = str(plugin.constant("cost", "")).partition("=")
    names = {"F": 1.0, "K": float(classes), "P": prediction}
    for field in plugin.fields:
        given = settings.get(field.name, field.default)
        value = _number(plugin.kind, given, classes)
        if value is not None:
            names[field.name] = value
        if isinstance(given, list | tuple):
            formula = formula.replace(f"len({field.name})", str(len(given)))
    try:
        ends = [_value(part, names) for part in formula.split(" to ")]
    except ValueError:
        number = re.match(r"\s*([\d.]+)\s*F", example)
        if number is None:
            return None
        ends = [float(number[1])]
    return min(ends), max(ends)


def _number(kind: catalog.Kind, value: Any, classes: int) -> float | None:
    """The value of a setting in a formula."""
    if isinstance(value, list | tuple):
        return float(sum(value) if all(isinstance(each, int) for each in value) else len(value))
    if isinstance(value, dict) and value.get("name") in catalog.names(kind):
        inside = declared(catalog.get(kind, value["name"]), value.get("set", {}), classes)
        return None if inside is None else math.sqrt(inside[0] * inside[1])
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _value(formula: str, names: dict[str, float]) -> float:
    """Sums and products, where two factors stand side by side. Raises ValueError for anything else."""
    tokens = _TOKEN.findall(formula)
    if "".join(tokens) != "".join(formula.split()):
        raise ValueError(f"cannot read the cost '{formula}'")
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", " ".join(tokens))
    try:
        return _evaluated(ast.parse(text, mode="eval").body, names)
    except SyntaxError:
        raise ValueError(f"cannot read the cost '{formula}'") from None


def _evaluated(node: ast.expr, names: dict[str, float]) -> float:
    if isinstance(node, ast.BinOp):
        left, right = _evaluated(node.left, names), _evaluated(node.right, names)
        return left + right if isinstance(node.op, ast.Add) else left * right
    if isinstance(node, ast.Constant):
        return float(node.value)  # type: ignore[arg-type]
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    raise ValueError(f"the cost names '{ast.unparse(node)}', which is no setting")


def _passes(job: Job, trained: ModelJob, classes: int) -> tuple[float, float] | None:
    """Forward passes per image of the whole job (of one epoch of a training)."""
    if isinstance(job, ImportJob):
        return 1.0, 1.0
    if isinstance(job, TrainJob):
        return declared(catalog.get("defenses", job.defense.name), job.defense.settings, classes)
    stochastic, prediction = 0.0, 1.0
    if isinstance(trained, TrainJob):
        stochastic = DRAWS[catalog.get("defenses", trained.defense.name).predictor]
        prediction = next((float(n) for name in PREDICTION if (n := trained.defense.settings.get(name))), 1.0)
    if isinstance(job, AuditJob):
        count = AUDITS[job.part, job.level]
        return count + stochastic, count + stochastic
    plugin = catalog.get("attacks", job.attack.name)
    found = declared(plugin, job.attack.settings, classes, prediction)
    if plugin.constant("metric", ""):
        stochastic = 0.0  # no images of an attack that single draws score
    return None if found is None else (found[0] + stochastic, found[1] + stochastic)


def _seconds(job: Job, passes: float, times: PassTime) -> float:
    """Seconds of so many passes per image over all images of the job, batch by batch."""
    if isinstance(job, TrainJob):
        images = job.data.train - job.data.validation
        batch = min(job.training.get("batch_size", images), images)
        steps = job.epochs * max(images // batch, 1)
        return float(steps * (times.update + passes * times.seconds(batch)))
    block = min(job.size, 500.0)
    return job.size / block * passes * times.seconds(block) if job.size else 0.0


def _file() -> Path:
    return folders.cache() / "forward_pass.json"


def _stored() -> dict[str, dict[str, float]]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _cached(key: str) -> PassTime | None:
    with suppress(TypeError, KeyError):
        return PassTime(**_stored()[key])
    return None
