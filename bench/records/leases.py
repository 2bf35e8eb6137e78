"""Leases: which process runs a job. Works without file locks, which NFS does not have.

A claim creates the file results/<key>/lease-<generation>.json with the next generation; creation is exclusive, so that
one of several claims succeeds. A lease is dead if its process has ended (known on the same machine only) or if its last
heartbeat is older than STALE seconds by the clock of the file system; clocks of machines need not agree.
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

from bench.atomic import FULL, kind_of, read_json, unless_gone
from bench.records.store import Store

BEAT, STALE = 15.0, 60.0  # seconds
Took = Literal["run", "over", "held"]


@dataclass(frozen=True)
class Holder:
    """Content of a lease file. `age`: seconds since its last heartbeat; `token` is empty if it cannot be read."""

    path: Path
    age: float
    token: str = ""
    machine: str = ""
    pid: int = 0
    began: str = ""  # start of the process, as process ids are reused

    @property
    def alive(self) -> bool:
        """May its process still run the job? On another machine only the heartbeat is known."""
        gone = self.token and self.machine == this_machine() and not _runs(self.pid, self.began)
        return self.age < STALE and not gone

    @property
    def generation(self) -> int:
        """The number in its file name; the next claim takes the next one."""
        return _generation(self.path)


class Lease:
    """A successful claim. A thread of this process sends heartbeats until it is released."""

    def __init__(self, path: Path, token: str) -> None:
        self.path, self.token = path, token
        self.held, self._last = True, time.monotonic()

    def beat(self) -> bool:
        """Send a heartbeat. Returns False if another process took the job over; then stop."""
        try:
            if _read(self.path, 0.0).token != self.token:
                raise FileNotFoundError(self.path)
            os.utime(self.path)
            self._last = time.monotonic()
        except FileNotFoundError:
            self.held = False
        except OSError:  # a file server may be away for a moment
            self.held = self.held and time.monotonic() - self._last < STALE - BEAT
        return self.held

    def release(self) -> None:
        """Give the job free. Does nothing if another process took it over."""
        _beating.discard(self)
        with contextlib.suppress(OSError):
            if _read(self.path, 0.0).token == self.token:
                self.path.unlink()
        self.held = False


class Claims:
    """The leases of one driver. Made before the driver lists pending jobs: a record written later is by another one."""

    def __init__(self, store: Store, keys: list[str]) -> None:
        self.store = store
        self._before = {key: self._stamp(key) for key in keys}
        self._leases: dict[str, Lease] = {}

    def take(self, key: str) -> Took:
        """run: this driver has the job; over: another one finished it meanwhile; held: another one runs it."""
        if key in self._leases and self._leases[key].held:  # a retry
            return "run"
        if (lease := claim(self.store, key)) is None:
            return "held"
        self._leases[key] = lease  # `release` drops it also if the next lines raise
        if self._stamp(key) != self._before.get(key) and self.store.record(key) is not None:
            self.release(key)
            return "over"
        self.store.reopen(key)
        return "run"

    def lost(self, key: str) -> bool:
        """Did another driver take over a job of this one (after a minute without a heartbeat)?"""
        return not self._leases[key].held

    def release(self, key: str) -> None:
        """Release the lease of a job that has ended or is given up, if there is one."""
        if key in self._leases:
            self._leases.pop(key).release()

    def close(self) -> None:
        """Release all leases."""
        while self._leases:
            self._leases.popitem()[1].release()

    def _stamp(self, key: str) -> tuple[int, int] | None:
        with contextlib.suppress(OSError):
            return (at := (self.store.folder(key) / "record.json").stat()).st_ino, at.st_mtime_ns
        return None


def claim(store: Store, key: str) -> Lease | None:
    """The lease of a job; None if another process holds it or claimed it at the same time."""
    folder, token = store.folder(key), secrets.token_hex(8)
    draft = folder / f".lease.{token}"
    if store.packed(key):
        folder.mkdir(exist_ok=True)
    content = {"token": token, "machine": this_machine(), "pid": os.getpid(), "began": _facts(os.getpid())[1]}
    try:
        draft.write_text(json.dumps(content), encoding="utf-8")
        now = draft.stat().st_mtime  # by the clock of the file system, like the times of other leases
        found = holders(folder, now)
        if any(holder.alive for holder in found):
            return None
        path = folder / f"lease-{max(map(_generation, folder.glob('lease-*.json')), default=0) + 1:06d}.json"
        if not _create(draft, path):
            return None
    finally:
        draft.unlink(missing_ok=True)
    lease = Lease(path, token)
    # if all leases were released meanwhile, a lower generation may be new: the process that looks last gives way
    if any(holder.alive for holder in holders(folder, now) if holder.path != path):
        lease.release()
        return None
    _beating.add(lease)
    for holder in found:
        holder.path.unlink(missing_ok=True)
    return lease


def holder_of(store: Store, key: str) -> Holder | None:
    """The process that runs a job now, by this machine's clock; None if there is none."""
    return next((holder for holder in holders(store.place(key), time.time()) if holder.alive), None)


def holders(folder: Path, now: float) -> list[Holder]:
    """All leases in a job folder, including dead ones; what is not a regular file is none."""
    found = list[Holder]()
    for path in sorted(folder.glob("lease-*.json")):
        with unless_gone():  # released meanwhile
            if not kind_of(path.lstat()):
                found.append(_read(path, now))
    return found


def _generation(path: Path) -> int:
    return int("0" + "".join(filter(str.isdecimal, path.stem))[:18])


def _create(draft: Path, path: Path) -> bool:
    """Create a lease exclusively and with its content. Returns False if another process was first."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return draft.stat().st_nlink == 2  # NFS may report failure for a link that it made
    except OSError as error:
        if error.errno in FULL:
            raise
        try:  # no hard links; a file that a kill left incomplete counts as a lease until it is STALE
            with path.open("x", encoding="utf-8") as file:
                file.write(draft.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    return True


def _read(path: Path, now: float) -> Holder:
    age = max(now - path.lstat().st_mtime, 0.0)
    try:
        content = read_json(path)
        token, machine, began = (str(content[name]) for name in ("token", "machine", "began"))
        return Holder(path, age, token, machine, int(content["pid"]), began)
    except (ValueError, KeyError, TypeError):
        return Holder(path, age)


@functools.cache
def this_machine() -> str:
    """Hash of host, boot and PID namespace: equal for processes that share process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        import psutil

        place = str(round(psutil.boot_time() / 60))
    return hashlib.sha256(f"{socket.gethostname()} {place}".encode()).hexdigest()[:16]


def _facts(pid: int) -> tuple[str, str]:
    """State letter of a process and its start in ticks since the boot; empty if the system has no /proc."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return words[0], words[19]
    except (OSError, IndexError):
        return "", ""


def _runs(pid: int, began: str) -> bool:
    """Does this process still run? A zombie does not."""
    try:
        os.kill(pid, 0)
    except OverflowError:
        return False
    except OSError as error:
        if error.errno != errno.EPERM:  # it exists, and belongs to another user
            return False
    return _facts(pid)[0] not in ("Z", "X") and _facts(pid)[1] == began


class _Beating:
    """One thread that sends the heartbeats of all leases of this process."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, lease: Lease) -> None:
        with self._lock:
            self._leases.add(lease)
            if self._thread is None or not self._thread.is_alive():  # threads do not survive a fork
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
