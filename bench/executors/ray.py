"""A Ray cluster, or a Ray of this machine's own: each job is a task that runs the worker in a process of its own.

Without an address Ray is started for this run, listens on loopback only and has no dashboard: its ports run any code
that reaches them.
"""

from __future__ import annotations

import functools
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.executors.base import Event, MissingDependency, begin, blocker, elsewhere, ended
from bench.executors.sbatch import environment
from bench.planning.job import Job
from bench.records.leases import Claims
from bench.records.redact import portable
from bench.records.store import Store
from bench.training import sigterm as stopping

TICK = 0.5  # seconds between ticks
RETRIES = 2  # of a job whose process or node was lost; finished blocks are not done again


def do(results: str, key: str, root: str, device: str, workers: int) -> str:
    """One job, in a process of Ray's."""
    from bench.jobs.attempt import attempt

    signal.signal(signal.SIGTERM, stopping.stopped)
    return attempt(Path(results), key, Path(root), device, workers)


@dataclass
class Ray:
    """Ray executor. `root`: the data folder; `num_gpus`, `num_cpus`: what a job takes, fractions allowed."""

    root: Path
    device: str = "auto"
    address: str | None = None
    num_gpus: float | None = None
    num_cpus: float | None = None

    def devices(self) -> str:
        """See Executor."""
        return f"{self.kind()}, on the nodes that Ray gives"

    def problems(self, jobs: list[Job], store: Store) -> list[str]:
        """See Executor."""
        from bench.executors.local import Local

        return Local(self.root, []).problems(jobs, store)

    def places(self) -> int:
        """How many jobs run at a time. Connects to Ray; raises MissingDependency or (no cluster) ValueError."""
        ray = self._connect()
        has = ray.cluster_resources()
        asked = self._asked()
        most = [has.get(name, 0.0) / share for name, share in asked.items() if share]
        if most and min(most) < 1:
            told = ", ".join(f"{share:g} {name}" for name, share in asked.items() if share)
            raise ValueError(
                f"no job fits: it takes {told}, and Ray has {has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU"
            )
        return int(min(most)) if most else 1

    def kind(self) -> str:
        """cuda or cpu: where jobs run."""
        return "cuda" if self._asked()["GPU"] else "cpu"

    def run(self, jobs: list[Job], store: Store) -> Iterator[Event]:
        """See Executor. Closing the iterator cancels what runs and leaves Ray."""
        claims, waiting = yield from begin(jobs, store)
        pending = {job.key for job in waiting}
        ray, places = self._connect(), self.places()
        running: dict[Any, Job] = {}
        told: set[str] = set()
        try:
            while waiting or running:
                for job in list(waiting):
                    begun, event = self._start(job, store, claims, pending, running, places)
                    if begun or event is not None:
                        waiting.remove(job)
                    if event is not None:
                        pending.discard(job.key)
                        yield event
                done, _ = ray.wait(list(running), num_returns=len(running), timeout=TICK) if running else ([], [])
                for reference, job in running.items():
                    if job.key not in told and (reference in done or _began(store, job)):
                        told.add(job.key)
                        yield Event("started", job)
                for reference in done:
                    job = running.pop(reference)
                    event = self._ended(job, reference, store)
                    if event is None:
                        waiting.append(job)
                        told.discard(job.key)
                        event = Event("retried", job, "another process is at it; it waits")
                    else:
                        pending.discard(job.key)
                    yield event
                yield Event("tick")
                if waiting and not running:  # all that is left is held by others
                    time.sleep(TICK)
        finally:
            claims.close()
            for reference in running:
                ray.cancel(reference, force=True)
            ray.shutdown()

    def _start(
        self, job: Job, store: Store, claims: Claims, pending: set[str], running: dict[Any, Job], places: int
    ) -> tuple[bool, Event | None]:
        """Submit a job, where nothing that it waits for is left and nobody is at it: was it, or its event if it is over
        without."""
        reason = blocker(job, store, pending)
        if reason:
            return False, Event("blocked", job, reason)
        if not pending.isdisjoint(job.waits) or (took := claims.take(job.key)) == "held":
            return False, None
        claims.release(job.key)  # its worker will take it
        if took == "over":
            return False, elsewhere(job, store)
        running[self._submit(job, store, places)] = job
        return True, None

    def _submit(self, job: Job, store: Store, places: int) -> Any:
        (store.folder(job.key) / "progress.json").unlink(missing_ok=True)
        gpus = self._asked()["GPU"]
        beside = max(int(1 / gpus), 1) if gpus else places  # a GPU is its jobs' alone
        return self._task.remote(str(store.root.absolute()), job.key, str(self.root.absolute()), self.kind(), beside)

    def _ended(self, job: Job, reference: Any, store: Store) -> Event | None:
        """The event of a job that Ray is done with; None where its worker found another process at it."""
        import ray

        name = "WorkerDied"
        try:
            state = ray.get(reference)
            if state == "held":
                return None
            if state == "over":
                return elsewhere(job, store)
            message = "the worker ended without a record that can be read here; is the results folder shared?"
        except ray.exceptions.RayTaskError as error:  # what a job itself raises is in its record: this one never began
            name, said = type(error.cause).__name__, str(error.cause).strip().partition("\n")[0]
            message = f"{portable(said)}; is the results folder shared with Ray's nodes, and is bench installed there?"
        except ray.exceptions.RayError as error:  # its process or node was lost
            message = f"Ray lost the worker {1 + RETRIES} times ({type(error).__name__})"
        event = ended(job, store)
        if event is None:
            store.put(job, "error", {"error": {"type": name, "message": message}, "metrics": {}, "files": {}})
            event = Event("error", job, f"{name}: {message}")
        return event

    @functools.cached_property
    def _task(self) -> Any:
        import ray

        asked = self._asked()
        # a process a job: CUDA contexts, peak memory and random state of one must not reach the next
        options = {"max_calls": 1, "max_retries": RETRIES, "num_cpus": asked["CPU"], "num_gpus": asked["GPU"]}
        variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **environment()}
        return ray.remote(**options, runtime_env={"env_vars": variables})(do)

    def _asked(self) -> dict[str, float]:
        gpus = self.num_gpus
        if gpus is None:
            on_gpu = self.device == "cuda" or (self.device == "auto" and self._connect().cluster_resources().get("GPU"))
            gpus = 1.0 if on_gpu else 0.0
        if gpus and self.device == "cpu":
            raise ValueError("--device cpu and --num-gpus contradict each other; leave one out")
        return {"CPU": 1.0 if self.num_cpus is None else self.num_cpus, "GPU": gpus}

    def _connect(self) -> Any:
        if not self.address:  # all read when ray is imported
            os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch, on any system, for loopback only
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # other users reach loopback as well
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
                said = " ".join(str(error).split())
                raise ValueError(f"no Ray cluster at {self.address or 'this machine'}: {said}") from None
        return ray


def _reach(address: str | None) -> None:
    """Raises ValueError where nobody listens at `host:port`: Ray itself would try for ten minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster at --address {address}: {error}") from None


def _began(store: Store, job: Job) -> bool:
    """Does a worker do this job? It says how far it is, or is over already."""
    return bool(store.progress(job.key)) or store.record(job.key) is not None
