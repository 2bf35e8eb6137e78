"""How far the times of `bench plan --probe` are from those of the jobs: predicted, then run.

BENCH_DATA=FOLDER python benchmarks/probe_error.py   probes and runs both matrices (minutes), stores, writes the page
python benchmarks/probe_error.py --write-docs        only writes docs/performance.md again, from the stored record

A matrix of digits on the mlp and one of MNIST on lenet5, each first probed as the command does it, with nothing
recorded, and then run by the local executor on the same two slots. Of each kind of job: the seconds predicted and those
of the record, without the start of the process, for all jobs of the kind together.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from paired import Record, conditions, heading, store, table, write_docs

from bench.executors.devices import Slot
from bench.executors.driver import drive
from bench.executors.local import Local
from bench.executors.schedule import simulate
from bench.planning.job import Job
from bench.planning.options import to_spec
from bench.planning.plan import plan
from bench.planning.typed import Options
from bench.progress import forecast, probe
from bench.progress.live import title
from bench.records.runtime_estimate import Estimator
from bench.records.store import Store

SLOTS = [Slot("cpu")] * 2
MATRICES = {
    "digits, mlp": Options(dataset="digits", defense=["pgd_at", "awp", "noisy"], set=["awp.base=trades"]),
    "mnist, lenet5": Options(
        dataset="mnist", defense=["pgd_at", "noisy"], train_n=12_800, epochs=2, n=500, checks="off"
    ),
}


def measure(root: Path) -> Record:
    record: Record = {**conditions("probe_error"), "clock": "wall", "slots": len(SLOTS), "cap_s": probe.CAP}
    used = time.process_time()
    record["matrices"] = [matrix(name, options, root) for name, options in MATRICES.items()]
    record["took_s"] = {"cpu": time.process_time() - used}
    return record


def matrix(name: str, options: Options, root: Path) -> Record:
    """Probe, run and compare one matrix."""
    spec, root, _ = to_spec(options, root)
    jobs = plan(spec, root)
    with tempfile.TemporaryDirectory() as folder:
        kept = Store(Path(folder) / "results")
        estimator = Estimator(kept, "cpu")
        estimator.know(jobs)
        began = time.monotonic()
        for line in probe.probe(jobs, kept, root, SLOTS, estimator):
            print(line, flush=True)
        probed = time.monotonic() - began
        for line in forecast.time(jobs, kept, estimator, len(SLOTS)):
            print(line, flush=True)
        kept.prepare()
        began = time.monotonic()
        failed = [
            event.message for event in drive(Local(root, SLOTS), jobs, kept) if event.kind in ("error", "blocked")
        ]
        took = time.monotonic() - began
        if failed:
            raise SystemExit(f"gate failed: {failed[0]}")
        rows = compared(jobs, kept, estimator)
        predicted = simulate(jobs, {job.key: estimator.seconds(job) or 0.0 for job in jobs}, len(SLOTS))
    return {
        "matrix": name,
        "jobs": len(jobs),
        "probed_s": probed,
        "predicted_s": predicted,
        "took_s": took,
        "rows": rows,
    }


def compared(jobs: list[Job], kept: Store, estimator: Estimator) -> list[Record]:
    """Predicted and real seconds of each kind of job."""
    known, rows = {job.key: job for job in jobs}, dict[tuple[str, ...], Record]()
    for job in jobs:
        kind = estimator.likeness(job)[0]
        row = rows.setdefault(kind, {"kind": title(job, known), "jobs": 0, "predicted_s": 0.0, "took_s": 0.0})
        row["jobs"] += 1
        row["predicted_s"] += estimator.seconds(job) or 0.0
        row["took_s"] += (kept.record(job.key) or {})["time"]["seconds"]
    return list(rows.values())


def written(record: Record) -> str:
    text = heading(record)
    for one in record["matrices"]:
        ratio = one["predicted_s"] / one["took_s"]
        text += (
            f"{one['matrix']}: {one['jobs']} jobs, predicted {one['predicted_s']:.0f} s on {record['slots']} slots, "
            f"took {one['took_s']:.0f} s (predicted / real {ratio:.2f}); the probe took {one['probed_s']:.0f} s.\n\n"
        )
        lines = [
            [row["kind"], str(row["jobs"]), f"{row['predicted_s']:.1f}", f"{row['took_s']:.1f}",
             f"{row['predicted_s'] / row['took_s']:.2f}"]
            for row in one["rows"]
        ]  # fmt: skip
        text += table(["kind, by its first job", "jobs", "predicted s", "real s", "predicted / real"], lines) + "\n"
    return text.rstrip("\n") + "\n"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data-dir", type=Path, default=os.environ.get("BENCH_DATA"), help="folder with MNIST")
    options.add_argument("--write-docs", action="store_true", help="measure nothing")
    args = options.parse_args()
    if not args.write_docs:
        if args.data_dir is None:
            options.error("no folder with MNIST: set BENCH_DATA or pass --data-dir")
        torch.set_num_threads(1)
        print(json.dumps(store(measure(args.data_dir), "probe_error.json"), indent=1))
    write_docs("probe_error", written)


if __name__ == "__main__":
    main()
