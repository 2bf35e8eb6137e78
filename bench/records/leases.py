"""Who does a job: a lease file in its folder, created exclusively and kept alive by a heartbeat. No file locks (NFS).

A claim creates the next results/<key>/lease-<generation>.json; the loser never overwrites. A lease is dead when its
process is gone (asked on the same machine) or silent for STALE seconds by the file system's clock: no two must agree.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.atomic import FULL, unless_gone
from bench.records.store import Store

BEAT, STALE = 15.0, 60.0  # seconds
Took = Literal["run", "over", "held"]


@dataclass(frozen=True)
class Holder:
    """What a lease file says. `age`: seconds since its last heartbeat; `token` is empty where it cannot be read."""

    path: Path
    age: float
    token: str = ""
    machine: str = ""
    pid: int = 0
    began: str = ""  # when the process began, since process ids come again

    @property
    def alive(self) -> bool:
        """May its job be going on? On the same machine its process is asked, elsewhere only the heartbeat."""
        gone = self.token and self.machine == this_machine() and not _runs(self.pid, self.began)
        return self.age < STALE and not gone

    @property
    def generation(self) -> int:
        """The number in its name; the next claim takes the next one."""
        return int("0" + "".join(filter(str.isdecimal, self.path.stem)))


class Lease:
    """A claim that was won. A thread of this process beats it until it is released."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token
        self.held, self._last = True, time.monotonic()

    def beat(self) -> bool:
        """Say that the job goes on. False once it was taken away: then stop, another process does it."""
        try:
            if _read(self.path, 0.0).token != self.token:
                raise FileNotFoundError(self.path)
            os.utime(self.path)
            self._last = time.monotonic()
        except FileNotFoundError:
            self.held = False
        except OSError:  # a file server that is away for a moment costs no job; one that stays away does
            self.held = self.held and time.monotonic() - self._last < STALE - BEAT
        return self.held

    def release(self) -> None:
        """Let others have the job. Does nothing where it was taken away."""
        _beating.discard(self)
        with contextlib.suppress(OSError):
            if _read(self.path, 0.0).token == self.token:
                self.path.unlink()
        self.held = False


class Claims:
    """The leases of one driver. Make it before asking what there is to do: what ends later was done by others."""

    def __init__(self, store: Store, keys: list[str]) -> None:
        self.store = store
        self._before = {key: self._stamp(key) for key in keys}
        self._leases: dict[str, Lease] = {}

    def take(self, key: str) -> Took:
        """run: this driver does it now. over: another one did it meanwhile. held: another one is at it; ask later."""
        if key in self._leases and self._leases[key].held:  # it is tried again
            return "run"
        if (lease := claim(self.store, key)) is None:
            return "held"
        self._leases[key] = lease  # given back by `release` also where what follows fails
        if self._stamp(key) != self._before.get(key) and self.store.record(key) is not None:
            self.release(key)
            return "over"
        self.store.reopen(key)
        return "run"

    def lost(self, key: str) -> bool:
        """Was a job of this driver taken over by another one (after a minute without a sign of life)?"""
        return not self._leases[key].held

    def release(self, key: str) -> None:
        """The job is over, or given up. Does nothing where it was never taken."""
        if key in self._leases:
            self._leases.pop(key).release()

    def close(self) -> None:
        """Give up whatever is left."""
        while self._leases:
            self._leases.popitem()[1].release()

    def _stamp(self, key: str) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            return (at := (self.store.folder(key) / "record.json").stat()).st_ino, at.st_mtime_ns
        return None


def claim(store: Store, key: str) -> Lease | None:
    """The lease of a job, or None while another process holds it or won the race for it."""
    folder, token = store.folder(key), secrets.token_hex(8)
    draft = folder / f".lease.{token}"
    if store.packed(key):
        folder.mkdir(exist_ok=True)
    says = {"token": token, "machine": this_machine(), "pid": os.getpid(), "began": _facts(os.getpid())[1]}
    try:
        draft.write_text(json.dumps(says), encoding="utf-8")
        now = draft.stat().st_mtime  # the file system's clock, which made the times of the others too
        found = holders(folder, now)
        if any(holder.alive for holder in found):
            return None
        path = folder / f"lease-{max((holder.generation for holder in found), default=0) + 1:06d}.json"
        if not _create(draft, path):
            return None
    finally:
        draft.unlink(missing_ok=True)
    lease = Lease(path, token)
    # a lower number may have come up again meanwhile, if all were released: the second one to look gives way
    if any(holder.alive for holder in holders(folder, now) if holder.path != path):
        lease.release()
        return None
    _beating.add(lease)
    for holder in found:
        holder.path.unlink(missing_ok=True)
    return lease


def holder_of(store: Store, key: str) -> Holder | None:
    """Who does a job now, by this machine's clock: writes nothing."""
    return next((holder for holder in holders(store.folder(key), time.time()) if holder.alive), None)


def holders(folder: Path, now: float) -> list[Holder]:
    """All leases in a job folder, dead ones too."""
    found = list[Holder]()
    for path in sorted(folder.glob("lease-*.json")):
        with unless_gone():  # released meanwhile
            found.append(_read(path, now))
    return found


def _create(draft: Path, path: Path) -> bool:
    """Exclusively, and with its content at once. False where another process was first."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return draft.stat().st_nlink == 2  # NFS may lose the answer to a link that was made
    except OSError as error:
        if error.errno in FULL:
            raise
        try:  # no hard links here; a file torn by a kill counts as a lease until it is STALE
            with path.open("x", encoding="utf-8") as file:
                file.write(draft.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _read(path: Path, now: float) -> Holder:
    age = max(now - path.stat().st_mtime, 0.0)
    try:
        says = json.loads(path.read_text(encoding="utf-8"))
        return Holder(path, age, str(says["token"]), str(says["machine"]), int(says["pid"]), str(says["began"]))
    except (ValueError, KeyError, TypeError):
        return Holder(path, age)


@functools.cache
def this_machine() -> str:
    """Host, boot and PID namespace, hashed: the same where a process id means the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        import psutil

        place = str(round(psutil.boot_time() / 60))
    return hashlib.sha256(f"{socket.gethostname()} {place}".encode()).hexdigest()[:16]


def _facts(pid: int) -> tuple[str, str]:
    """State letter of a process and when it began, in ticks since the boot; empty where the system does not say so."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return words[0], words[19]
    except (OSError, IndexError):
        return "", ""


def _runs(pid: int, began: str) -> bool:
    """Is this very process alive? A zombie is not: it waits for its parent to notice."""
    try:
        os.kill(pid, 0)
    except OSError as error:
        if error.errno != errno.EPERM:  # another user's
            return False
    return _facts(pid)[0] not in ("Z", "X") and _facts(pid)[1] == began


class _Beating:
    """One thread that beats all leases of this process."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        with self._lock:
            self._leases.add(lease)
            if self._thread is None or not self._thread.is_alive():  # a fork takes no threads along
                self._thread = threading.Thread(target=self._run, daemon=True, name="leases")
                self._thread.start()

    def discard(self, lease: Lease) -> None:
        with self._lock:
            self._leases.discard(lease)

    def _run(self) -> None:
        while True:
            time.sleep(BEAT)
            with self._lock:
                leases = list(self._leases)
            for lease in [lease for lease in leases if not lease.beat()]:
                self.discard(lease)


_beating = _Beating()
