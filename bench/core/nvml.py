"""What NVIDIA's management library tells of GPUs, by nvidia-ml-py (extra `gpu`): without a CUDA context and a child."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from bench.core.extras import imported


class Card(NamedTuple):
    """A GPU, whole. Memory in MB, None where it is not told; `utilization` in [0,1]; `processes`: computing on it."""

    place: int
    uuid: str
    name: str
    total: float | None
    used: float
    utilization: float
    processes: int


def cards() -> list[Card] | None:
    """All GPUs in the order of the bus; None where package, library or driver is absent or fails."""
    with _library() as nvml:
        if nvml is None:
            return None
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(place) for place in range(nvml.nvmlDeviceGetCount())]
            return [_card(nvml, place, handle) for place, handle in enumerate(handles)]
        except nvml.NVMLError:
            return None


def joules(uuid: str) -> float | None:
    """What a GPU has used since its driver was loaded; None where that is not told (before Volta, of a MIG part)."""
    with _library() as nvml:
        if nvml is None:
            return None
        used = _told(nvml, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByUUID(uuid)))
        return None if used is None else used / 1000


def _card(nvml: Any, place: int, handle: Any) -> Card:
    memory = _told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, nvml.nvmlMemory_v2))  # without what is reserved
    memory = memory or _told(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle))  # of a driver before 510
    load = _told(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    return Card(
        place,
        nvml.nvmlDeviceGetUUID(handle),
        nvml.nvmlDeviceGetName(handle),
        memory.total / 2**20 if memory else None,
        memory.used / 2**20 if memory else 0.0,
        load.gpu / 100 if load else 0.0,
        len(_told(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()),
    )


def _told(nvml: Any, ask: Callable[[], Any]) -> Any:
    """The answer, or None where this device or its user has none."""
    try:
        return ask()
    except nvml.NVMLError:
        return None


@contextmanager
def _library() -> Iterator[Any]:
    """Context with the package and its library open, or with None."""
    try:
        nvml = imported("pynvml", 'pip install "defense-bench[gpu]"')
    except ImportError:
        yield None
        return
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()
