"""Whether passes in bfloat16 are worth it on this device, by a probe of a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

SPEEDUP = 1.5  # below it fp32 is kept, whose results are those of every other machine
SECONDS = 1.0
PRECISIONS = ("fp32", "bf16")


def clock(device: torch.device) -> float:
    """Seconds once the device has finished its queued work; on a CPU those of the process, which other work on the
    machine lengthens least."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def bf16_pays(work: Callable[[str], object], device: torch.device) -> bool:
    """Is the work 1.5 times as fast in `bf16` as in `fp32`? It is called with either in turn for a second, after one
    call of each that is not counted; the shortest times decide."""
    times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for precision in PRECISIONS:
        work(precision)
    started = time.perf_counter()
    while len(times["bf16"]) < 2 or time.perf_counter() - started < SECONDS:
        for precision, found in times.items():
            before = clock(device)
            work(precision)
            found.append(clock(device) - before)
    return min(times["fp32"]) >= SPEEDUP * min(times["bf16"])
