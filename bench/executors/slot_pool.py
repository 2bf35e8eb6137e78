"""Who runs where: slots handed out and taken back, memory packed, broken devices benched. No processes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from bench.executors.devices import BENCH_AFTER, Slot


@dataclass
class Device:
    """What is known of one device during a run. `needs`: memory of the jobs on it; `alone`: one of them has it all."""

    memory: float | None
    free: list[Slot] = field(default_factory=list)
    needs: list[float] = field(default_factory=list)
    alone: bool = False
    broke: set[str] = field(default_factory=set)  # jobs that failed for its sake
    benched: bool = False

    def fits(self, need: float | None, alone: bool) -> bool:
        """May such a job start here now? One of unknown need on a packed device runs alone, which measures it."""
        if not self.free or self.benched or self.alone:
            return False
        if alone or (self.memory is not None and need is None):
            return not self.needs
        return self.memory is None or sum(self.needs) + (need or 0.0) <= self.memory


@dataclass(frozen=True)
class Placement:
    """A slot that a job holds, the memory put aside for it, and how many jobs are on its device, itself included."""

    slot: Slot
    need: float
    neighbours: int


class SlotPool:
    """Hands out slots, spread over the devices. Call `begin` before each round of questions, most urgent job first."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.devices: dict[str, Device] = {}
        for slot in slots:
            self.devices.setdefault(slot.place, Device(slot.memory)).free.append(slot)
        self._kept: set[str] = set()

    @property
    def open(self) -> bool:
        """Is any slot free that this round may still give away?"""
        return any(
            device.free and not device.benched and not device.alone and name not in self._kept
            for name, device in self.devices.items()
        )

    @property
    def usable(self) -> bool:
        """Is there a device at all that is not benched?"""
        return any(not device.benched for device in self.devices.values())

    def begin(self) -> None:
        """A new round: nothing is kept for anyone."""
        self._kept.clear()

    def take(self, need: float | None, alone: bool = False, avoid: Container[str] = ()) -> Placement | None:
        """A slot for a job that needs so much memory (MB; None: unknown), or None for now.

        Then the device that is soonest free for it is kept from less urgent jobs of this round, so that small jobs
        never starve a large one. `avoid`: devices that failed it, used only where there is no other.
        """
        usable = {name: device for name, device in self.devices.items() if not device.benched}
        better = {name: device for name, device in usable.items() if name not in avoid} or usable
        if not better:
            return None
        largest = max(better.values(), key=lambda device: device.memory or 0.0)
        if need is not None and largest.memory is not None and need > largest.memory:
            alone = True  # it was measured on a larger device: it may fit yet, with nobody beside it
            better = {name: device for name, device in better.items() if device.memory == largest.memory}
        else:
            roomy = {n: d for n, d in better.items() if need is None or d.memory is None or need <= d.memory}
            better = roomy or better
        found = [name for name, d in better.items() if name not in self._kept and d.fits(need, alone)]
        if not found:
            self._kept.add(min(better, key=lambda name: len(better[name].needs)))
            return None
        name = min(found, key=lambda name: (len(better[name].needs), -(better[name].memory or 0.0)))
        device = better[name]
        device.alone = alone or (device.memory is not None and need is None)
        device.needs.append(need or 0.0)
        return Placement(device.free.pop(0), need or 0.0, len(device.needs))

    def give(self, lease: Placement) -> None:
        """A job left its slot."""
        device = self.devices[lease.slot.place]
        device.needs.remove(lease.need)
        device.alone = False
        device.free.append(lease.slot)

    def well(self, place: str) -> None:
        """A job ended well there: what broke before was not the device."""
        self.devices[place].broke.clear()

    def broke(self, place: str, key: str) -> bool:
        """A job failed for the device's sake. True where that benches the device."""
        device = self.devices[place]
        device.broke.add(key)
        device.benched = len(device.broke) >= BENCH_AFTER
        return device.benched
