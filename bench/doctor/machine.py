"""The environment: Python, packages, devices, disk, results and data folders. Each check is one line."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.data import datasets
from bench.doctor import installed
from bench.doctor.installed import Line

PACKAGES = ("torch", "torchvision", "pyautoattack", "pandas", "scipy", "scikit-learn", "safetensors", "pydantic")


def lines(results: Path, data_dir: Path | None) -> list[Line]:
    """The state (OK, WARN or FAIL) and the text of each check."""
    place = next(p for p in (results.resolve(), *results.resolve().parents) if p.exists())
    free, writable = shutil.disk_usage(place).free >> 20, os.access(place, os.W_OK)
    return [
        _python(),
        *map(_package, PACKAGES),
        *installed.lines(),
        *_devices(),
        ("OK" if free > 2048 else "WARN", f"{free} MiB free for results"),
        ("OK" if writable else "FAIL", f"results folder {results} {'writable' if writable else 'is read-only'}"),
        _data(datasets.data_root(data_dir)),
    ]


def _python() -> Line:
    new = sys.version_info >= (3, 11)
    return "OK" if new else "FAIL", f"Python {platform.python_version()}{'' if new else '; 3.11 is needed'}"


def _package(name: str) -> Line:
    try:
        return "OK", f"{name} {version(name)}"
    except PackageNotFoundError:
        return "FAIL", f"{name} is missing; pip install {name}"


def _devices() -> list[Line]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [("OK", f"CPU with {cores} usable cores")]
    if not torch.cuda.is_available():
        return [*found, ("WARN", "no GPU: 32x32 networks such as preact_resnet18 will take days")]
    for place in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(place)
        found.append(("OK", f"GPU {place} {torch.cuda.get_device_name(place)}, {free >> 20} of {total >> 20} MiB free"))
    return found


def _data(root: Path) -> Line:
    if not root.is_dir():
        return "OK", f"data folder {root} does not exist yet; downloads go there (digits needs none)"
    held = [name for name, place in (("mnist", "MNIST"), ("cifar10", "cifar-10-batches-py")) if (root / place).is_dir()]
    return "OK", f"data folder {root}: {', '.join(held) or 'empty'}"
