"""A process that writes a store and can be killed, and what it leaves behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from fake_store import contents

from bench.records.store import Store


@pytest.fixture(scope="session")
def server() -> Any:
    """Processes that start in milliseconds, since everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["__main__", "pytest", "driver", "fake_store", "bench.tables.leaderboard", "bench.jobs.verify", "numpy"]
    )
    return context


def leaderboard(root: Path) -> str:
    from bench.tables.leaderboard import markdown

    return markdown(Store(root))


def outcome(root: Path) -> dict[str, bytes]:
    """All but what a kill may leave beside the files: temporary ones and dead leases, which `bench gc` removes."""
    left = (".", "lease-")
    return {name: data for name, data in contents(root).items() if not Path(name).name.startswith(left)}


def repeated(acks: Path) -> list[str]:
    """Jobs that were begun once more after somebody had been told of their end."""
    ended: set[str] = set()
    found = []
    for line in acks.read_text().splitlines() if acks.exists() else []:
        what, key = line.split()
        found += [key] if what == "begin" and key in ended else []
        ended |= {key} if what == "end" else set()
    return found


def lost(root: Path, acks: Path) -> list[str]:
    """Jobs whose end was told and which have no record."""
    lines = acks.read_text().splitlines() if acks.exists() else []
    return [line for line in lines if line.startswith("end ") and not Store(root).done(line.split()[1])]


def start(server: Any, target: Any, *args: Any) -> Any:
    process = server.Process(target=target, args=args)
    process.start()
    return process


def kill(process: Any) -> bool:
    """SIGKILL; was there something to kill? It may have ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return bool(process.exitcode == -signal.SIGKILL)


def unparsable(root: Path) -> list[str]:
    """Records and jobs that cannot be read: with atomic writes there is none at any moment."""
    store = Store(root)
    known = store.jobs()
    jobs = [key for key in store.keys() if (root / key / "job.json").exists() and key not in known]
    return jobs + [key for key in store.keys() if (root / key / "record.json").exists() and store.record(key) is None]
