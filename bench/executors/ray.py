"""A Ray cluster, or a Ray started on this machine: each job is a task that runs the worker in a process of its own.

Without an address, Ray is started for this run, listens on loopback only and has no dashboard: anyone who reaches its
ports can run any code.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from bench.executors.base import Backend, Exit, Handle, MissingDependency
from bench.executors.sbatch import environment
from bench.jobs.retries import Fault
from bench.planning.job import Job
from bench.records.record import Retry
from bench.records.redact import redacted
from bench.records.store import Store
from bench.training import stop_signals

RETRIES = 2  # by Ray, of a job whose process or node was lost; finished blocks do not run again


def do(results: str, key: str, root: str, device: str, workers: int) -> str:
    """Run one job in a process of Ray's; returns the state of its record, "held" or "over"."""
    from bench.jobs.attempt import attempt

    signal.signal(signal.SIGTERM, stop_signals.handle)
    return attempt(Path(results), key, Path(root), device, workers)


@dataclass
class Ray(Backend):
    """Backend of Ray. `root`: the data folder; `num_gpus`, `num_cpus`: what a job takes, fractions allowed."""

    worker_claims: ClassVar[bool] = True
    root: Path
    device: str = "auto"
    address: str | None = None
    num_gpus: float | None = None
    num_cpus: float | None = None

    def __post_init__(self) -> None:
        """Connect to Ray; raises MissingDependency, or ValueError without a cluster or room for a job."""
        self._ray = self._connect()
        has = self._ray.cluster_resources()
        self._share = share = self._shared(has)
        self.kind = "cuda" if share["GPU"] else "cpu"
        most = [has.get(name, 0.0) / part for name, part in share.items() if part]
        if most and min(most) < 1:
            wanted = ", ".join(f"{part:g} {name}" for name, part in share.items() if part)
            raise ValueError(
                f"no job fits: it takes {wanted}, and Ray has {has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU"
            )
        self.lanes = int(min(most)) if most else 1

    def devices(self) -> str:
        """See Backend."""
        return f"{self.kind}, on the nodes that Ray assigns"

    def share(self, job: Job) -> float:
        """See Backend."""
        return float(self._share["GPU" if self.kind == "cuda" else "CPU"])

    def open(self, store: Store, jobs: list[Job]) -> None:
        """See Backend."""
        self.store, self._ray = store, self._connect()
        self.running: dict[Any, Handle] = {}  # by Ray's reference to the result

    def submit(self, job: Job, attempts: Sequence[Retry]) -> Handle:
        """See Backend. Ray holds the job in its own queue until there is room."""
        (self.store.folder(job.key) / "progress.json").unlink(missing_ok=True)
        gpus = self._share["GPU"]
        beside = max(int(1 / gpus), 1) if gpus else self.lanes  # a GPU runs no jobs but these
        results, root = str(self.store.root.absolute()), str(self.root.absolute())
        handle = Handle(job)
        self.running[self._task.remote(results, job.key, root, self.kind, beside)] = handle
        return handle

    def poll(self, seconds: float) -> list[Exit]:
        """See Backend."""
        if not self.running:
            time.sleep(seconds)  # other processes run everything that is left
            return []
        done, _ = self._ray.wait(list(self.running), num_returns=len(self.running), timeout=seconds)
        for handle in self.running.values():
            handle.started = handle.started or _began(self.store, handle.job)
        return [self._ended(self.running.pop(reference), reference) for reference in done]

    def _ended(self, handle: Handle, reference: Any) -> Exit:
        """What Ray reports of a finished task; a fault only where the job has no record."""
        from ray import exceptions

        name = "WorkerDied"
        try:
            state = self._ray.get(reference)
            if state in ("held", "over"):
                return Exit(handle, state)
            message = "the worker ended without a record that can be read here; is the results folder shared?"
        except exceptions.RayTaskError as error:  # exceptions of a job are in its record: this one never began
            name, first = type(error.cause).__name__, str(error.cause).strip().partition("\n")[0]
            message = f"{redacted(first)}; is the results folder shared with Ray's nodes, and is bench installed there?"
        except exceptions.RayError as error:  # its process or node was lost
            message = f"Ray lost the worker {1 + RETRIES} times ({type(error).__name__})"
        recorded = self.store.record(handle.job.key) is not None
        return Exit(handle, fault=None if recorded else Fault("died", name, message))

    def cancel(self, handle: Handle) -> None:
        """See Backend."""
        for reference in [reference for reference, each in self.running.items() if each is handle]:
            self._ray.cancel(reference, force=True)
            del self.running[reference]

    def close(self) -> None:
        """See Backend. Leaves Ray."""
        for handle in list(self.running.values()):
            self.cancel(handle)
        self._ray.shutdown()

    @functools.cached_property
    def _task(self) -> Any:
        import ray

        share = self._share
        # one process per job: CUDA context, peak memory and random state must not reach the next job
        options = {"max_calls": 1, "max_retries": RETRIES, "num_cpus": share["CPU"], "num_gpus": share["GPU"]}
        variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **environment()}
        return ray.remote(**options, runtime_env={"env_vars": variables})(do)

    def _shared(self, has: dict[str, float]) -> dict[str, float]:
        """The CPUs and GPUs that a job takes, of those that Ray has."""
        gpus = self.num_gpus
        if gpus is None:
            on_gpu = self.device == "cuda" or (self.device == "auto" and has.get("GPU"))
            gpus = 1.0 if on_gpu else 0.0
        if gpus and self.device == "cpu":
            raise ValueError("--device cpu and --num-gpus contradict each other; leave one out")
        return {"CPU": 1.0 if self.num_cpus is None else self.num_cpus, "GPU": gpus}

    def _connect(self) -> Any:
        if not self.address:  # Ray reads these when it is imported
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on every system Ray's switch for loopback only
            os.environ["RAY_AUTH_MODE"] = "token"
            # other users of this machine reach loopback too
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError:
            raise MissingDependency("--executor ray needs ray: pip install 'defense-bench[ray]'") from None
        if not ray.is_initialized():
            _reach(self.address)
            where = {"address": self.address} if self.address else {"address": "local", "include_dashboard": False}
            try:
                ray.init(**where, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"no Ray cluster at {self.address or 'this machine'}: {reason}") from None
        return ray


def _reach(address: str | None) -> None:
    """Raises ValueError if nothing listens at `host:port`; Ray itself would try for ten minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster at --address {address}: {error}") from None


def _began(store: Store, job: Job) -> bool:
    """Has a worker begun this job? It writes its progress, or its record already."""
    return bool(store.progress(job.key)) or store.record(job.key) is not None
