"""A matrix run again, with kills, on Slurm or on Ray, compared with the records of an uninterrupted local run.

    python benchmarks/repeated_matrix.py specs/mnist.yaml --seeds 0 --kills 5 --mean-seconds 120
    python benchmarks/repeated_matrix.py specs/mnist.yaml --seeds 0 --executor slurm
    python benchmarks/repeated_matrix.py specs/mnist.yaml --seeds 0 --executor ray

Runs `bench run SPEC`, 2 jobs at a time, into a new folder. With --kills, each round ends the driver by SIGKILL after a
random time, starts it again, and kills one worker by SIGKILL. It uses the Slurm of this machine, or else starts one
with one node. At the end every job is compared with the committed records: its samples, which hold the verdict of each
image, the weights of each training, and the tables of both folders without their times. The outcome is added to those
in benchmarks/results and written into docs/reliability.md between its markers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from bench.data import datasets
from bench.planning.plan import plan
from bench.planning.spec import build, load
from bench.planning.strict_yaml import read
from bench.records.store import Store
from bench.tables.summary import matrix

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "results" / "repeated_matrix.json"
PAGE = ROOT / "docs" / "reliability.md"
START, END = "<!-- repeated matrix -->", "<!-- end of repeated matrix -->"


def workers(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that do jobs: those below the fork server that lead a group of their own."""
    below = psutil.Process(driver.pid).children(recursive=True)
    return [each for each in below if os.getpgid(each.pid) == each.pid]


@contextlib.contextmanager
def cluster(executor: str) -> Iterator[None]:
    """A Slurm for as long as the block lasts, where none answers."""
    here = shutil.which("sinfo")
    if executor != "slurm" or (here and subprocess.run([here], capture_output=True).returncode == 0):
        yield
        return
    sys.path.append(str(ROOT / "tests"))
    from slurm_cluster import missing, running

    if reason := missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory(prefix="bench-slurm-") as folder, running(Path(folder)):
        yield


def run(command: list[str], kills: int, mean: float, draw: random.Random) -> dict[str, Any]:
    """The matrix with its kills, until a driver ends by itself."""
    killed: dict[str, int] = {"driver": 0, "worker": 0}
    began, starts = time.time(), 0
    while True:
        driver = subprocess.Popen(command)
        starts += 1
        turn = "driver" if killed["driver"] <= killed["worker"] else "worker"
        until = time.monotonic() + draw.uniform(0.3, 1.7) * mean
        while driver.poll() is None:
            time.sleep(0.2)
            if min(killed.values()) < kills and time.monotonic() > until:
                if turn == "driver":
                    driver.kill()
                    print(f"killed the driver after {time.time() - began:.0f} s", flush=True)
                elif at_work := workers(driver):
                    draw.choice(at_work).send_signal(signal.SIGKILL)
                    print(f"killed a worker after {time.time() - began:.0f} s", flush=True)
                else:
                    continue
                killed[turn] += 1
                turn = "driver" if killed["driver"] <= killed["worker"] else "worker"
                until = time.monotonic() + draw.uniform(0.3, 1.7) * mean
        if driver.returncode != -signal.SIGKILL:
            return {"kills": killed, "starts": starts, "seconds": time.time() - began, "code": driver.returncode}


def table(store: Store, keys: list[str]) -> tuple[list[str], list[list[str]]]:
    """The table that ends a run, without its times."""
    header, lines, _ = matrix(store, keys)
    kept = [k for k, name in enumerate(header) if name not in ("train s", "× standard")]
    return [header[k] for k in kept], [[line[k] for k in kept] for line in lines]


def compare(ours: Store, theirs: Store, keys: list[str]) -> dict[str, Any]:
    """How the records of two folders differ, image by image."""
    differ: list[str] = []
    images = 0
    for key in keys:
        mine, other = ours.record(key), theirs.record(key)
        if mine is None or other is None or mine.state != other.state:
            differ.append(key)
            continue
        if mine.kind == "train":
            if mine.files != other.files:
                differ.append(key)
        elif mine.state == "done":
            here, there = ours.samples(key), theirs.samples(key)
            images += len(here["correct"])
            if set(here) != set(there) or any(not np.array_equal(here[name], there[name]) for name in here):
                differ.append(key)
    return {"jobs": len(keys), "images": images, "differ": differ}


