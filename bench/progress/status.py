"""`bench status`: the done, running, waiting and failed jobs of a results folder. Read-only, also during a run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.executors.devices import Slot
from bench.planning.job import Job
from bench.progress import live
from bench.progress.cost_model import CostModel
from bench.progress.remaining import left, runs, together
from bench.progress.saved import kept, saved_seconds
from bench.records.runtime_estimate import Estimator, clock
from bench.records.store import Store
from bench.terminal import counted, say

NOT_FAILED = ("done", "unsupported", "running", "waiting")


def status(store: Store, planned: list[Job], as_json: bool, root: Path) -> None:
    """Print the status of the jobs `planned`; if there are none, of all jobs of the store. `root`: the data folder."""
    known = {**store.jobs(), **{job.key: job for job in planned}}
    found = survey(store, {job.key: job for job in planned}, known, root)
    found["unreadable"] = len(set(store.keys()) - set(known))
    if as_json:
        print(json.dumps({"results": str(store.root), **found}, indent=1))
        return
    for line in lines(store.root, found):
        say(line)


def survey(store: Store, jobs: dict[str, Job], known: dict[str, Job], root: Path) -> dict[str, Any]:
    """The state of the jobs of a matrix as plain values; if there are none, of all that are `known`, where the time
    left leaves out jobs that wait for a run which has ended."""
    going_on = not jobs
    jobs = jobs or known
    kinds: dict[str, Counter[str]] = {}
    running, waiting, failed, dirty, retried = list[Job](), list[Job](), [], 0, 0
    for key, job in jobs.items():
        record = store.record(key)
        state = record.state if record else "running" if runs(store, key) else "waiting"
        kinds.setdefault(job.kind, Counter())[state] += 1
        if record is None:
            (running if state == "running" else waiting).append(job)
        else:
            if state not in NOT_FAILED:
                failed.append({**_about(job, known), "state": state, "reason": record.problem})
            dirty += state == "done" and bool(record.provenance.dirty)
            retried += bool(record.failures or record.retries)
    total = sum(kinds.values(), Counter[str]())
    runs_now = {store.run_of(job.key) for job in running}
    awaited = [job for job in waiting if not going_on or store.run_of(job.key) in runs_now]
    return {
        "jobs": len(jobs),
        "states": dict(sorted(total.items())),
        "kinds": {kind: dict(sorted(count.items())) for kind, count in sorted(kinds.items())},
        **_time_left(store, running, awaited, known, root),
        "waiting_of_ended_runs": len(waiting) - len(awaited) if running else 0,
        "stopped": [{**_about(job, known), "kept": kept(store, job)} for job in waiting if saved_seconds(store, job)],
        "failed": sorted(failed, key=lambda one: str(one["state"])),
        "quarantined": store.quarantined(),
        "retried": retried,
        "dirty": dirty,
    }


def lines(results: Path, found: dict[str, Any]) -> list[str]:
    """The same as lines of text."""
    out = [f"{counted(found['jobs'], 'job')} in {results}: {_counts(found['states'])}"]
    out += [f"  {kind:9} {_counts(states)}" for kind, states in found["kinds"].items() if len(found["kinds"]) > 1]
    if found["unreadable"]:
        out.append(f"{counted(found['unreadable'], 'folder')} without a readable job.json; `bench run` writes it again")
    for one in found["running"]:
        rest = f", about {clock(one['seconds_left'])} left" if one["seconds_left"] is not None else ""
        out.append(f"running   {one['job']} ({one['key']}) {one['share']:.0%}{rest}")
    if found["time_left"]:
        more = f"; {counted(found['waiting_of_ended_runs'], 'waiting job')} of a run that has ended not counted"
        out.append(f"time left {found['time_left']}{more * bool(found['waiting_of_ended_runs'])}")
    out += [f"stopped   {one['job']} ({one['key']}): {one['kept']}" for one in found["stopped"]]
    out += [f"{one['state']:9} {one['job']} ({one['key']}): {one['reason']}" for one in found["failed"]]
    if found["failed"]:
        out.append("`bench logs KEY` shows a log; `bench retry --failed` marks them for re-running")
    if found["quarantined"]:
        out.append(f"{counted(len(found['quarantined']), 'damaged file')} set aside in {results}/quarantine/")
    if found["retried"]:
        out.append(f"{counted(found['retried'], 'record')} of jobs that had failed before")
    if found["dirty"]:
        out.append(f"{counted(found['dirty'], 'record')} made with uncommitted changes in the code")
    return out


def _time_left(
    store: Store, running: list[Job], waiting: list[Job], known: dict[str, Job], root: Path
) -> dict[str, Any]:
    """The running jobs with their time left, and the time until all jobs are done on the slots in use now."""
    if not running:
        return {"running": [], "seconds_left": None, "time_left": None, "jobs_of_unknown_length": None}
    estimator, shown = _estimator(store, running, known.values(), root), []
    for job in running:
        share = float(store.progress(job.key).get("share", 0.0))
        shown.append({**_about(job, known), "share": share, "seconds_left": left(store, job, estimator).seconds})
    total = together(store, [*running, *waiting], estimator, len(running))
    text = f"{total.describe()} on {counted(len(running), 'slot')}, {total.source()}"
    about = {"seconds_left": total.seconds, "time_left": text, "jobs_of_unknown_length": total.unknown}
    return {"running": shown, **about}


def _estimator(store: Store, running: list[Job], known: Iterable[Job], root: Path) -> Estimator:
    """As `bench run` estimates on the device of the running jobs, with the pass times that it has measured."""
    kinds = {store.progress(job.key).get("device") for job in running}
    kind = kinds.pop() if len(kinds) == 1 else None  # all records count if the devices differ or are unknown
    model = CostModel(root, Slot(kind), measure=False) if kind is not None else None
    estimator = Estimator(store, kind, model)
    estimator.know(known)
    return estimator


def _about(job: Job, known: dict[str, Job]) -> dict[str, str]:
    return {"key": job.key, "kind": job.kind, "job": live.title(job, known)}


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items())
