"""How long a job will take, from the records of jobs like it. A guess is labelled as one; no record, no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import catalog
from bench.job import Job
from bench.store import Store


class Estimator:
    """Seconds a job took before: the same method on the same model, per epoch (training) or per image (evaluation)."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.rates: dict[tuple[str, ...], list[float]] = {}
        self.peaks: dict[tuple[str, ...], dict[str, float]] = {}
        self.bytes: dict[tuple[str, ...], list[int]] = {}
        self.jobs: dict[str, Job] = {}
        past = list(store.records())
        self.jobs.update((job.key, job) for job, _ in past)
        for job, record in past:
            if record["state"] == "done":
                self.learn(job, record)

    def learn(self, job: Job, record: dict[str, Any]) -> None:
        """Remember what a finished job took."""
        self.jobs[job.key] = job
        metrics = record["metrics"]
        seconds = metrics.get("train_seconds", metrics.get("attack_seconds"))
        if job.kind == "audit":
            seconds = record["time"]["seconds"]
        for likeness in self._likeness(job):
            if seconds is not None:
                self.rates.setdefault(likeness, []).append(seconds / self._size(job))
            held = self.peaks.setdefault(likeness, {})
            for where, peak in (record.get("peak_memory_mb") or {}).items():
                held[where] = max(held.get(where, 0.0), peak or 0.0)

    def seconds(self, job: Job) -> float | None:
        """Expected seconds, None where nothing like it was ever run."""
        self.jobs[job.key] = job
        for likeness in self._likeness(job):
            rates = self.rates.get(likeness)
            if rates:
                return sum(rates) / len(rates) * self._size(job)
        return None

    def memory(self, job: Job, where: str) -> float | None:
        """Peak MB that jobs like it held (`rss`, or `cuda` on the device), None where none was measured."""
        for likeness in self._likeness(job):
            peak = self.peaks.get(likeness, {}).get(where)
            if peak:
                return peak
        return None

    def disk(self, jobs: list[Job]) -> tuple[int, int]:
        """Bytes that jobs like these left on disk, and the number of jobs nothing is known about."""
        if not self.bytes:
            for job, record in self.store.records():
                sizes = [_bytes(self.store.folder(job.key) / name) for name in record["files"]]
                if None not in sizes and record["state"] == "done":  # git brings records without their files
                    for likeness in self._likeness(job):
                        self.bytes.setdefault(likeness, []).append(sum(size or 0 for size in sizes))
        found = [next((max(self.bytes[k]) for k in self._likeness(job) if k in self.bytes), None) for job in jobs]
        return sum(size for size in found if size is not None), sum(size is None for size in found)

    def total(self, jobs: list[Job], workers: int) -> tuple[float, int]:
        """Seconds for all jobs on so many slots, and the number of jobs nothing is known about."""
        known = [self.seconds(job) for job in jobs]
        return sum(s for s in known if s is not None) / max(workers, 1), sum(s is None for s in known)

    def _size(self, job: Job) -> float:
        what = job.what
        if job.kind == "train":
            return float(what["train"]["epochs"] * what["data"]["train"])
        first, last = what.get("images", (0, what["n"]))
        return float(last - first) if not job.parts else 1e-3  # shards put together take no time

    def _likeness(self, job: Job) -> list[tuple[str, ...]]:
        """From the most to the least alike: method with settings and model, then method and model."""
        if job.kind == "import":
            return []
        if job.kind == "train":
            base = job.what
            name, settings = base["defense"]["name"], str(sorted(base["defense"]["set"].items()))
        else:
            trained = self.jobs.get(job.needs[0])
            if trained is None:
                return []
            base = trained.what
            attack = job.what.get("attack") or {"name": job.what["part"], "set": {"level": job.what["level"]}}
            name, settings = attack["name"], str(sorted(attack["set"].items()))
            name += "/" + _deploys(base["defense"]["name"])  # a vote of many draws takes as many passes
        kind = "evaluate" if job.kind == "shard" else job.kind
        where = (kind, base["data"]["name"], base["model"]["name"], name)
        return [(*where, settings), where]


def _deploys(defense: str) -> str:
    try:
        return str(catalog.get("defenses", defense).constant("deploys", "deterministic"))
    except (LookupError, ValueError):  # records outlive plug-ins
        return "unknown"


def _bytes(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def duration(text: str) -> float:
    """Seconds of "90", "90s", "15m" or "2h". Raises ValueError for anything else."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "s")
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"'{text}' is no time; expected such as 90s, 15m or 2h")
    return seconds


def clock(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
