"""Provenance of a record: commit, versions, hardware, memory. No names of users, hosts or paths."""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
import sys
from pathlib import Path

import torch

from bench.core import nvml
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
    """Commit of the code and whether the code differs from it; None if the code is not in its own checkout, for example
    installed inside another repository."""

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
    """Versions of Python and of packages; reading them takes longer than anything else in a record."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    of_others = ("pyautoattack", "torchattacks", "adv-lib", "timm", "robustbench")
    for package in ("defense-bench", "torch", "torchvision", *of_others, "numpy", "scipy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def device_name(device: str) -> str:
    """Name of the hardware. Timings are compared only on equal hardware."""
    if device.startswith("cuda"):
        try:
            return torch.cuda.get_device_name(torch.device(device))
        except (RuntimeError, AssertionError):  # the record is written even if the device was lost
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


def joules(device: str) -> float | None:
    """What the GPU has used so far, of which a job takes the difference; None where NVML does not tell it."""
    if not device.startswith("cuda"):
        return None
    try:
        uuid = torch.cuda.get_device_properties(torch.device(device)).uuid
    except (RuntimeError, AssertionError, AttributeError):  # lost, or of another vendor
        return None
    return nvml.joules(f"GPU-{uuid}")


def energy(before: float | None, after: float | None, sharing: int) -> float | None:
    """Joules of a job; None where its device did other jobs too, whose share nobody knows."""
    return round(after - before, 3) if before is not None and after is not None and sharing == 1 else None


versions()  # once in the fork server, for all workers that it starts
