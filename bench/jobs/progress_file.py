"""progress.json of a job folder: how far a worker is, for the live view and `bench status`."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from torch import nn

from bench.atomic import read_json
from bench.records.store import SHARED


class ProgressFile:
    """Writes the reports of a job at most twice a second, by rename. `device`: cpu or cuda, where it runs.

    A report may hold `earlier`: the seconds of work that previous attempts spent on the reported share. The last value
    given is repeated in later reports. `passes`: the images that passed through the models given to `count`.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.began, self.last, self.earlier, self.passes = time.monotonic(), -math.inf, 0.0, 0
        self.values = dict[str, Any]()

    def count(self, model: nn.Module) -> None:
        """Report the passes through a model too: they show that a long step of an attack goes on."""

        def counted(module: nn.Module, given: tuple[Any, ...]) -> None:
            self.passes += len(given[0])
            self(self.values)

        model.register_forward_pre_hook(counted)

    def __call__(self, values: dict[str, Any]) -> None:
        self.values, self.earlier = values, values.get("earlier", self.earlier)
        spent, now = time.monotonic() - self.began, time.time()  # the wall clock may be set back
        if spent - self.last > 0.5:
            self.last = spent
            about = {
                "earlier": self.earlier,
                "passes": self.passes,
                "began": now - spent,
                "now": now,
                "pid": os.getpid(),
            }
            text = json.dumps({**values, **about, "device": self.device})
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")  # without fsync: a lost report costs nothing
            temporary.replace(self.path)


def jobs_on_device(folder: Path) -> int:
    """The most jobs that shared the device of this one at a time, as counted by the driver; 1 without a count."""
    try:
        return int(read_json(folder / SHARED))
    except (OSError, ValueError, TypeError):
        return 1
