"""`bench status`: the done, running, waiting and failed jobs of a results folder. Read-only, also during a run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from bench.planning.job import Job
from bench.progress import live
from bench.progress.remaining import left, runs, together
from bench.records.runtime_estimate import Estimator, clock
from bench.records.store import Store

GOOD = ("done", "unsupported", "running", "waiting")  # every other state is a failure


def status(results: Path, planned: list[Job], as_json: bool) -> None:
    """Print it. `planned`: the jobs of a spec; without any, all there are folders for."""
    store = Store(results)
    known = {**store.jobs(), **{job.key: job for job in planned}}
    found = survey(store, {job.key: job for job in planned} or known, known)
    found["unreadable"] = len(set(store.keys()) - set(known))
    if as_json:
        print(json.dumps({"results": str(results), **found}, indent=1))
        return
    for line in lines(results, found):
        print(line)


def survey(store: Store, jobs: dict[str, Job], known: dict[str, Job]) -> dict[str, Any]:
    """The state of all jobs as plain values."""
    kinds: dict[str, Counter[str]] = {}
    running, waiting, failed, dirty, retried = list[Job](), list[Job](), [], 0, 0
    for key, job in jobs.items():
        record = store.record(key)
        state = record["state"] if record else "running" if runs(store, key) else "waiting"
        kinds.setdefault(job.kind, Counter())[state] += 1
        if record is None:
            (running if state == "running" else waiting).append(job)
        else:
            if state not in GOOD:
                failed.append({**_about(job, known), "state": state, "reason": _reason(record)})
            dirty += state == "done" and bool(record.get("provenance", {}).get("dirty"))
            retried += "retries" in record or "attempts" in record
    total = sum(kinds.values(), Counter[str]())
    return {
        "jobs": len(jobs),
        "states": dict(sorted(total.items())),
        "kinds": {kind: dict(sorted(count.items())) for kind, count in sorted(kinds.items())},
        **_time_left(store, running, waiting, known),
        "failed": sorted(failed, key=lambda one: str(one["state"])),
        "quarantined": store.quarantined(),
        "retried": retried,
        "dirty": dirty,
    }


def lines(results: Path, found: dict[str, Any]) -> list[str]:
    """The same as lines of text."""
    told = [f"{found['jobs']} jobs in {results}: {_counts(found['states'])}"]
    told += [f"  {kind:9} {_counts(states)}" for kind, states in found["kinds"].items() if len(found["kinds"]) > 1]
    if found["unreadable"]:
        told.append(f"{found['unreadable']} folders have no readable job.json; `bench run` writes it again")
    for one in found["running"]:
        rest = f", about {clock(one['seconds_left'])} left" if one["seconds_left"] is not None else ""
        told.append(f"running   {one['job']} ({one['key']}) {one['share']:.0%}{rest}")
    if found["seconds_left"] is not None:
        unknown = found["jobs_of_unknown_length"]
        more = f" + {unknown} jobs of unknown length" if unknown else ""
        told.append(f"time left about {clock(found['seconds_left'])} on {len(found['running'])} slots{more}")
    told += [f"{one['state']:9} {one['job']} ({one['key']}): {one['reason']}" for one in found["failed"]]
    if found["failed"]:
        told.append("`bench logs KEY` shows a log; `bench retry --failed` marks them for re-running")
    if found["quarantined"]:
        told.append(f"{len(found['quarantined'])} damaged files set aside in {results}/quarantine/")
    if found["retried"]:
        told.append(f"{found['retried']} records come from a job that had failed before")
    if found["dirty"]:
        told.append(f"{found['dirty']} records were made with uncommitted changes in the code")
    return told


def _time_left(store: Store, running: list[Job], waiting: list[Job], known: dict[str, Job]) -> dict[str, Any]:
    """The running jobs with their time left, and the time until all jobs are done on the slots in use now."""
    if not running:
        return {"running": [], "seconds_left": None, "jobs_of_unknown_length": None}
    devices = {store.progress(job.key).get("device") for job in running}
    # where they run on both, or do not say where, all records tell
    estimator, told = Estimator(store, devices.pop() if len(devices) == 1 else None), []
    estimator.know(known.values())
    for job in running:
        share = float(store.progress(job.key).get("share", 0.0))
        told.append({**_about(job, known), "share": share, "seconds_left": left(store, job, estimator).seconds})
    total = together(store, [*running, *waiting], estimator, len(running))
    return {"running": told, "seconds_left": total.seconds, "jobs_of_unknown_length": total.unknown}


def _about(job: Job, known: dict[str, Job]) -> dict[str, str]:
    return {"key": job.key, "kind": job.kind, "job": live.title(job, known)}


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _reason(record: dict[str, Any]) -> str:
    error = record.get("error") or {}
    return f"{error['type']}: {error['message']}" if error else str(record.get("reason", "no reason stored"))
