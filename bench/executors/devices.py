"""The devices of this machine: its GPUs, from NVML or nvidia-smi without a CUDA context, and the slots of jobs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from bench.core import nvml
from bench.terminal import counted, say

BUSY_MB, BUSY_SHARE = 1024.0, 0.25  # a GPU of which others use more memory or time is busy
MOST_PACKED = 8  # jobs packed on a GPU
BENCH_AFTER = 2  # different jobs that failed because of a device, with no success on it in between
DEVICE_NAME = re.compile(r"[0-9]+|(GPU|MIG)-.+")  # what CUDA accepts as a device
SMI_SECONDS = 20.0  # seconds that nvidia-smi, or NVML, may take
SMI_FIELDS = "index,uuid,name,memory.total,memory.used,utilization.gpu"


@dataclass(frozen=True)
class Gpu:
    """A GPU. Memory in MB; `total` is None where it is unknown."""

    index: str
    uuid: str = ""
    name: str = ""
    total: float | None = None
    used: float = 0.0
    utilization: float = 0.0
    processes: int = 0

    @property
    def busy(self) -> str:
        """A description of how others use it; empty while it is free."""
        parts = [counted(self.processes, "process")] if self.processes else []
        parts += [f"{self.used:.0f} MB in use"] if self.used > BUSY_MB else []
        parts += [f"{self.utilization:.0%} utilized"] if self.utilization > BUSY_SHARE else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Slot:
    """A place for one job: the device, and the environment variables that show the worker only that device.

    `memory`: MB that all jobs on the device share, if they are packed by their measured memory; None if they are not.
    """

    device: str
    environment: tuple[tuple[str, str], ...] = ()
    memory: float | None = None

    @property
    def place(self) -> str:
        """The name of its device, which other slots may share."""
        return dict(self.environment).get("CUDA_VISIBLE_DEVICES", self.device)


class NoAnswer(ValueError):
    """NVML or nvidia-smi exists but does not list the GPUs."""


def query() -> list[Gpu]:
    """The GPUs that NVML lists, or else nvidia-smi, without MIG parts; none where both are absent. Raises NoAnswer."""
    told = _nvml()
    if told is not None:
        return [Gpu(str(card.place), *card[1:]) for card in told]
    lines, apps = _smi(f"--query-gpu={SMI_FIELDS}"), Counter[str]()
    with contextlib.suppress(NoAnswer):  # the processes are useful but not required
        apps.update(line[0] for line in _smi("--query-compute-apps=gpu_uuid,pid"))
    return [
        Gpu(index, uuid, name, _number(total), _number(used) or 0.0, (_number(share) or 0.0) / 100, apps[uuid])
        for index, uuid, name, total, used, share in (line for line in lines if len(line) == 6)
    ]


def _nvml() -> list[nvml.Card] | None:
    """What NVML tells, in a thread: a call stuck in the driver cannot be ended."""
    told: list[list[nvml.Card] | None] = []
    thread = threading.Thread(target=lambda: told.append(nvml.cards()), daemon=True)
    thread.start()
    thread.join(SMI_SECONDS)
    if thread.is_alive():
        raise NoAnswer(f"NVML did not answer within {SMI_SECONDS:g} s")
    return told[0] if told else None


def _smi(what: str) -> list[list[str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", what, "--format=csv,noheader,nounits"]
    try:
        tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        answer, _ = tool.communicate(timeout=SMI_SECONDS)
    except OSError as error:
        raise NoAnswer(f"nvidia-smi cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        tool.kill()  # without waiting: a process stuck in the driver cannot be killed
        raise NoAnswer(f"nvidia-smi did not answer within {SMI_SECONDS:g} s") from None
    if tool.returncode and "no devices were found" not in answer.lower():
        raise NoAnswer(
            f"nvidia-smi failed with exit code {tool.returncode} ({' '.join(answer.split()) or 'no message'})"
        )
    return [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.strip()]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]", on devices that share memory with the host
        return None


def gpus(ask: Callable[[], list[Gpu]] = query, believe: bool = False) -> list[Gpu]:
    """The GPUs that may be used; CUDA_VISIBLE_DEVICES is respected, and trusted where nvidia-smi is absent, or
    with `believe` also where it fails. Raises NoAnswer.

    Each has the name that it has there: nvidia-smi's number of a card need not be CUDA's. Like CUDA, this stops
    at the first word that names none: -1, `none`, or the `NoDevFiles` of a Slurm job without a GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = None if visible is None else list(takewhile(DEVICE_NAME.fullmatch, map(str.strip, visible.split(","))))
    if wanted == []:
        return []
    try:
        there = ask()
    except NoAnswer as error:
        if wanted is None or not believe:
            ways = "--device cpu, or --device cuda with the GPUs in CUDA_VISIBLE_DEVICES"
            raise NoAnswer(f"{error}; repair the driver, or use {ways}") from None
        say(f"{error}; CUDA_VISIBLE_DEVICES is used as it is", sys.stderr)
        there = []
    known = {name: gpu for gpu in there for name in (gpu.index, gpu.uuid)}
    return there if wanted is None else [replace(known.get(name, Gpu(name)), index=name) for name in wanted]


