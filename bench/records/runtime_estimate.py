"""Estimates how long a job takes: from records of similar jobs, or else from a cost model."""

from __future__ import annotations

import contextlib
import math
import platform
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from bench.planning import catalog
from bench.planning.job import AuditJob, EvaluationJob, ImportJob, Job, ModelJob, ShardJob, TrainJob
from bench.records.record import Record, evaluation_metrics, train_metrics
from bench.records.store import Store


class Past(NamedTuple):
    """Time of one job: seconds of work, which grow with its size; the size; and the seconds besides that work (loading,
    saving), None if the job was resumed, since a process knows only its own."""

    seconds: float
    size: float
    overhead: float | None


class Estimate(NamedTuple):
    """Expected seconds of a job and their range. `likeness` and `records`: the class of past jobs that it comes
    from and their number; () and 0 if it comes from the cost model."""

    seconds: float
    low: float
    high: float
    likeness: tuple[str, ...]
    records: int


CostModel = Callable[[Job, ModelJob], Estimate | None]  # a job and the training whose model it uses
WIDER = 1.25  # the range of past records is widened by this factor: few records underestimate the variation


class Estimator:
    """Estimates from past jobs of the same method on the same model, in proportion to the size of a job.

    `device`: only records of this kind of device (cpu or cuda) are used; default all. `cost_model`: estimates jobs
    that no record resembles (see bench.progress.cost_model); without one they are unknown.
    """

    def __init__(self, store: Store, device: str | None = None, cost_model: CostModel | None = None) -> None:
        self.store, self.device, self.cost_model = store, device, cost_model
        self.rates: dict[tuple[str, ...], list[Past]] = {}
        self.peaks: dict[tuple[str, ...], dict[str, float]] = {}
        self.bytes: dict[tuple[str, ...], list[tuple[int, float]]] = {}
        self.finished: dict[tuple[str, ...], dict[str, float]] = {}  # seconds by key, of the jobs on one architecture
        self._modeled: dict[str, Estimate] = {}
        self._scales: dict[tuple[str, ...], tuple[int, float]] = {}  # by architecture: finished jobs, and the ratio
        self.jobs: dict[str, Job] = {}
        past = list(store.records())
        self.jobs.update((job.key, job) for job, _ in past)
        for job, record in past:
            if record.state == "done":
                self.learn(job, record)

    def know(self, jobs: Iterable[Job]) -> None:
        """Add jobs without a record: the class of an evaluation depends on its training."""
        self.jobs.update((job.key, job) for job in jobs)

    def learn(self, job: Job, record: Record) -> None:
        """Add a finished job."""
        self.jobs[job.key] = job
        past = _past(job, record)
        if job.parts or (self.device and kind_of_device(record) not in (self.device, None)):
            return  # the shards of an evaluation have records of their own
        if past is not None and (architecture := self._architecture(job)):
            self.finished.setdefault(architecture, {})[job.key] = past.seconds
        for likeness in self.likeness(job):
            if past is not None:
                self.rates.setdefault(likeness, []).append(past)
            held = self.peaks.setdefault(likeness, {})
            for where, peak in vars(record.peak_memory_mb).items():
                held[where] = max(held.get(where, 0.0), peak or 0.0)

    def seconds(self, job: Job) -> float | None:
        """Expected seconds, None if they are unknown."""
        found = self.estimate(job)
        return None if found is None else found.seconds

    def estimate(self, job: Job) -> Estimate | None:
        """Seconds with their range, from past records if there are any, or else from the cost model."""
        self.jobs[job.key] = job
        if job.parts:
            return Estimate(0.0, 0.0, 0.0, (), 0)
        for likeness in self.likeness(job):
            past = self.rates.get(likeness)
            if past:
                return _from_records(past, likeness, job.size)
        return self._calibrated(job)

    def _calibrated(self, job: Job) -> Estimate | None:
        """The cost model's estimate, in proportion to what jobs of this kind on this architecture took: one pass is
        timed in a second, on a machine that may be busier or idler in the hours after it."""
        found = self._model(job)
        if found is None:
            return None
        scale = self._scale(self._architecture(job))
        return found._replace(seconds=found.seconds * scale, low=found.low * scale, high=found.high * scale)

    def _scale(self, where: tuple[str, ...]) -> float:
        """Seconds that the finished jobs of an architecture took over those of the cost model; 1 if there are none.
        Computed again when one more is finished: a live view asks for each of its jobs, every second."""
        finished = self.finished.get(where, {})
        if where not in self._scales or self._scales[where][0] != len(finished):
            known = [(self._model(self.jobs[key]), took) for key, took in finished.items()]
            pairs = [(modeled.seconds, took) for modeled, took in known if modeled is not None]
            if not pairs:
                return 1.0
            ratio = sum(took for _, took in pairs) / sum(modeled for modeled, _ in pairs)
            self._scales[where] = len(finished), ratio
        return self._scales[where][1]

    def _model(self, job: Job) -> Estimate | None:
        model, found = self.jobs.get(job.model_key), self._modeled.get(job.key)
        if found is None and self.cost_model is not None and isinstance(model, ModelJob):
            found = self.cost_model(job, model)
            if found is not None:
                self._modeled[job.key] = found
        return found

    def _architecture(self, job: Job) -> tuple[str, ...]:
        """Kind of job, data set and architecture; () if they are unknown."""
        model = job if isinstance(job, ModelJob) else self.jobs.get(job.model_key)
        if not isinstance(model, ModelJob) or isinstance(job, ImportJob):
            return ()
        return "evaluate" if isinstance(job, ShardJob) else job.kind, model.data.name, model.model.name

    def memory(self, job: Job, where: str) -> float | None:
        """Peak MB of similar jobs (`rss`, or `cuda` on the device), None if none was measured."""
        for likeness in self.likeness(job):
            peak = self.peaks.get(likeness, {}).get(where)
            if peak:
                return peak
        return None

    def disk(self, jobs: list[Job]) -> tuple[int, int]:
        """Bytes that these jobs will store, and the number of jobs without an estimate."""
        if not self.bytes:
            for job, record in self.store.records():
                sizes = [self.store.size_of(job.key, name) for name in record.files]
                if None not in sizes and record.state == "done":  # git brings records without their files
                    left = sum(size or 0 for size in sizes), _extent(job)
                    for likeness in self.likeness(job):
                        self.bytes.setdefault(likeness, []).append(left)
        rates = [next((_rate(self.bytes[k]) for k in self.likeness(job) if k in self.bytes), None) for job in jobs]
        known = [rate * _extent(job) for job, rate in zip(jobs, rates, strict=True) if rate is not None]
        return round(sum(known)), len(jobs) - len(known)

    def likeness(self, job: Job) -> list[tuple[str, ...]]:
        """Classes of similar jobs, most similar first: method with settings and model, then method and model."""
        model = job if isinstance(job, ModelJob) else self.jobs.get(job.model_key)
        if isinstance(job, ImportJob) or not isinstance(model, ModelJob):
            return []
        if isinstance(job, TrainJob):
            name, settings = job.defense.name, job.defense.settings
        elif isinstance(job, AuditJob):
            name, settings = job.part, {"level": job.level}
        else:
            name, settings = job.attack.name, job.attack.settings
        if job is not model:
            name += "/" + _deploys(model.defense.name)  # a majority vote takes one pass per draw
        kind = "evaluate" if isinstance(job, ShardJob) else job.kind
        where = (kind, model.data.name, model.model.name, name)
        return [(*where, str(sorted(settings.items()))), where]


