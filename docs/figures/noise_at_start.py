"""What the probability term of `noisy` sees of an untrained net, and after a few steps.

python docs/figures/noise_at_start.py --measure FOLDER measures it on the first training images of
specs/earlier/mnist.yaml and specs/earlier/cifar10_jpeg.yaml, whose data lie in FOLDER, and stores
docs/findings/noise_at_start.json: about 2 minutes on one core. Without an option it writes
docs/findings/noise_at_start.md from that record and from the logs in results/.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from records import FINDINGS, ROOT
from torch import Tensor, nn

from bench.core.rng import scope, seed
from bench.data.images import load as load_data
from bench.data.images import to_channels_last, to_float
from bench.noise import diagnostics, losses
from bench.noise.closed_form import scale
from bench.planning.job import TrainJob
from bench.planning.plan import plan
from bench.planning.spec import load
from bench.records.packs import LOG
from bench.records.store import Store
from bench.tables.markdown import table
from bench.training.train import build
from bench.training.training_run import TrainingRun
from defenses.noisy import Noisy

IMAGES, STEPS, SEEDS = 128, 20, (0, 1, 2)
RECORD = FINDINGS / "noise_at_start.json"
COLUMNS = {
    "gap": "median |d|", "gap_constant": "constant share of |d|", "logit_std": "std of a logit over images",
    "noise": "median sqrt q", "t": "median t", "prob": "probability term", "slope": "its slope in d",
    "mse": "squared error", "trace_share": "share of tr S in it", "grad_prob": "gradient norm, probability",
    "grad_mse": "gradient norm, squared error",
}  # fmt: skip
HEAD = """# The probability term of `noisy` on an untrained net

Written by `python docs/figures/noise_at_start.py` from noise_at_start.json, which its option `--measure FOLDER`
stores, and from the records in `results/earlier/`. `noisy` in the source's setting (sigma 0.6 at the first layer),
the nets and initial weights of specs/earlier/mnist.yaml and specs/earlier/cifar10_jpeg.yaml; {images} training
images, three seeds, and seed 0 after {steps} steps of the recipe of its spec.

d is the gap from the true class to its strongest rival, sqrt q the standard deviation of d under the noise, t = d /
sqrt q. The constant share of |d| is what the same two classes differ by in the mean logits, sum |d'| / sum (|d'| +
|d - d'|); the slope is that of -log Phi(t) in d, mean over images. Gradient norms are those of the means of the terms
in the weights.

"""


def jobs(spec: str, root: Path) -> list[TrainJob]:
    """The training of `noisy` in the source's setting from a spec, with each of the seeds."""
    found = (job for job in plan(load(ROOT / "specs" / "earlier" / f"{spec}.yaml"), root) if isinstance(job, TrainJob))
    settings = {"sigma": 0.6, "structure": "jacobian", "site": "first"}
    job = next(j for j in found if j.defense.name == "noisy" and settings.items() <= j.defense.settings.items())
    return [dataclasses.replace(job, seed=number) for number in SEEDS]


def measure(defense: Noisy, net: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The quantities of COLUMNS on images `x` (b c h w) with labels `y`."""
    with scope(0):  # of the probe of the trace
        terms, q, moments = defense.terms(net, x, y, scale(net))
    d = losses.gap(moments.mean, y, losses.competitors(moments.mean, y, len(q))).detach()
    q = q.detach().clamp_min(losses.Q_MIN)
    t = losses.in_noise(d, q)
    log_density = -0.5 * t.square() - 0.5 * math.log(2 * math.pi)
    with torch.no_grad():
        trace = moments.covariance().diagonal(dim1=1, dim2=2).sum(1)
        error = losses.squared_error(moments.mean, trace, y, "logits")
    found = {
        "gap": d.abs().median(), "logit_std": moments.mean.detach().std(0).mean(), "noise": q.sqrt().median(),
        "t": t.median(), "slope": ((log_density - torch.special.log_ndtr(t)).exp() / q.sqrt()).mean(),
        "prob": terms["prob"].detach().mean(), "mse": error.mean(), "trace_share": trace.mean() / error.mean(),
        **diagnostics.gradient_norms(net, terms), **diagnostics.gaps(moments.mean, q, y),
    }  # fmt: skip
    return {name: float(f"{float(found[name]):.3g}") for name in COLUMNS}


def measured(root: Path) -> list[dict[str, Any]]:
    """A row for each net, seed and number of steps."""
    rows = []
    for spec in ("mnist", "cifar10_jpeg"):
        for job in jobs(spec, root):
            data = load_data(job.data.name, root=root, device=torch.device("cpu"), train=job.data.train, test=1)
            defense, net = build(job, data)
            assert isinstance(defense, Noisy)
            x, y = to_channels_last(to_float(data.train.x[:IMAGES])), data.train.y[:IMAGES]
            about = {"spec": spec, "model": job.model.name, "seed": job.seed}
            rows.append({**about, "steps": 0, **measure(defense, net, x, y)})
            if job.seed == SEEDS[0]:
                with tempfile.TemporaryDirectory() as folder, scope(seed(job.seed, "inner")):
                    run = TrainingRun(defense, net, job, data, Path(folder) / "train.jsonl", None)
                    for batch in islice(run.batches(0), STEPS):
                        defense.step(net, run.updater, batch)
                rows.append({**about, "steps": STEPS, **measure(defense, net, x, y)})
            print(rows[-1], flush=True)
    return rows


def page(record: dict[str, Any], store: Store) -> str:
    """The page, from the record and from the training logs of cifar10_jpeg."""
    text = HEAD.format(images=record["images"], steps=record["steps"])
    order = sorted(record["rows"], key=lambda row: (row["steps"], row["spec"] != "mnist", row["seed"]))
    header = ["net", "data", "seed", "steps", *COLUMNS.values()]
    about = ("model", "spec", "seed", "steps")
    text += table(header, [[str(row[name]) for name in about] + [f"{row[n]:.3g}" for n in COLUMNS] for row in order])
    text += "\nThe terms of that training on the JPEG copy of CIFAR-10, means over each epoch; -log Phi(0) is 0.69:\n\n"
    lines = [[str(line["epoch"]), f"{line['prob']:.3g}", f"{line['mse']:.3g}"] for line in logged(store)]
    text += table(["epoch", "probability term", "squared error"], lines)
    return text + f"\nMeasured with torch {record['torch']}.\n"


def logged(store: Store) -> list[dict[str, float]]:
    """The lines of the log of `noisy` on the JPEG copy of CIFAR-10; unlike the plan, the store needs no images."""
    for key in store.keys():
        job = store.job(key)
        if isinstance(job, TrainJob) and (job.data.name, job.defense.name) == ("folder:cifar10-jpeg", "noisy"):
            return [json.loads(line) for line in (store.read(key, LOG) or b"").decode().splitlines()]
    raise SystemExit(f"no training of noisy on folder:cifar10-jpeg in {store.root}; expected that of cifar10_jpeg.yaml")


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--measure"]:
        rows = measured(Path(sys.argv[2]))
        record = {"images": IMAGES, "steps": STEPS, "torch": torch.__version__.split("+")[0], "rows": rows}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    text = page(json.loads(RECORD.read_text()), Store(ROOT / "results" / "earlier", read_only=True))
    (FINDINGS / "noise_at_start.md").write_text(text)


if __name__ == "__main__":
    main()