def slots(
    device: str,
    workers: int | None,
    jobs_per_gpu: int | None = None,
    named: Sequence[str] = (),
    ask: Callable[[], list[Gpu]] = query,
) -> list[Slot]:
    """Slots for `--device auto|cpu|cuda`. `named`: the GPUs of --gpus, busy or not; else the free ones.

    `jobs_per_gpu` None: as many as their measured memory allows. Raises ValueError if CUDA is requested and absent, a
    named GPU is absent, all GPUs are busy, or nvidia-smi fails: a run never falls back to the CPU silently.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device is '{device}'; expected auto, cpu or cuda")
    if named and device == "cpu":
        raise ValueError("--gpus and --device cpu contradict each other; leave one out")
    found = gpus(ask, believe=device == "cuda") if device != "cpu" else []
    if not found and (device == "cuda" or named):
        option = f"--gpus {','.join(named)}" if named else "--device cuda"
        raise ValueError(f"{option}, but no GPU was found; run `bench doctor`, or use --device cpu alone")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not found:
        return [Slot("cpu")] * (workers or cores)
    chosen = _chosen(found, named)
    most = jobs_per_gpu or max(min(MOST_PACKED, cores // len(chosen)), 1)
    places = []
    for turn in range(most):  # spread over the GPUs before any is shared
        for gpu in chosen:
            packed = None if jobs_per_gpu or gpu.total is None else gpu.total - gpu.used
            if turn == 0 or jobs_per_gpu or packed is not None:
                places.append(Slot("cuda", _shown(gpu), packed))
    return places[:workers] if workers else places


def _chosen(found: list[Gpu], named: Sequence[str]) -> list[Gpu]:
    if named:
        known = {name: gpu for gpu in found for name in (gpu.index, gpu.uuid) if name}
        absent = [name for name in named if name not in known]
        if absent:
            there = ", ".join(gpu.index for gpu in found)
            raise ValueError(f"--gpus names {', '.join(absent)}; there are {there}")
        return list(dict.fromkeys(known[name] for name in named))
    free = [gpu for gpu in found if not gpu.busy]
    if not free:
        busy = "; ".join(f"GPU {gpu.index}: {gpu.busy}" for gpu in found)
        raise ValueError(f"every GPU is busy ({busy}); name those to use anyway with --gpus, or use --device cpu")
    return free


def _shown(gpu: Gpu) -> tuple[tuple[str, str], ...]:
    """The variables that show one GPU: as the user named it, else by nvidia-smi's number, which follows the order of
    the bus as CUDA's own does not."""
    shown = (("CUDA_VISIBLE_DEVICES", gpu.index),)
    return shown if os.environ.get("CUDA_VISIBLE_DEVICES") else (*shown, ("CUDA_DEVICE_ORDER", "PCI_BUS_ID"))


def kind(slots: Sequence[Slot]) -> str:
    """The kind of device of these slots, "cuda" if any is on a GPU, else "cpu": estimates use records of that kind."""
    return "cuda" if any(slot.device == "cuda" for slot in slots) else "cpu"


def describe(slots: Sequence[Slot]) -> str:
    """A list of their devices for the user."""
    places = dict.fromkeys(slot.place for slot in slots)
    return ", ".join(f"GPU {place}" if place.isdecimal() else place for place in places)


def lanes(slots: Sequence[Slot]) -> int:
    """The number of jobs at a time to plan with: one on each packed device, until its jobs were measured."""
    packed = {slot.place for slot in slots if slot.memory is not None}
    return len(packed) + sum(slot.memory is None for slot in slots)