def _extent(job: Job) -> float:
    """What the size of the files of a job is in proportion to: images for an evaluation, else constant."""
    return job.size if isinstance(job, EvaluationJob) else 1.0


def _rate(held: list[tuple[int, float]]) -> float:
    """The largest bytes per extent of the large jobs; files of few images consist mostly of headers."""
    most = max(extent for _, extent in held)
    return max(count / max(extent, 1.0) for count, extent in held if 4 * extent >= most)


def _past(job: Job, record: Record) -> Past | None:
    wall, trained = record.time.seconds, train_metrics(record)
    if isinstance(job, AuditJob):
        return None if wall is None else Past(wall, job.size, 0.0)
    work = trained.train_seconds if isinstance(job, TrainJob) else evaluation_metrics(record).attack_seconds
    if work is None:
        return None
    work += (trained.check_seconds or 0.0) + (trained.checkpoint_seconds or 0.0)
    whole = wall is not None and wall >= work and not trained.resumed
    return Past(work, job.size, wall - work if whole and wall is not None else None)


def _from_records(past: list[Past], likeness: tuple[str, ...], extent: float) -> Estimate:
    """The mean rate, and the range from the fastest to the slowest of the records that are at least a quarter as long
    as the longest one."""
    long = [one for one in past if 4 * one.size >= max(other.size for other in past)]
    rates = [one.seconds / max(one.size, 1.0) for one in long]
    overhead = _expected(past, 0.0)
    low, high = min(rates) * extent + overhead, max(rates) * extent + overhead
    return Estimate(_expected(past, extent), low / WIDER, high * WIDER, likeness, len(past))


def _expected(past: list[Past], size: float) -> float:
    """Seconds for a size, by the mean rate; long jobs weigh more, as short ones are mostly warm-up."""
    rate = sum(one.seconds for one in past) / max(sum(one.size for one in past), 1.0)
    overhead = [one.overhead for one in past if one.overhead is not None]
    return rate * size + (sum(overhead) / len(overhead) if overhead else 0.0)


def took(job: Job, record: Record) -> float:
    """Seconds that a finished job took on its device; the work of shards is theirs, not that of the whole."""
    past = None if job.parts else _past(job, record)
    return record.time.seconds or 0.0 if past is None else past.seconds + (past.overhead or 0.0)


def cpu_name() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return "CPU " + line.partition(":")[2].strip()
    return f"CPU {platform.processor() or platform.machine()}"


def kind_of_device(record: Record) -> str | None:
    """Of a job that was run: cpu or cuda, None where the record names no device."""
    name = record.provenance.device
    return None if name is None else "cpu" if name.startswith("CPU") else "cuda"


def _deploys(defense: str) -> str:
    plugin = catalog.find("defenses", defense)
    return plugin.predictor if plugin else "unknown"


def clock(seconds: float) -> str:
    """1 h 05 min, 3 min 20 s, 12 s; a damaged record may give infinity."""
    whole = round(seconds) if math.isfinite(seconds) else sys.maxsize
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"
