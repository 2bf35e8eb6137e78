"""Tiny plug-ins and a tiny run: what the tests of executors, runs and commands share.

`fragile` (a defense) and `wobble` (an attack) do what a file beside them says: kill, raise, nan, other (weights), sleep
(as long as it is there). The file is no part of any key, so the same command can fail once and succeed later. `fragile`
does so in its training only, not in the trial step before it, which would refuse the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.records.store import Store


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Bench = Callable[..., Outcome]


_HEAD = '''"""min CE

Nobody (2024).
"""
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from bench.core.attack import Attack, Columns, Context, Evaluation, Outcome
from bench.core.defense import Batch, Defense, Losses

def misbehave(file):
    todo = Path(file).with_suffix(".todo")
    what = todo.read_text() if todo.exists() else ""
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise RuntimeError(f"broken on purpose in {file}")
    while what == "sleep" and todo.exists():
        time.sleep(0.05)
    return what

'''
PLUGINS = {
    "plain": """@dataclass
class Plain(Defense):
    uses_threat: ClassVar[bool] = False
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        return {"ce": F.cross_entropy(net(batch.x), batch.y)}
""",
    "fragile": """@dataclass
class Fragile(Defense):
    uses_threat: ClassVar[bool] = False
    def loss(self, net: nn.Module, batch: Batch, adv: Any) -> Losses:
        what = misbehave(__file__) if len(batch.x) > 2 else ""  # the trial step before a run has two images
        factor = {"nan": float("nan"), "other": 0.5}.get(what, 1.0)
        return {"ce": factor * F.cross_entropy(net(batch.x), batch.y)}
""",
    "wobble": """@dataclass
class Wobble(Attack):
    block: ClassVar[int] = 8
    def perturb(self, model: nn.Module, x: Tensor, y: Tensor, ctx: Context) -> tuple[Tensor, Columns]:
        misbehave(__file__)
        noise = self.threat.sample(x)
        return self.threat.project_to_image(x, x + noise), {"draw": noise.flatten(1).sum(1)}
""",
    "picky": """@dataclass
class Picky(Evaluation):
    def unsupported_reason(self, model: Any) -> str | None:
        return "not in the mood"
""",
}


def write_plugins(folder: Path) -> list[object]:
    """The plug-in files, as `--plugin` options."""
    options: list[object] = []
    for name, text in PLUGINS.items():
        path = folder / f"{name}.py"
        path.write_text(_HEAD + text)
        options += ["--plugin", path]
    return options


def tiny(*words: object, defense: str = "plain", attack: str = "clean,wobble") -> list[object]:
    """`run` on a few digits: less than a second a job."""
    chosen = ["--defense", defense, "--attack", attack, "--no-baseline", "--model", "mlp"]
    return ["run", *chosen, "--train-n", 64, "--n", 16, "--epochs", 1, "--device", "cpu", "--checks", "off", *words]


def states(results: Path) -> dict[str, str]:
    """State of each job by `defense` or `defense/attack`; jobs without a record are left out."""
    store = Store(results)
    jobs = store.jobs()
    found = {}
    for key, job in jobs.items():
        record = store.record(key)
        trained = job if job.kind == "train" else jobs[job.needs[0]]
        name = trained.defense.name
        if record is not None:
            found[name if job.kind == "train" else f"{name}/{job.attack.name}"] = record.state
    return found


def outcomes(results: Path) -> dict[str, Any]:
    """All that a run says about models and samples, apart from times and machine: to be compared bit by bit."""
    store = Store(results)
    found: dict[str, Any] = {}
    for job, record in store.records():
        found[job.key] = (record.state, record.files)
        if job.kind == "evaluate" and record.state == "done":
            samples = store.samples(job.key)
            found[job.key] = (record.state, {name: np.asarray(v).tobytes() for name, v in samples.items()})
    return found


def written(results: Path) -> dict[str, tuple[int, int]]:
    """Identity and time of every record: what was not run again keeps both."""
    stats = {path.parent.name: path.stat() for path in results.glob("*/record.json")}
    return {key: (stat.st_ino, stat.st_mtime_ns) for key, stat in stats.items()}


def alive(pid: int) -> bool:
    """Is there such a process, other than a zombie?"""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        pass
    if Path("/proc/self").exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
