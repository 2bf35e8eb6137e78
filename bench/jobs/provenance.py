"""What a record says of where it comes from: commit, versions, hardware, memory. No user, host or path names."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import sys
from pathlib import Path

import torch

from bench.planning import catalog
from bench.planning.job import EvaluationJob, Job, TrainJob
from bench.records.record import PeakMemory, Provenance
from bench.records.runtime_estimate import cpu_name


def provenance(job: Job, device: str, workers: int, rows: int | None = None) -> Provenance:
    """Where a record comes from. `workers` > 1: timings shared the device; `rows`: images in a pass, if limited."""
    plugin = None
    if isinstance(job, TrainJob):
        plugin = catalog.get("defenses", job.defense.name).sha256[:16]
    elif isinstance(job, EvaluationJob):
        plugin = catalog.get("attacks", job.attack.name).sha256[:16]
    commit, dirty = git()
    return Provenance(
        commit=commit,
        dirty=dirty,
        device=device_name(device),
        workers=workers,
        threads=torch.get_num_threads(),
        versions=dict(versions()),
        plugin_sha256=plugin,
        rows_per_pass=rows,
    )


HERE = Path(__file__).resolve().parents[2]  # the checkout, or where packages are installed


@functools.cache
def git(here: Path = HERE) -> tuple[str | None, bool | None]:
    """Commit of the code and whether it was changed since; None where it is no checkout of its own, such as where it is
    installed below somebody's repository."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = ask("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != here:
        return None, None
    commit = ask("rev-parse", "--short=12", "HEAD")
    changes = ask("status", "--porcelain", "--", "bench", "defenses", "attacks")
    return commit, None if commit is None else bool(changes)


@functools.cache
def versions() -> dict[str, str]:
    """Of what is loaded here; asking takes longer than all else in a record."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("defense-bench", "torch", "torchvision", "pyautoattack", "torchattacks", "numpy", "scipy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def device_name(device: str) -> str:
    """The hardware's own name: timings are compared only where it is the same."""
    if device.startswith("cuda"):
        try:
            return torch.cuda.get_device_name(torch.device(device))
        except (RuntimeError, AssertionError):  # a lost device still owes its job a record
            return "GPU that could not be asked"
    return cpu_name()


def peak_memory(device: str) -> PeakMemory:
    """Peak resident set of this process, and peak memory on the GPU, in MB."""
    import resource

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    cuda = None
    if device.startswith("cuda"):
        with contextlib.suppress(RuntimeError, AssertionError):
            cuda = torch.cuda.max_memory_allocated() / 2**20
    return PeakMemory(round(rss, 1), None if cuda is None else round(cuda, 1))


versions()  # the fork server asks once, and every worker that comes from it finds the answer
