"""The options that say where jobs run (this machine, slurm or ray), and their backend. Free of torch and ray."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from bench.executors.base import Backend
from bench.executors.devices import Slot, slots

if TYPE_CHECKING:
    from bench.executors.sbatch import Request

EXECUTORS = ("local", "debug", "slurm", "ray")


@dataclass(frozen=True)
class Cluster:
    """Options for a cluster. Each field is an option of `bench run`."""

    partition: Annotated[str | None, typer.Option(help="slurm: partition.")] = None
    account: Annotated[str | None, typer.Option(help="slurm: account.")] = None
    time: Annotated[str | None, typer.Option(help="slurm: time limit of a job, such as 4:00:00.")] = None
    gres: Annotated[str | None, typer.Option(help="slurm: such as gpu:a100:1.")] = None
    gpus_per_job: Annotated[int | None, typer.Option(min=0, help="slurm: short for --gres gpu:N.")] = None
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="slurm: cores of a job.")] = None
    mem: Annotated[str | None, typer.Option(help="slurm: memory of a job, such as 16G.")] = None
    max_jobs: Annotated[int | None, typer.Option(min=1, help="slurm: jobs in the queue at a time.")] = None
    max_running: Annotated[int | None, typer.Option(min=1, help="slurm: tasks of an array that run at a time.")] = None
    slurm: Annotated[
        list[str] | None,
        typer.Option(help="slurm: an option for one kind of job, such as evaluate.time=0:20:00; repeat."),
    ] = None
    slurm_pack: Annotated[
        str | None,
        typer.Option(help="slurm: evaluations expected to end within this time together are one task (5m; 0: none)."),
    ] = None
    sbatch_option: Annotated[
        list[str] | None, typer.Option(help="slurm: any other option of sbatch, such as constraint=a100; repeat.")
    ] = None
    detach: Annotated[bool, typer.Option("--detach", help="slurm: submit everything and leave.")] = False
    print_script: Annotated[
        bool, typer.Option("--print-script", help="slurm: print the batch script and submit nothing.")
    ] = False
    address: Annotated[
        str | None, typer.Option(help="ray: of a running cluster, such as auto or host:6379 (default: start one here).")
    ] = None
    num_gpus: Annotated[float | None, typer.Option(min=0, help="ray: GPUs of a job, such as 0.5.")] = None
    num_cpus: Annotated[float | None, typer.Option(min=0, help="ray: cores of a job (default: 1).")] = None

    def check(self, executor: str) -> None:
        """Raises ValueError for an option that the executor would ignore."""
        for field in dataclasses.fields(self):
            owner = "ray" if field.name in ("address", "num_gpus", "num_cpus") else "slurm"
            if executor != owner and getattr(self, field.name) not in (None, False, []):
                option = field.name.replace("_", "-")
                raise ValueError(f"--{option} needs --executor {owner}; the executor is '{executor}'")
        if self.gres is not None and self.gpus_per_job is not None:
            raise ValueError("--gres and --gpus-per-job set the same option; give one of them")
        if self.max_jobs is not None and (self.detach or self.print_script):
            raise ValueError(
                "--max-jobs needs a driver that waits; it cannot be combined with --detach or --print-script"
            )

    def request(self) -> Request:
        """What is asked of Slurm. Raises ValueError for what is not an option of sbatch."""
        from bench.executors.sbatch import PACK, Request, check
        from bench.planning.job import Job

        kinds = [job.kind for job in get_args(Job)]
        own: dict[str, tuple[str, ...]] = {}
        for text in self.slurm or []:
            kind, dot, option = text.partition(".")
            if not dot or kind not in kinds or "=" not in option:
                expected = f"KIND.OPTION=VALUE with KIND one of {', '.join(kinds)}, such as evaluate.time=0:20:00"
                raise ValueError(f"--slurm is {text!r}; expected {expected}")
            own[kind] = (*own.get(kind, ()), check(option))
        try:
            pack = PACK if self.slurm_pack is None else duration(self.slurm_pack) if self.slurm_pack != "0" else 0.0
        except ValueError as error:
            raise ValueError(f"--slurm-pack: {error}; 0 for one task each") from None
        return Request(self._options(), own, self.max_running, pack)

    def _options(self) -> tuple[str, ...]:
        """Options of sbatch for every job, without dashes."""
        from bench.executors.sbatch import check

        gres = f"gpu:{self.gpus_per_job}" if self.gpus_per_job else self.gres
        named = {
            "partition": self.partition,
            "account": self.account,
            "time": self.time,
            "gres": gres,
            "cpus-per-task": self.cpus_per_task,
            "mem": self.mem,
        }
        options = [check(f"{option}={value}") for option, value in named.items() if value is not None]
        return (*options, *map(check, self.sbatch_option or []))


@dataclass(frozen=True)
class Machine:
    """Options for this machine. Each field is an option of `bench run`."""

    workers: Annotated[int | None, typer.Option(min=1, help="Jobs at a time (default: one per core or GPU slot).")] = (
        None
    )
    jobs_per_gpu: Annotated[
        int | None, typer.Option(min=1, help="Jobs that share a GPU (default: by their measured memory).")
    ] = None
    gpus: Annotated[str | None, typer.Option(help="Such as 0,2 (default: the GPUs that are idle).")] = None
    time_limit: Annotated[str | None, typer.Option(help="Such as 30m; a job that takes longer is killed.")] = None
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto"

    def slots(self) -> list[Slot]:
        """See bench.executors.devices. Raises ValueError."""
        named = tuple((self.gpus or "").replace(",", " ").split())
        return slots(self.device, self.workers, self.jobs_per_gpu, named)

    def seconds(self) -> float | None:
        """The time limit of a job in seconds. Raises ValueError."""
        return duration(self.time_limit) if self.time_limit else None

    def check(self, executor: str) -> None:
        """Raises ValueError for an option that the executor would ignore."""
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device is '{self.device}'; expected auto, cpu or cuda")
        if executor == "debug" and self.time_limit is not None:
            raise ValueError("--time-limit kills worker processes; --executor debug runs the jobs in this process")
        for name in ("workers", "jobs_per_gpu", "gpus", "time_limit"):
            if executor not in ("local", "debug") and getattr(self, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} applies to this machine only; leave it out with --executor {executor}")


def choose(executor: str, root: Path, machine: Machine, cluster: Cluster, runs: bool = True) -> Backend:
    """The backend that the options name; `runs`: jobs will be submitted to it.

    Raises ValueError, or MissingDependency without Slurm or Ray.
    """
    cluster.check(executor)
    machine.check(executor)
    device = machine.device
    if executor == "slurm":
        from bench.executors.sbatch import require
        from bench.executors.slurm import Slurm

        if runs and not cluster.print_script:
            require("sbatch")
        asked = cluster.request()
        every = (*asked.options, *(option for own in asked.of_kind.values() for option in own))
        on_gpu = any("gpu" in option for option in every if not option.startswith(("partition", "account")))
        place = device if device != "auto" else "cuda" if on_gpu else "cpu"
        return Slurm(root, asked, place, cluster.max_jobs, cluster.detach)
    if executor == "ray" and runs:  # a plan connects to no cluster: it is that of this machine
        from bench.executors.ray import Ray

        return Ray(root, device, cluster.address, cluster.num_gpus, cluster.num_cpus)
    if executor == "debug":
        from bench.executors.debug import Debug

        slot = machine.slots()[0]
        os.environ.update(slot.environment)  # there is no worker to show the GPU to, so this process must see it
        return Debug(root, slot)
    if executor not in ("local", "ray"):
        raise ValueError(f"--executor is '{executor}'; expected {', '.join(EXECUTORS[:-1])} or {EXECUTORS[-1]}")
    from bench.executors.local import Local

    return Local(root, machine.slots(), machine.seconds())


def duration(text: str) -> float:
    """Seconds of "90", "90s", "15m" or "2h". Raises ValueError for anything else."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "s")
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"'{text}' is not a duration; expected a number with a unit, such as 90s, 15m or 2h")
    return seconds
