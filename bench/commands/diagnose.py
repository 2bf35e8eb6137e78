"""`bench doctor MODEL`: prints each line of the diagnosis as soon as it is known."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from bench.data import datasets
from bench.data.images import load as load_data
from bench.data.images import test_block, to_channels_last
from bench.doctor import diagnosis
from bench.jobs import user_model
from bench.planning import user_models
from bench.planning.job_fields import Normalization
from bench.planning.options import place
from bench.planning.typed import ModelOptions


def diagnose(options: ModelOptions, dataset: str, size: int | None, data_dir: Path | None, as_json: bool) -> int:
    """Load the model, examine it, print; returns the exit code, 4 after a FAIL. Raises if it cannot be loaded.

    What the model itself prints goes to stderr.
    """
    name, root = place(dataset, datasets.data_root(data_dir))
    datasets.check(name, root, explicit=data_dir is not None)
    facts = datasets.facts(name, root, size)
    # no row is written, so the name of the file may be that of a defense
    job, checkpoint = user_models.import_job(replace(options, name="model"), facts)
    applied = job.normalization
    if applied is None and job.model.sha256 is None and job.model.name != "robustbench":
        applied = Normalization(facts.mean, facts.std)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    title = checkpoint.path.name if checkpoint else job.model.name
    out = sys.stdout
    with redirect_stdout(sys.stderr):
        state, which = user_model.checkpoint(job, checkpoint.path if checkpoint else None, title)
        model = user_model.deployed(job, user_model.loaded(job, facts, state, title), torch.device("cpu"))
        loading = diagnosis.Line("loading", "OK", f"{title}; {user_model.chosen(model)}")
        with suppress(Exception):  # of the forward pass, which "output shape" names
            reason = user_model.not_repeatable(job, facts, state, model, title)
            value = reason.partition("; ") if reason else (f"{title}; {user_model.notes(model, facts, which)}", "", "")
            loading = diagnosis.Line("loading", "FAIL" if reason else "OK", value[0], value[2])
        failed = loading.state == "FAIL"
        _show(loading, as_json, out)
        n = min(diagnosis.IMAGES, facts.test)
        data = load_data(name, root=root, device=device, size=size, train=1, test=n)
        x, y = test_block(data, 0, n)
        for line in diagnosis.examine(model.to(device), to_channels_last(x), y, facts, job.randomized, applied):
            failed |= line.state == "FAIL"
            _show(line, as_json, out)
    return 4 if failed else 0


def _show(line: diagnosis.Line, as_json: bool, out: TextIO) -> None:
    if as_json:
        print(json.dumps(line._asdict()), file=out, flush=True)
        return
    print(f"{line.state:4}  {line.check}: {line.value}", file=out, flush=True)
    if line.todo:
        print(f"      {line.todo}", file=out, flush=True)
