"""Which job runs on which device: slots, packing by memory, benching of devices that fail. Starts no processes."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from bench.executors.devices import BENCH_AFTER, Slot


@dataclass
class Device:
    """The state of one device during a run. `needs`: MB of the jobs on it; `alone`: its only job admits no other."""

    memory: float | None
    free: list[Slot] = field(default_factory=list)
    needs: list[float] = field(default_factory=list)
    alone: bool = False
    broke: set[str] = field(default_factory=set)  # keys of the jobs that failed because of it
    benched: bool = False

    def fits(self, need: float | None, alone: bool) -> bool:
        """Can such a job start here now? On a packed device a job of unknown need runs alone, which measures it."""
        if not self.free or self.benched or self.alone:
            return False
        if alone or (self.memory is not None and need is None):
            return not self.needs
        return self.memory is None or sum(self.needs) + (need or 0.0) <= self.memory


@dataclass(frozen=True)
class Placement:
    """A slot that a job holds, the MB reserved for it, and the number of jobs on its device, itself included."""

    slot: Slot
    need: float
    neighbors: int


class SlotPool:
    """Hands out slots, spread over the devices. In each round, ask for the most urgent job first."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.devices: dict[str, Device] = {}
        for slot in slots:
            self.devices.setdefault(slot.place, Device(slot.memory)).free.append(slot)
        self._reserved: set[str] = set()

    @property
    def open(self) -> bool:
        """Is there a free slot that is not reserved in this round?"""
        return any(
            device.free and not device.benched and not device.alone and name not in self._reserved
            for name, device in self.devices.items()
        )

    @property
    def usable(self) -> bool:
        """Is there a device that is not benched?"""
        return any(not device.benched for device in self.devices.values())

    def begin(self) -> None:
        """Begin a new round, in which no device is reserved."""
        self._reserved.clear()

    def find(self, need: float | None, alone: bool = False, avoid: Container[str] = ()) -> str | None:
        """The device for a job that needs `need` MB (None: unknown), or None for now.

        Then the device that will be free for it soonest is reserved against less urgent jobs of this round, so that
        small jobs never starve a large one. `avoid`: devices on which the job failed, used only as a last resort.
        """
        candidates, alone = self._candidates(need, alone, avoid)
        found = [name for name, d in candidates.items() if name not in self._reserved and d.fits(need, alone)]
        if not found:
            if candidates:
                self._reserved.add(min(candidates, key=lambda name: len(candidates[name].needs)))
            return None
        return min(found, key=lambda name: (len(candidates[name].needs), -(candidates[name].memory or 0.0)))

    def _candidates(self, need: float | None, alone: bool, avoid: Container[str]) -> tuple[dict[str, Device], bool]:
        """The devices that a job may use, and whether it has to run alone there."""
        usable = {name: device for name, device in self.devices.items() if not device.benched}
        better = {name: device for name, device in usable.items() if name not in avoid} or usable
        roomy = {n: d for n, d in better.items() if need is None or d.memory is None or need <= d.memory}
        if roomy or not better:
            return roomy, alone
        # it was measured on a larger device; it may fit on the largest one here if nothing else runs there
        largest = max(device.memory or 0.0 for device in better.values())
        return {name: device for name, device in better.items() if device.memory == largest}, True

    def take(self, need: float | None, alone: bool = False, avoid: Container[str] = ()) -> Placement | None:
        """A slot on the device that `find` names, or None for now."""
        name = self.find(need, alone, avoid)
        if name is None:
            return None
        device = self.devices[name]
        device.alone = self._candidates(need, alone, avoid)[1] or (device.memory is not None and need is None)
        device.needs.append(need or 0.0)
        return Placement(device.free.pop(0), need or 0.0, len(device.needs))

    def give(self, placement: Placement) -> None:
        """Take back the slot of a job that ended."""
        device = self.devices[placement.slot.place]
        device.needs.remove(placement.need)
        device.alone = False
        device.free.append(placement.slot)

    def well(self, place: str) -> None:
        """A job succeeded there, so earlier failures were not the device's."""
        self.devices[place].broke.clear()

    def broke(self, place: str, key: str) -> bool:
        """A job failed because of the device. Returns True if the device is benched now."""
        device = self.devices[place]
        device.broke.add(key)
        device.benched = len(device.broke) >= BENCH_AFTER
        return device.benched
