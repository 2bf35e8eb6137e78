"""A real Slurm with one node on this machine, in a folder of its own: started by a fixture, stopped after the tests."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "sinfo")
SBIN = "/usr/sbin:/sbin"


def missing() -> str:
    """Why there can be no Slurm here; empty where there can."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    absent = [tool for tool in TOOLS if not shutil.which(tool, path=path)]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmctld, slurmd and munged are started as root"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _configure(home: Path, cpus: int) -> Path:
    host = socket.gethostname().split(".")[0]
    controller, node = _free_ports(2)
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        f"SlurmdPort={node}",
        "SlurmUser=root",
        f"AuthInfo=socket={home}/munge/socket",
        f"StateSaveLocation={home}/state",
        f"SlurmdSpoolDir={home}/spool",
        f"SlurmctldPidFile={home}/slurmctld.pid",
        f"SlurmdPidFile={home}/slurmd.pid",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU",
        "JobAcctGatherType=jobacct_gather/none",
        "SchedulerParameters=sched_interval=1,bf_interval=1",
        "KillWait=10",
        "ReturnToService=2",
        f"NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN",
        "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP",
    ]
    path = home / "slurm.conf"
    path.write_text("\n".join(lines) + "\n")
    return path


def _munge(home: Path) -> subprocess.Popen[bytes]:
    """The daemon that signs messages, as user munge: it refuses to run with a key that others could read."""
    folder = home / "munge"
    folder.mkdir()
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o400)
    for path in (folder, folder / "key"):
        shutil.chown(path, "munge", "munge")
    names = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder / name}" for option, name in names.items()]
    command = ["runuser", "-u", "munge", "--", shutil.which("munged", path=SBIN) or "munged", "--foreground"]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, start_new_session=True)


def _until(what: str, ready: list[str], wanted: str, home: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < 60:
        done = subprocess.run(ready, capture_output=True, text=True)
        if done.returncode == 0 and wanted in done.stdout:
            return
        time.sleep(0.2)
    logs = "\n".join(f"{path}: {path.read_text()[-2000:]}" for path in home.glob("*.log"))
    raise RuntimeError(f"{what} did not start: {done.stdout} {done.stderr}\n{logs}")


@contextlib.contextmanager
def running(home: Path, cpus: int = 2) -> Iterator[Path]:
    """munged, slurmctld and slurmd for as long as the block lasts; gives the path of slurm.conf."""
    home.chmod(0o755)
    conf = _configure(home, cpus)
    env = {**os.environ, "SLURM_CONF": str(conf)}
    processes = [_munge(home)]
    try:
        began = time.monotonic()
        while not (home / "munge" / "socket").exists() and time.monotonic() - began < 20:
            time.sleep(0.05)
        for daemon in ("slurmctld", "slurmd"):
            with (home / f"{daemon}.log").open("wb") as log:
                command = [shutil.which(daemon, path=SBIN) or daemon, "-D", "-f", str(conf)]
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True))
        os.environ["SLURM_CONF"] = str(conf)
        _until("slurm", ["sinfo", "--noheader", "--format=%T"], "idle", home)
        yield conf
        subprocess.run(["scancel", "--user=root"], env=env, timeout=30)
    finally:
        os.environ.pop("SLURM_CONF", None)
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Slurm for the tests of a module; skips where it cannot be had."""
    if reason := missing():
        pytest.skip(reason)
    import tempfile

    # munged must reach its folder as another user, which pytest's own folders do not allow
    with tempfile.TemporaryDirectory(prefix="bench-slurm-") as folder, running(Path(folder)) as conf:
        yield conf


@pytest.fixture
def empty_queue(slurm: Path) -> Iterator[None]:
    """What a failed test leaves in the queue must not hold up the next one."""
    yield
    subprocess.run(["scancel", "--user=root"], check=True)
    until(lambda: not active())


def until(what: Any, seconds: float = 120.0) -> Any:
    """The first true answer of `what`."""
    began = time.monotonic()
    while not (answer := what()):
        assert time.monotonic() - began < seconds, "nothing happened"
        time.sleep(0.2)
    return answer


def start(*words: object) -> subprocess.Popen[str]:
    """A driver in a process of its own."""
    command = [sys.executable, "-m", "bench", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ), preexec_fn=_heed
    )


def _heed() -> None:
    """Ctrl-C counts, also where the tests themselves run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def tasks(state: str = "all") -> list[str]:
    said = subprocess.run(
        ["squeue", "--noheader", "--array", f"--states={state}", "--format=%i"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return said.stdout.split()


def active() -> list[str]:
    return tasks("PENDING,RUNNING,CONFIGURING,COMPLETING")


def requeue(task: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Have Slurm end a running task and start it anew."""
    subprocess.run(["scontrol", "requeue", task], check=True)
    until(lambda: task in tasks("PENDING"))
    meanwhile()
    until(  # Slurm lets a requeued job wait for two minutes
        lambda: subprocess.run(["scontrol", "update", f"JobId={task}", "StartTime=now"]).returncode == 0
    )
