"""S2, S9, S10, S11: one full run, watched from below, opens no pickle, reaches no network and tells no secret."""

from __future__ import annotations

import functools
import getpass
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import tiny, write_plugins

pytestmark = pytest.mark.slow
TREE = Path(__file__).parents[2]
HOOKS = Path(__file__).parent / "hooks"
PICKLES = tuple(bytes([0x80, version]) for version in (2, 3, 4, 5))  # how a pickle begins
SECRETS = {
    "API_TOKEN": "planted-api-token-5417",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-key-2263",
    "GITHUB_TOKEN": "planted-forge-token-8801",
    "DATABASE_URL": "planted-password-9934",
    "LOGNAME": "planted-user-3108",
    "USER": "planted-user-3108",
    "HOSTNAME": "planted-host-7725",
}
HOME = "planted-home-6402"
ISOLATED = ["unshare", "-rnu", "sh", "-c", f'hostname {SECRETS["HOSTNAME"]}; exec "$@"', "sh"]


class Run(NamedTuple):
    """What a run left behind: its outcome, its files and what its processes did."""

    outcome: subprocess.CompletedProcess[str]
    home: Path
    notes: dict[str, list[str]]
    isolated: bool

    def files(self) -> list[Path]:
        """All that was written for somebody to read."""
        return [path for path in (self.home / "work").rglob("*") if path.is_file() and path.suffix != ".py"]


@functools.cache
def can_isolate() -> bool:
    """May a process here have a network and a host name of its own?"""
    try:
        return subprocess.run([*ISOLATED, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def watched(words: Sequence[object], home: Path, log: Path) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, with the hook in it and in all that it starts."""
    environment = {**os.environ, **SECRETS, "HOME": str(home), "SECURITY_LOG": str(log)}
    environment |= {"PYTHONPATH": f"{HOOKS}{os.pathsep}{TREE}", "OMP_NUM_THREADS": "1"}
    for name in ("BENCH_CACHE", "BENCH_DATA", "BENCH_RESULTS", "BENCH_PLUGINS"):
        environment.pop(name, None)
    command = [*(ISOLATED if can_isolate() else []), sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=home / "work", env=environment, capture_output=True, text=True, timeout=280)


def noted(log: Path) -> dict[str, list[str]]:
    """What the processes did, by kind."""
    found: dict[str, list[str]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        kind, _, what = line.partition("\t")
        found.setdefault(kind, []).append(what)
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two trainings, one of which fails with a traceback, four attacks, all tables and the page."""
    base = tmp_path_factory.mktemp("quiet")
    home, log = base / HOME, base / "notes.txt"
    (home / "work").mkdir(parents=True)
    plugins = write_plugins(home / "work")
    (home / "work" / "fragile.todo").write_text("raise")
    words = tiny(*plugins, defense="plain,fragile", attack="clean,wobble,pgd,autoattack")
    outcome = watched(["-m", "bench", *words], home, log)
    for command in ("leaderboard", "report", "status", "timing"):
        done = watched(["-m", "bench", command], home, log)
        assert done.returncode == 0, done.stderr
    return Run(outcome, home, noted(log), can_isolate())


def test_the_run_did_its_work(run: Run) -> None:
    assert run.outcome.returncode == 1, run.outcome.stderr  # one training fails on purpose
    assert "RuntimeError: broken on purpose" in run.outcome.stdout
    assert (run.home / "work" / "results" / "tables" / "leaderboard.csv").read_text().count("\n") >= 2
    assert len(run.notes["start"]) >= 6  # five commands, and the fork server of the workers
    assert "autoattack" in (run.home / "work" / "leaderboard.md").read_text()


def test_no_pickle_is_opened(run: Run) -> None:
    assert run.notes.get("unpickle", []) == []
    found = []
    for name in dict.fromkeys(run.notes["open"]):
        path = Path(name)
        if path.is_file() and not name.startswith(("/proc", "/sys", "/dev")):
            with path.open("rb") as file:
                start = file.read(2)
            found += [name] if start in PICKLES else []
            if start == b"PK" and any(entry.endswith(".pkl") for entry in zipfile.ZipFile(path).namelist()):
                found.append(name)
    assert found == []


def test_the_pickled_demo_model_of_pyautoattack_is_never_opened(run: Run) -> None:
    import pyautoattack

    package = str(Path(str(pyautoattack.__file__)).parent) + os.sep
    opened = [name for name in run.notes["open"] if name.startswith(package)]
    assert opened, "AutoAttack did not run"
    assert [name for name in opened if not name.endswith((".py", ".pyc")) and Path(name).is_file()] == []


def test_nothing_reaches_the_network(run: Run) -> None:
    assert run.notes.get("network", []) == []


def test_no_secret_stands_in_any_file(run: Run) -> None:
    secrets = {*SECRETS.values(), HOME}
    real = {getpass.getuser(), socket.gethostname(), str(Path.home())} - {"root", "/root", "localhost"}
    secrets |= {word for word in real if len(word) > 5}  # a shorter one stands in other words by chance
    files = run.files()
    assert {path.name for path in files} >= {"record.json", "job.json", "log.txt", "leaderboard.md", "report.html"}
    hits = []
    for path in files:
        contents = [path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        hits += [(path.name, word) for word in sorted(secrets) for content in contents if word.encode() in content]
    assert hits == []


def test_the_watch_sees_what_it_forbids(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    code = (
        "import pickle, pathlib, socket\n"
        "try: pickle.loads(pickle.dumps(pathlib.PurePosixPath('x')))\n"
        "except RuntimeError as error: print(error)\n"
        "try: socket.create_connection(('127.0.0.1', 9), 1)\n"
        "except OSError as error: print(error)\n"
    )
    done = watched(["-c", code], tmp_path, tmp_path / "notes.txt")
    assert done.stdout.count("in a run that must not") == 1
    assert done.stdout.count("no network in this run") == 1
    found = noted(tmp_path / "notes.txt")
    assert len(found["unpickle"]) == len(found["network"]) == 1