def line(found: dict[str, Any]) -> str:
    """A row for the table of docs/reliability.md."""
    kills, same = found["kills"], "the same" if found["same_table"] and not found["differ"] else "NOT the same"
    where = f"{found['seconds'] / 60:.0f} minutes on {found['device']}, commit {found['commit']}"
    how = {"local": "2 workers", "slurm": "Slurm with one node", "ray": "a local Ray"}[found["executor"]]
    how += ", driver and worker killed (SIGKILL) in turn" if any(kills.values()) else ", left alone"
    return (
        f"| `{found['spec']}`, seeds {', '.join(map(str, found['seeds']))} | {how} | "
        f"{kills['driver']} + {kills['worker']} | "
        f"{found['jobs']} jobs, {found['images']} verdicts and the table: {same} ({where}) |"
    )


def write(runs: list[dict[str, Any]]) -> None:
    """Put the outcomes on the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    lines = "\n".join(map(line, runs))
    header = "| matrix | how | kills | beside the uninterrupted local run |\n| --- | --- | --- | --- |"
    PAGE.write_text(f"{before}\n{header}\n{lines}\n{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, nargs="?", default=ROOT / "specs" / "mnist.yaml")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="results of this run (default: a temporary folder)")
    parser.add_argument("--reference", type=Path, default=ROOT / "results", help="results of an uninterrupted run")
    parser.add_argument("--seeds", default=None, help="such as 0 (default: those of the spec)")
    parser.add_argument("--kills", type=int, default=0, help="of the driver, and as many of a worker (local only)")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    parser.add_argument("--mean-seconds", type=float, default=300.0, help="between kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write-docs", action="store_true", help="write the page again, running nothing")
    asked = parser.parse_args()
    if asked.write_docs:
        write(json.loads(RECORD.read_text(encoding="utf-8")))
        return
    if asked.kills and asked.executor != "local":
        parser.error("--kills is for the local executor")
    with tempfile.TemporaryDirectory(prefix="bench-repeated-") as folder, cluster(asked.executor):
        found = repeated(asked, asked.folder or Path(folder))
    runs = [*(json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []), found]
    RECORD.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print(line(found))
    write(runs)


def repeated(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the matrix into a folder, and compare."""
    root = datasets.data_root(asked.data_dir)
    values, _ = read(asked.spec)
    spec = build(values).model_copy(update={"checks": "off"})
    seeds = [int(seed) for seed in asked.seeds.split(",")] if asked.seeds else spec.seeds
    # what the spec asks of its first seeds alone has no reference for another one
    places = [spec.seeds.index(seed) for seed in seeds]
    limits = [attack.seeds or len(spec.seeds) for attack in spec.attacks]
    kept = [k for k, limit in enumerate(limits) if all(place < limit for place in places[:limit])]
    values |= {"seeds": seeds, "checks": "off", "attacks": [values["attacks"][k] for k in kept]}
    file = folder / "spec.yaml"
    folder.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    command = [sys.executable, "-m", "bench", "run", str(file), "--quiet"]
    command += ["--executor", asked.executor, *(["--workers", "2"] if asked.executor == "local" else [])]
    command += ["--results-dir", str(folder / "results")]
    command += ["--data-dir", str(asked.data_dir)] if asked.data_dir else []
    found = run(command, asked.kills, asked.mean_seconds, random.Random(asked.seed))
    keys = [job.key for job in plan(load(file), root)]
    ours, theirs = Store(folder / "results"), Store(asked.reference)
    found |= compare(ours, theirs, keys)
    found["same_table"] = table(ours, keys) == table(theirs, keys)
    found |= {"spec": asked.spec.name, "seeds": seeds}
    origin = next(record.provenance for job, record in ours.records() if job.kind == "train")
    return found | {"executor": asked.executor, "device": origin.device, "commit": origin.commit}


if __name__ == "__main__":
    main()
